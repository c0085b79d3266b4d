"""`keras-dfp train`: one network, by its recipe, under one policy."""

from __future__ import annotations

from pathlib import Path

import click

from keras_dfp.cli.options import (
    PACKAGES,
    POLICY_HELP,
    PolicyType,
    make_folder,
    require,
    settings,
    settings_options,
)
from keras_dfp.files import shown


@click.command()
@settings_options
@click.option("--policy", type=PolicyType(), help=f"{POLICY_HELP}  [default: dfp16]")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=1, show_default=True)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the run.  [default: runs/NETWORK-POLICY]",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the last checkpoint in --output; the other options as before.",
)
def train(output: Path | None, resume: bool, checkpoint_steps: int, **options) -> None:
    """Train NETWORK by its recipe.

    NETWORK is lenet unless you say otherwise. What no option says is as in the network's recipe,
    and the same for every policy. With another --batch-size, the learning rate changes in
    proportion; with other --epochs or --steps, the schedule is stretched or compressed.

    Writes checkpoints, log.csv, tensorboard/ and, at the end, model.keras. Ctrl-C stops it after
    a checkpoint.

    \b
    Examples:
      keras-dfp train
      keras-dfp train resnet20 --data cifar10 --epochs 10 --output runs/first
      keras-dfp train resnet50 --data photos --weights imagenet --freeze
      keras-dfp train resnet50 --data imagenet --policy dfp16 --batch-size 256
      keras-dfp train resnet50 --data imagenet --policy dfp16 --batch-size 256 --resume
    """
    require(*PACKAGES)
    # Here and not above, because it needs those packages.
    from keras_dfp.training.run import Run

    this = settings(**options)
    output = output or Path("runs") / f"{this.network}-{this.policy.replace(':', '-')}"
    if (output / "run.json").exists() and not resume:
        raise click.ClickException(
            f"{shown(output)} holds a run already. --resume goes on with it; --output chooses "
            "another folder."
        )
    data = this.find_data()
    make_folder(output)
    run = Run(this, output, data, resume)
    if run.finished:
        click.echo("It is finished already.")
    else:
        train_data, test_data = data
        click.secho(
            f"Training {this.network} under {this.policy}: {len(train_data)} images of "
            f"{len(train_data.classes)} classes, {len(test_data)} to test on; "
            f"{run.epochs} epochs, {run.steps} steps"
            + (f", of which {run.progress.step} done" if run.progress.step else ""),
            bold=True,
        )
    if this.weights is not None and run.new_classifier:
        click.echo(
            f"Its classifier is new: the weights of {shown(this.weights)} are for other classes."
        )
    try:
        run.train(checkpoint_steps)
    except KeyboardInterrupt:
        click.echo(f"\nStopped after step {run.progress.step}; --resume goes on.", err=True)
        raise
    if run.progress.diverged:
        raise click.ClickException(
            f"The loss is no longer a number after step {run.progress.diverged}. Try a lower --lr."
        )
    result = run.progress.history[-1]
    click.echo(
        f"\ntest top-1 {result['test_top1']:.2%}, top-5 {result['test_top5']:.2%}. "
        f"In {shown(output)}: model.keras, log.csv, tensorboard/"
    )
