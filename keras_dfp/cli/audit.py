"""`keras-dfp audit`: what integers cost each layer, measured on a batch of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import keras
import numpy as np

import keras_dfp
from keras_dfp import zoo
from keras_dfp.cli.describe import build, load
from keras_dfp.cli.options import (
    PACKAGES,
    PLOTS,
    POLICY_HELP,
    OutputFile,
    PolicyType,
    failure,
    require,
    settings,
    skip_bad_images,
)
from keras_dfp.files import write_json
from keras_dfp.recipe import Images

# From pixels of 0 to 255: what is subtracted, and what it is divided by.
PIXELS = {"0..255": (0.0, 1.0), "0..1": (0.0, 255.0), "-1..1": (127.5, 127.5)}


@click.command()
@click.argument("model")
@click.option(
    "--data",
    metavar="PATH",
    help="As for `keras-dfp train`; images of the part to test on are taken.  "
    "[default: the run's; digits for lenet]",
)
@click.option(
    "--policy", type=PolicyType(), help=f"{POLICY_HELP}  [default: the model's, or dfp16]"
)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@skip_bad_images
@click.option(
    "--pixels",
    type=click.Choice(list(PIXELS)),
    default="-1..1",
    show_default=True,
    help="What a model of a file or of keras.applications takes. Networks of the zoo, and runs, "
    "know.",
)
@click.option(
    "--plot",
    type=OutputFile(*PLOTS),
    help="Also draw it: a PNG, PDF or SVG.",
)
@click.option(
    "--json",
    "json_path",
    type=OutputFile(),
    help="Also write it as data.",
)
def audit(model: str, policy: str | None, plot: Path | None, json_path: Path | None, **options):
    """Measure what integers cost MODEL, layer by layer, on one batch of images.

    The batch runs under the policy and in float32. The table has, worst first, the errors of what
    each layer gives and of its gradients, what became zero, and what may help.

    MODEL is the folder of a run of `keras-dfp train`, the name of a network of the zoo or of a
    model of keras.applications (untrained), or a .keras file.

    \b
    Examples:
      keras-dfp audit lenet
      keras-dfp audit runs/resnet20 --data cifar10 --plot audit.png
      keras-dfp audit trained.keras --data photos --pixels 0..255 --policy dfp16:mantissa_bits=12
    """
    require(*PACKAGES)
    try:
        audited, images, labels = _prepare(model, policy, **options)
        found = keras_dfp.audit(audited, images, labels)
    except ValueError as error:
        raise failure(error) from error
    click.echo(found)
    if plot is not None:
        found.plot(plot)
    if json_path is not None:
        rows = [{**row, "format": vars(row["format"])} for row in found.rows]
        write_json(json_path, {"loss": found.loss, "rows": rows})


def _prepare(
    name: str,
    policy: str | None,
    data: str | None,
    batch_size: int,
    pixels: str,
    skip_bad: bool | None,
) -> tuple[keras.Model, Any, Any]:
    """Returns a compiled model, a batch of images and their labels."""
    # Here and not above, because it needs optional packages.
    from keras_dfp.training import network, run
    from keras_dfp.training.policies import policy as policy_of

    if Path(name).is_dir():
        changes = {"data": data, "policy": policy, "skip_bad": skip_bad}
        this, model = run.load(Path(name), **{k: v for k, v in changes.items() if v is not None})
        pipeline = _of_settings(this, batch_size)
        network.check_classes(model, pipeline.source)
        pipeline.shape = model.input_shape[1:]
    elif name in zoo.list():
        this = settings(name, data, policy=policy or "dfp16", skip_bad=skip_bad)
        pipeline = _of_settings(this, batch_size)
        model = network.build(this, pipeline.shape, len(pipeline.source.classes))
    else:
        model = load(Path(name)) if name.endswith((".keras", ".h5")) else build(name)
        if policy is not None or not any(
            isinstance(layer.dtype_policy, keras_dfp.DFPPolicy) for layer in model._flatten_layers()
        ):
            keras_dfp.set_model_policy(model, policy_of(policy or "dfp16"))
        return model, _of_any_model(model, data, pixels, batch_size, bool(skip_bad)), None
    images, labels = next(pipeline.evaluation())
    first = keras.Model(model.inputs, model.outputs[0], dtype=model.dtype_policy)
    first.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return first, images, labels


def _of_settings(this, size: int):
    normalize = zoo.preprocessing(this.network, this.weights)
    return _some(this.find_test_data(), this.recipe.images, normalize, size, this.skip_bad)


def _of_any_model(
    model: keras.Model, data: str | None, pixels: str, batch_size: int, skip_bad: bool
) -> Any:
    """Returns a batch of images for a model of which only the input's shape is known."""
    from keras_dfp.training import sources

    if data is None:
        raise click.UsageError(f"{model.name} needs --data: a folder of class folders of images.")
    # A model that was never built has none.
    shape = getattr(model, "input_shape", None)
    if not isinstance(shape, tuple) or len(shape) != 4 or shape[-1] not in (1, 3):
        raise click.ClickException(
            f"The command audits models of images, (batch, height, width, 1 or 3); the input of "
            f"{model.name} is {shape}. From Python, keras_dfp.audit takes any model."
        )
    side = min(n or 224 for n in shape[1:3])
    mean, std = ((value,) * shape[-1] for value in PIXELS[pixels])
    images = Images(mean=mean, std=std, resize=side, crop=side)
    source = sources.find_test(data, channels=shape[-1], skip_bad=skip_bad)

    def normalize(x):
        return (keras.ops.cast(x, "float32") - mean) / std

    return next(_some(source, images, normalize, batch_size, skip_bad).evaluation())[0]


def _some(source, images: Images, normalize: Callable, size: int, skip_bad: bool):
    """Returns a pipeline of one batch."""
    from keras_dfp.training.pipeline import Pipeline

    # All over the source: class folders come one after the other.
    some = np.linspace(0, len(source) - 1, min(size, len(source)), dtype=int)
    return Pipeline(source.subset(some), images, len(some), normalize, skip_bad)
