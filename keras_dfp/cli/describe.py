"""`keras-dfp describe`: which layers of a model run on integers, and what their inputs are."""

from __future__ import annotations

import difflib
from pathlib import Path

import click
import keras

import keras_dfp
from keras_dfp import zoo
from keras_dfp.cli.options import failure
from keras_dfp.files import check_file, shown


@click.command()
@click.argument("model")
@click.option(
    "--policy",
    type=click.Choice(["dfp16", "dfp16_paper"]),
    help="Describe MODEL as it would run under this policy.  "
    "[default: a file's own; dfp16 for a model by name]",
)
def describe(model: str, policy: str | None) -> None:
    """Show what runs on integers in MODEL, layer by layer, and why the rest stays FP32.

    Also what each layer's input is fused with, or which float it comes from, and how many bytes are
    kept for the backward pass.

    MODEL is a .keras file, or the name of a network of the zoo or of a model of
    keras.applications.

    \b
    Examples:
      keras-dfp describe resnet50
      keras-dfp describe mobilenetv2 --policy dfp16_paper
      keras-dfp describe runs/lenet/seed1/dfp16/model.keras
    """
    if model.endswith((".keras", ".h5")) or Path(model).is_file():
        described = load(Path(model))
    else:
        described = build(model)
        policy = policy or "dfp16"
    try:
        if policy:
            keras_dfp.set_model_policy(described, policy)
        report = keras_dfp.describe(described)
    except ValueError as error:
        raise failure(error) from error
    click.echo(report)


def load(path: Path) -> keras.Model:
    """Returns the model of a file."""
    try:
        if path.exists():
            check_file(path)
        return keras.models.load_model(path, compile=False)
    # What Keras raises depends on what is wrong with the file.
    except Exception as error:
        raise failure(f"Cannot load {shown(path)}: {error}") from error


def build(name: str) -> keras.Model:
    """Returns a network of the zoo, or else a model of keras.applications, untrained."""
    if name in zoo.list():
        return zoo.load(name)
    applications = {
        key.lower(): value
        for key, value in vars(keras.applications).items()
        if key[0].isupper() and callable(value)
    }
    if name.lower() in applications:
        return applications[name.lower()](weights=None)
    if Path(name).is_dir():
        raise click.BadParameter(
            f"{shown(Path(name))} is a folder. Of a run, name its model.keras.", param_hint="MODEL"
        )
    names = {key: key for key in zoo.list()}
    names |= {key: value.__name__ for key, value in applications.items() if key not in names}
    close = difflib.get_close_matches(name.lower(), names)
    there = ", ".join(names[key] for key in (close or sorted(names)))
    raise click.BadParameter(
        f"{name!r} is neither a .keras file nor the name of a network of the zoo or of "
        f"keras.applications. {'Did you mean' if close else 'There are'}: {there}",
        param_hint="MODEL",
    )
