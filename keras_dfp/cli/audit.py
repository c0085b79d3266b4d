"""`keras-dfp audit`: what integers cost each layer, measured on a batch of images."""

from __future__ import annotations

import json
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
    POLICY_HELP,
    PolicyType,
    explained,
    require,
    settings,
)
from keras_dfp.files import written_whole
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
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also draw it: a PNG, PDF or SVG.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
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
    for path in (plot, json_path):
        if path is not None and not path.absolute().parent.is_dir():
            raise click.ClickException(f"There is no folder {path.absolute().parent} to write to.")
    with explained():
        audited, images, labels = _prepare(model, policy, **options)
    try:
        found = keras_dfp.audit(audited, images, labels)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(found)
    if plot is not None:
        found.plot(plot)
    if json_path is not None:
        rows = [{**row, "format": vars(row["format"])} for row in found.rows]
        with written_whole(json_path) as temporary:
            temporary.write_text(json.dumps({"loss": found.loss, "rows": rows}, indent=1))


def _prepare(name: str, policy: str | None, data: str | None, batch_size: int, pixels: str):
    """Returns a compiled model, a batch of images and their labels."""
    # Here and not above, because it needs optional packages.
    from keras_dfp.training import network, run
    from keras_dfp.training.pipeline import Pipeline
    from keras_dfp.training.policies import policy as policy_of

    if Path(name).is_dir():
        changes = {"data": data, "policy": policy}
        this, model = run.load(Path(name), **{k: v for k, v in changes.items() if v is not None})
        recipe_images, normalize = this.recipe.images, zoo.preprocessing(this.network)
        source = this.find_test_data()
    elif name in zoo.list():
        this = settings(name, data, policy=policy or "dfp16").resolved()
        source = this.find_test_data()
        recipe_images, normalize = this.recipe.images, zoo.preprocessing(this.network)
        shape = Pipeline(source, recipe_images, 1, normalize).image_shape()
        model = network.build(this, shape, len(source.classes))
    else:
        model = load(Path(name)) if name.endswith((".keras", ".h5")) else build(name)
        if policy is not None or not any(
            isinstance(layer.dtype_policy, keras_dfp.DFPPolicy) for layer in model._flatten_layers()
        ):
            keras_dfp.set_model_policy(model, policy_of(policy or "dfp16"))
        recipe_images, normalize, source = _of_any_model(model, data, pixels)
        return model, _batch(source, recipe_images, normalize, batch_size)[0], None
    images, labels = _batch(source, recipe_images, normalize, batch_size)
    first = keras.Model(model.inputs, model.outputs[0], dtype=model.dtype_policy)
    first.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return first, images, labels


def _of_any_model(model: keras.Model, data: str | None, pixels: str) -> tuple[Images, Any, Any]:
    from keras_dfp.training import sources

    if data is None:
        raise click.UsageError(f"{model.name} needs --data: a folder of class folders of images.")
    shape = model.input_shape
    if not isinstance(shape, tuple) or len(shape) != 4 or shape[-1] not in (1, 3):
        raise click.ClickException(
            f"The command audits models of images, (batch, height, width, 1 or 3); the input of "
            f"{model.name} is {shape}. From Python, keras_dfp.audit takes any model."
        )
    side = min(n or 224 for n in shape[1:3])
    mean, std = ((value,) * shape[-1] for value in PIXELS[pixels])
    images = Images(mean=mean, std=std, resize=side, crop=side)
    source = sources.find_test(data, channels=shape[-1])
    return images, lambda x: (keras.ops.cast(x, "float32") - mean) / std, source


def _batch(source, images: Images, normalize, size: int):
    from keras_dfp.training.pipeline import Pipeline

    # All over the source: class folders come one after the other.
    some = np.linspace(0, len(source) - 1, min(size, len(source)), dtype=int)
    return next(Pipeline(source.subset(some), images, len(some), normalize).evaluation())
