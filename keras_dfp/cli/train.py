"""`keras-dfp train`: one network, by its recipe, under one policy."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from keras_dfp.cli.options import (
    PACKAGES,
    POLICY_HELP,
    Number,
    PolicyType,
    failure,
    output_folder,
    require,
    settings,
    settings_options,
)
from keras_dfp.exchange import EXCHANGES
from keras_dfp.files import shown

if TYPE_CHECKING:
    from keras_dfp.training.workers import Workers


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
@click.option(
    "--statistics",
    type=click.IntRange(1),
    metavar="N",
    help="Look at the numbers of every layer on integers in one of N steps: statistics.csv, and "
    "statistics/ for TensorBoard.",
)
@click.option(
    "--compare",
    multiple=True,
    metavar="LAYER",
    help="In the steps of --statistics, compute this layer in float32 too, and say how far apart "
    'they are. A name or pattern, such as "conv2*"; may be given several times.',
)
@click.option(
    "--stop-on-nonfinite",
    is_flag=True,
    help="Stop at the first NaN or infinity, say where it is; the checkpoint is from before.",
)
@click.option(
    "--gradient-exchange",
    type=click.Choice(EXCHANGES),
    default="float32",
    show_default=True,
    help="How several workers add up gradients: dfp16 takes half the bytes, and gives the same "
    "bits in any order.",
)
@click.option(
    "--sync-batch-norm",
    is_flag=True,
    help="Batch norm over the images of all workers, instead of each worker's own.",
)
@click.option(
    "--worker-timeout",
    type=Number(min=0, min_open=True),
    default=300,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait until all workers have started.",
)
def train(
    output: Path | None,
    resume: bool,
    checkpoint_steps: int,
    statistics: int | None,
    compare: tuple[str, ...],
    stop_on_nonfinite: bool,
    worker_timeout: float,
    **options,
) -> None:
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
      keras-dfp train resnet20 --data cifar10 --statistics 100 --compare "conv2*"
      keras-dfp train resnet50 --data photos --weights imagenet --freeze
      keras-dfp train resnet50 --data imagenet --policy dfp16 --batch-size 256
      keras-dfp train resnet50 --data imagenet --policy dfp16 --batch-size 256 --resume

    On several machines: the same command on each, with TF_CONFIG in the environment, which says who
    they are. See docs/distributed.md.
    """
    require(*PACKAGES)
    # Here and not above, because it needs those packages.
    from keras_dfp.training.workers import joined

    if compare and statistics is None:
        raise click.UsageError("--compare needs --statistics N, which says in which steps.")
    how = checkpoint_steps, statistics, compare, stop_on_nonfinite
    with joined(worker_timeout) as workers, ExitStack() as stack:
        _train(workers, stack, output, resume, *how, **options)


def _train(
    workers: Workers,
    stack: ExitStack,
    output: Path | None,
    resume: bool,
    checkpoint_steps: int,
    statistics: int | None,
    compare: tuple[str, ...],
    stop_on_nonfinite: bool,
    **options,
) -> None:
    from keras_dfp.policy import DFPPolicy
    from keras_dfp.statistics import NonFiniteError
    from keras_dfp.training import checkpoint
    from keras_dfp.training.policies import policy
    from keras_dfp.training.run import Run

    this = settings(**options)
    if statistics is not None and not isinstance(policy(this.policy), DFPPolicy):
        raise click.UsageError(
            f"--statistics looks at layers on integers; under {this.policy} there are none."
        )
    output = output or Path("runs") / f"{this.network}-{this.policy.replace(':', '-')}"
    say = click.secho if workers.is_chief else lambda *_, **__: None
    if workers.is_chief and (output / "run.json").exists() and not resume:
        raise click.ClickException(
            f"{shown(output)} holds a run already. --resume goes on with it; --output chooses "
            "another folder."
        )
    data = this.find_data()
    steps = this.steps or this.epochs * (len(data[0]) // this.batch_size)
    if statistics is not None and 0 < steps < statistics:
        raise click.UsageError(
            f"--statistics {statistics} looks at every {statistics}th step, and the run has "
            f"{steps}: choose at most that."
        )
    if workers.is_chief:
        stack.enter_context(output_folder(output))
    run = Run(this, output, data, resume, workers, compare)
    if run.finished:
        say("It is finished already.")
    else:
        train_data, test_data = data
        say(
            f"Training {this.network} under {this.policy}: {len(train_data)} images of "
            f"{len(train_data.classes)} classes, {len(test_data)} to test on; "
            f"{run.epochs} epochs, {run.steps} steps"
            + (f", on {workers.count} workers" if workers.count > 1 else "")
            + (f", of which {run.progress.step} done" if run.progress.step else ""),
            bold=True,
        )
    if this.weights is not None and run.new_classifier:
        say(f"Its classifier is new: the weights of {shown(this.weights)} are for other classes.")
    try:
        run.train(checkpoint_steps, statistics, stop_on_nonfinite)
    except NonFiniteError as error:
        step = checkpoint.load(output / "checkpoint.npz")["step"]
        raise failure(
            f"Stopped: {error}. The checkpoint is of step {step}, from before; --resume goes on "
            "from there. Try a lower --lr."
        ) from error
    except KeyboardInterrupt:
        say(f"\nStopped after step {run.progress.step}; --resume goes on.", err=True)
        raise
    if run.progress.diverged:
        raise click.ClickException(
            f"The loss is no longer a number after step {run.progress.diverged}. Try a lower --lr."
        )
    result = run.progress.history[-1]
    say(
        f"\ntest top-1 {result['test_top1']:.2%}, top-5 {result['test_top5']:.2%}. "
        f"In {shown(output)}: model.keras, log.csv, tensorboard/"
    )
