"""`keras-dfp evaluate`: loss and accuracy of a trained network."""

from __future__ import annotations

from pathlib import Path

import click

from keras_dfp import zoo
from keras_dfp.cli.options import PACKAGES, POLICY_HELP, PolicyType, explained, require, settings


@click.command()
@click.argument("trained", metavar="RUN")
@click.option(
    "--weights",
    help="imagenet, or a file of weights; RUN is then the name of a network of the zoo.",
)
@click.option("--data", metavar="PATH", help="As for `keras-dfp train`.  [default: the run's]")
@click.option("--policy", type=PolicyType(), help=f"{POLICY_HELP}  [default: the run's, or dfp16]")
@click.option("--batch-size", type=click.IntRange(min=1), help="[default: the run's]")
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

    with explained():
        if weights is None:
            this, model = run.load(
                Path(trained), **{key: value for key, value in options.items() if value is not None}
            )
        elif trained in zoo.list():
            this = settings(trained, **options).resolved()
            model = network.pretrained(this, weights)
        else:
            raise click.BadParameter(
                f"With --weights, it must be a network of the zoo: {', '.join(zoo.list())}; "
                f"got {trained!r}.",
                param_hint="RUN",
            )
        _, test = this.find_data()
        network.check_classes(model, test)
        result = network.evaluate(
            network.test_step(model),
            Pipeline(
                test,
                this.recipe.images,
                this.batch_size,
                zoo.preprocessing(this.network, weights),
                this.skip_bad,
            ),
        )
    click.echo(
        f"{len(test)} images under {this.policy}: loss {result['loss']:.4f}, "
        f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}"
    )
