"""What the commands that train have in common: their options, and how they fail."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from keras_dfp import zoo
from keras_dfp.files import written_whole
from keras_dfp.training.errors import TrainingError
from keras_dfp.training.policies import OPTIONS, POLICIES, policy
from keras_dfp.training.settings import Settings

# What the commands need and keras-dfp's dependencies do not bring: the modules; where a package
# has another name than its module, that name.
PACKAGES = ("matplotlib", "scipy", "sklearn", "tensorboard", "tqdm")
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


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
            type=click.FloatRange(min=0, min_open=True),
            help="The highest learning rate.  [default: the recipe's, in proportion to the batch "
            "size]",
        ),
        click.option(
            "--label-smoothing",
            type=click.FloatRange(0, 1, max_open=True),
            default=0.0,
            show_default=True,
        ),
        click.option(
            "--input-size", type=positive, metavar="PIXELS", help="Side of the network's input."
        ),
        click.option(
            "--classes",
            type=click.IntRange(min=2),
            default=1000,
            show_default=True,
            help="Number of classes of TFRecords.",
        ),
        click.option(
            "--holdout",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            default=0.1,
            show_default=True,
            help="Share of the images to test on where there are none for that.",
        ),
        click.option(
            "--skip-bad-images",
            "skip_bad",
            is_flag=True,
            help="Report images that cannot be read and go on without them, instead of stopping.",
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
    return Settings(network=network, data=data, **options)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Makes what is wrong with data or run the message of a failed command."""
    try:
        yield
    except (TrainingError, BlockingIOError) as error:
        raise click.ClickException(str(error)) from error


def require(*packages: str) -> None:
    """Fails, before the work, if an optional package is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        names = [_DISTRIBUTIONS.get(package, package) for package in missing]
        raise click.ClickException(
            f"This needs {', '.join(names)}. Install: pip install {' '.join(names)}"
        )


def make_folder(path: Path) -> None:
    """Makes a folder to write to; says so before the work if that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with written_whole(path / ".writable") as temporary:
            temporary.touch()
        (path / ".writable").unlink()
    except OSError as error:
        raise click.ClickException(f"Cannot write to --output {path}: {error.strerror}") from error
