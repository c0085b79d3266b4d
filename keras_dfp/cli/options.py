"""What commands have in common: types of options, the options of training, how they fail."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from keras_dfp import zoo
from keras_dfp.files import made, shown
from keras_dfp.training.policies import OPTIONS, POLICIES, policy
from keras_dfp.training.settings import Settings

# What the commands need and keras-dfp's dependencies do not bring: the modules; where a package
# has another name than its module, that name.
PACKAGES = ("PIL", "matplotlib", "scipy", "sklearn", "tensorboard")
_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}


class ListType(click.ParamType):
    """Values separated by commas, each of the type of `item`."""

    def __init__(self, item: click.ParamType):
        self.item = item
        self.name = f"{item.name},..."

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        items = [self.item.convert(text.strip(), param, ctx) for text in value.split(",")]
        return list(dict.fromkeys(items))


class Number(click.FloatRange):
    """A number in a range; not infinite, and not NaN, which is in every range."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class PolicyType(click.ParamType):
    """The word for a policy; it is checked, and passed on as it is."""

    name = "POLICY"

    def convert(self, value, param, ctx):
        try:
            policy(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return value


POLICY_HELP = (
    f"{', '.join(POLICIES)}; after a dfp one, options ({', '.join(OPTIONS)}) as in "
    "dfp16:mantissa_bits=10:rounding=stochastic."
)


skip_bad_images = click.option(
    "--skip-bad-images",
    "skip_bad",
    is_flag=True,
    # Not False: commands that read a run have its own choice then.
    default=None,
    help="Report images that cannot be read and go on without them, instead of stopping.",
)


def settings_options(command: Callable) -> Callable:
    """Adds the argument and the options of which `settings` makes Settings, but the policy's."""
    positive = click.IntRange(min=1)
    decorators = [
        click.argument("network", type=click.Choice(zoo.list()), default="lenet"),
        click.option(
            "--data",
            metavar="PATH",
            help="Folder with train/ and val/ or test/, each with a folder for every class; or of "
            "TFRecords, train-* and validation-*; or of class folders, some images of which are "
            "held out; or the word digits.  [default for lenet: digits]",
        ),
        click.option("--epochs", type=positive, help="Length of the training."),
        click.option("--steps", type=positive, help="The same in steps, instead of --epochs."),
        click.option("--batch-size", type=positive, help="Images in a step."),
        click.option(
            "--lr",
            "learning_rate",
            type=Number(min=0, min_open=True),
            help="The highest learning rate.  [default: the recipe's, in proportion to the batch "
            "size]",
        ),
        click.option(
            "--label-smoothing",
            type=Number(0, 1, max_open=True),
            default=0.0,
            show_default=True,
        ),
        click.option(
            "--input-size", type=positive, metavar="PIXELS", help="Side of the network's input."
        ),
        click.option(
            "--classes",
            type=click.IntRange(2, 10**6),
            default=1000,
            show_default=True,
            help="Number of classes of TFRecords.",
        ),
        click.option(
            "--holdout",
            type=Number(0, 1, min_open=True, max_open=True),
            default=0.1,
            show_default=True,
            help="Share of the images to test on where there are none for that.",
        ),
        skip_bad_images,
        click.option(
            "--weights",
            metavar="imagenet|FILE",
            help="Weights to start from: a .keras or .weights.h5 file of the network, or those of "
            "keras.applications (resnet50, vgg16), downloaded at first use. For another number of "
            "classes the classifier is a new one.  [default: random]",
        ),
        click.option(
            "--freeze", is_flag=True, help="Of a network with --weights, train only the classifier."
        ),
        click.option(
            "--deterministic",
            is_flag=True,
            help="Make TensorFlow's ops give the same bits in every run; slower.",
        ),
        click.option(
            "--checkpoint-steps",
            type=positive,
            default=100,
            show_default=True,
            help="Steps between checkpoints; there is one after every epoch, too.",
        ),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def settings(network: str, data: str | None, **options) -> Settings:
    """Returns the settings that the options say."""
    if data is None:
        if network != "lenet":
            raise click.UsageError(
                f"{network} needs --data: a folder of class folders of images, or of TFRecords."
            )
        data = "digits"
    return Settings.of(network, data, **options)


def failure(message: Any) -> click.ClickException:
    """Returns what ends a command with a message, on one line, however Keras has written it."""
    return click.ClickException(" ".join(str(message).split()))


def require(*packages: str) -> None:
    """Fails, before the work, if an optional package is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        names = [_DISTRIBUTIONS.get(package, package) for package in missing]
        raise click.ClickException(
            f"This needs {', '.join(names)}. Install: pip install {' '.join(names)}"
        )


@contextlib.contextmanager
def output_folder(path: Path) -> Iterator[None]:
    """Makes a folder to write to; says so before the work, the block, if that is not possible.

    Of a block that fails before it has written anything, nothing is left.
    """
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError as error:
        raise failure(
            f"--output {shown(path)} is not UTF-8; TensorFlow writes to no such names."
        ) from error
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(made(path))
            # It never has a name, so nothing is left of it, nor in the way of another process.
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise failure(f"Cannot write to --output {shown(path)}: {error.strerror}") from error
        yield


def check_folder(path: Path) -> None:
    """Says before the work if a file cannot be written after it."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise failure(f"There is no folder {shown(folder)} to write to.")
    try:
        tempfile.TemporaryFile(dir=folder).close()
        # Also where its name is too long.
        path.exists()
    except OSError as error:
        raise failure(f"Cannot write to {shown(path)}: {error.strerror}.") from error


class OutputFile(click.Path):
    """A file to write after the work; checked before it."""

    def __init__(self, *suffixes: str):
        super().__init__(dir_okay=False, path_type=Path)
        self.suffixes = suffixes

    def convert(self, value, param, ctx):
        path = super().convert(value, param, ctx)
        if self.suffixes and path.suffix not in self.suffixes:
            *others, last = self.suffixes
            self.fail(f"{shown(path)} must end in {', '.join(others)} or {last}.", param, ctx)
        try:
            check_folder(path)
        except click.ClickException as error:
            self.fail(error.message, param, ctx)
        return path


# What matplotlib draws.
PLOTS = (".png", ".svg", ".pdf")
