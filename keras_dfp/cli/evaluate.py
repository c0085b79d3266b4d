"""`keras-dfp evaluate`: loss and accuracy of a trained network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from keras_dfp import zoo
from keras_dfp.cli.options import (
    PACKAGES,
    POLICY_HELP,
    PolicyType,
    require,
    settings,
    skip_bad_images,
)
from keras_dfp.files import shown


@click.command()
@click.argument("trained", metavar="RUN")
@click.option(
    "--weights",
    metavar="imagenet|FILE",
    help="Weights of keras.applications, or of a file; RUN is then a network of the zoo.",
)
@click.option(
    "--data",
    metavar="PATH",
    help="As for `keras-dfp train`, but train is not needed. Of class folders alone, the share "
    "that is held out.  [default: the run's]",
)
@click.option("--policy", type=PolicyType(), help=f"{POLICY_HELP}  [default: the run's, or dfp16]")
@click.option("--batch-size", type=click.IntRange(min=1), help="[default: the run's]")
@skip_bad_images
def evaluate(trained: str, weights: str | None, **options) -> None:
    """Test a network: loss, top-1 and top-5 accuracy.

    RUN is the folder of a run of `keras-dfp train`, of which the last checkpoint counts.

    \b
    Examples:
      keras-dfp evaluate runs/lenet-dfp16
      keras-dfp evaluate runs/first --policy float32 --data cifar10
      keras-dfp evaluate resnet50 --weights imagenet --data imagenet --batch-size 32
    """
    require(*PACKAGES)
    # Here and not above, because it needs those packages.
    from keras_dfp.training import network, run
    from keras_dfp.training.pipeline import Pipeline

    if weights is None:
        chosen = {key: value for key, value in options.items() if value is not None}
        this, model = run.load(Path(trained), **chosen)
    elif trained in zoo.list():
        this = settings(trained, weights=weights, **options)
        model = network.pretrained(this)
    else:
        raise click.BadParameter(
            f"With --weights, it must be a network of the zoo: {', '.join(zoo.list())}; "
            f"got {trained!r}.",
            param_hint="RUN",
        )
    test = this.find_test_data()
    network.check_classes(model, test)
    if weights is None:
        _warn_of_other_names(run.read(Path(trained)).classes, test.classes)
    pipeline = Pipeline(
        test,
        this.recipe.images,
        this.batch_size,
        zoo.preprocessing(this.network, this.weights),
        this.skip_bad,
    )
    pipeline.shape = model.input_shape[1:]
    result = network.evaluate(network.test_step(model), pipeline)
    click.echo(
        f"{len(test) - len(pipeline.bad)} images under {this.policy}: loss {result['loss']:.4f}, "
        f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}"
    )


def _warn_of_other_names(trained: Sequence[str], tested: Sequence[str]) -> None:
    # Folders and TFRecords of the same images name their classes differently.
    others = [f"{b} for {a}" for a, b in zip(trained, tested, strict=True) if a != b]
    if others:
        click.echo(
            f"The data have other names for classes than in training: {shown(others[0])}", err=True
        )
