"""`keras-dfp export`: a trained network for use elsewhere."""

from __future__ import annotations

from pathlib import Path

import click
import keras

from keras_dfp.cli.options import PACKAGES, check_folder, require
from keras_dfp.files import shown, written_whole

# What Keras's `export` calls the format of a file, and the packages that it needs for that.
FORMATS = {".tflite": ("litert", ()), ".onnx": ("onnx", ("tf2onnx", "onnx"))}


@click.command()
@click.argument("trained", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("target", metavar="TARGET", type=click.Path(path_type=Path))
def export(trained: Path, target: Path) -> None:
    """Write the network of a run for use where keras-dfp is not installed.

    RUN is the folder of a run of `keras-dfp train`. TARGET is a file that ends in .keras, for
    Keras, in .tflite, for LiteRT, or in .onnx, for ONNX runtimes; a name without ending is a
    folder, for TensorFlow (SavedModel). Each computes in FP32, from the weights of the run, and
    gives probabilities. Its input are normalised images, as in training; how is printed.

    \b
    Examples:
      keras-dfp export runs/lenet-dfp16 lenet.keras
      keras-dfp export runs/lenet-dfp16 lenet-savedmodel
      keras-dfp export runs/lenet-dfp16 lenet.tflite
      keras-dfp export runs/lenet-dfp16 lenet.onnx
    """
    # Names of folders have dots too: lenet-0.5
    if target.suffix[1:2].isalpha() and target.suffix not in (".keras", *FORMATS):
        raise click.UsageError(
            f"TARGET must end in .keras, {' or '.join(FORMATS)}, or be the name of a folder, "
            f"without ending; got {target.name}."
        )
    file_format, packages = FORMATS.get(target.suffix, ("tf_saved_model", ()))
    require(*PACKAGES, *packages)
    # Here and not above, because it needs those packages.
    from keras_dfp.training import network, run

    if target.exists():
        raise click.ClickException(f"{shown(target)} exists already.")
    check_folder(target)
    settings, model = run.load(trained)
    model = network.plain(model, settings)
    with written_whole(target) as path:
        if target.suffix == ".keras":
            model.save(path)
        else:
            # Without it, Keras asks some formats' models to have been called.
            images = keras.InputSpec("float32", model.input_shape, name="images")
            model.export(str(path), format=file_format, verbose=False, input_signature=[images])
    if settings.weights == "imagenet":
        click.echo(
            f"Written to {shown(target)}. Its input: what keras.applications' preprocess_input for "
            f"{settings.network} makes of RGB images of 0 to 255, as float32 of "
            f"{model.input_shape[1:]}"
        )
        return
    images = settings.recipe.images
    click.echo(
        f"Written to {shown(target)}. Its input: {'RGB' if len(images.mean) == 3 else 'grey'} "
        f"images of 0 to 255, minus {list(images.mean)}, divided by {list(images.std)}, as float32 "
        f"of {model.input_shape[1:]}"
    )
