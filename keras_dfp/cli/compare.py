"""`keras-dfp compare`: the same training under several policies, from equal beginnings."""

from __future__ import annotations

import itertools
from pathlib import Path

import click

from keras_dfp.cli.options import (
    PACKAGES,
    POLICY_HELP,
    ListType,
    PolicyType,
    output_folder,
    require,
    settings,
    settings_options,
)
from keras_dfp.files import locked, shown


@click.command()
@settings_options
@click.option(
    "--policies",
    type=ListType(PolicyType()),
    default="float32,dfp16",
    show_default=True,
    help=f"Separated by commas; the others are compared with the first. {POLICY_HELP}",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Train under each policy with the seeds 1 to N.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the runs and results.  [default: runs/NETWORK]",
)
def compare(
    policies: list[str], seeds: int, output: Path | None, checkpoint_steps: int, **options
) -> None:
    """Train NETWORK under several policies and compare them.

    NETWORK and the options are those of `keras-dfp train`. For each seed, every policy starts from
    the same weights and sees the same batches in the same order. Prints a table; writes
    results.md, results.csv, results.json and curves.png, anew after every run.

    The same command again goes on where it stopped: finished runs are kept, so a study can be made
    in parts, and --policies and --seeds may grow. For that, results.json is enough: the folders of
    finished runs may be deleted.

    \b
    Examples:
      keras-dfp compare
      keras-dfp compare resnet20 --data cifar10 --epochs 10 --seeds 5
      keras-dfp compare resnet20 --data cifar10 --epochs 10 --output runs/bits \\
          --policies float32,dfp16,dfp16:mantissa_bits=10,dfp16:mantissa_bits=8
    """
    require(*PACKAGES)
    # Here and not above, because it needs those packages.
    from keras_dfp.training import comparison
    from keras_dfp.training.log import Pace

    this = settings(**options)
    output = output or Path("runs") / this.network
    data = this.find_data()
    with output_folder(output), locked(output):
        results = comparison.kept(output, this, data)
        wanted = list(itertools.product(range(1, seeds + 1), policies))
        pace = Pace(sum((policy, seed) not in results for seed, policy in wanted))
        for number, (seed, policy) in enumerate(wanted, 1):
            known = (policy, seed) in results
            run = None if known else comparison.start(this, policy, seed, output, data)
            left = (
                "finished already"
                if run is None or run.finished
                else f"{run.epochs} epochs, {run.steps} steps"
            )
            if pace.done and not known:
                left += f"; all runs: about {pace.left} left"
            click.secho(
                f"{this.network} under {policy}, seed {seed} ({number} of {len(wanted)}): {left}",
                bold=True,
            )
            if run is None:
                continue
            try:
                run.train(checkpoint_steps)
            except KeyboardInterrupt:
                click.echo("\nStopped; the same command goes on.", err=True)
                raise
            if run.progress.diverged:
                click.echo(f"The loss is no longer a number after step {run.progress.diverged}.")
            pace.update(1)
            results[policy, seed] = comparison.Result.of(run)
            comparison.write(output, this, data, _in_order(results, policies))
        table = comparison.write(output, this, data, _in_order(results, policies))
    click.echo(
        f"\n{table}\n\nIn {shown(output)}: curves.png, results.md, results.csv, results.json"
    )


def _in_order(results: dict, policies: list[str]) -> list:
    """The policies asked for first; what is there of others is kept."""
    names = list(dict.fromkeys((*policies, *(policy for policy, _ in results))))
    return [results[key] for key in sorted(results, key=lambda k: (names.index(k[0]), k[1]))]
