"""`keras-dfp export`: a trained network for use elsewhere."""

from __future__ import annotations

from pathlib import Path

import click

from keras_dfp.cli.options import PACKAGES, explained, require
from keras_dfp.files import written_whole


@click.command()
@click.argument("trained", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("target", metavar="TARGET", type=click.Path(path_type=Path))
def export(trained: Path, target: Path) -> None:
    """Write the network of a run for use where keras-dfp is not installed.

    RUN is the folder of a run of `keras-dfp train`. TARGET is a file that ends in .keras, for
    Keras, or else a folder, for TensorFlow (SavedModel). Either computes in FP32 and gives
    probabilities. Its input are normalised images, as in training; how is printed.

    \b
    Examples:
      keras-dfp export runs/lenet-dfp16 lenet.keras
      keras-dfp export runs/lenet-dfp16 lenet-savedmodel
    """
    require(*PACKAGES)
    # Here and not above, because it needs those packages.
    from keras_dfp.training import network, run

    if target.exists():
        raise click.ClickException(f"{target} exists already.")
    if not target.absolute().parent.is_dir():
        raise click.ClickException(f"There is no folder {target.absolute().parent} to write to.")
    with explained():
        settings, model = run.load(trained)
        model = network.plain(model, settings)
        with written_whole(target) as path:
            if target.suffix == ".keras":
                model.save(path)
            else:
                model.export(path, verbose=False)
    images = settings.recipe.images
    click.echo(
        f"Written to {target}. Its input: {'RGB' if len(images.mean) == 3 else 'grey'} images of 0 "
        f"to 255, minus {list(images.mean)}, divided by {list(images.std)}, as float32 of "
        f"{model.input_shape[1:]}"
    )
