"""`keras-dfp train`: the same training under several policies, side by side."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from pathlib import Path

import click
import keras

import keras_dfp
from keras_dfp import zoo
from keras_dfp.cli import lenet
from keras_dfp.cli.files import written_whole

POLICIES = ("float32", "dfp16", "dfp16_paper", "mixed_bfloat16")


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished training."""

    policy: str
    history: dict[str, list[float]]
    seconds: float


@click.command()
@click.argument("network", type=click.Choice(["lenet"]), default="lenet", metavar="[NETWORK]")
@click.option(
    "--policy",
    "policies",
    type=click.Choice(POLICIES),
    multiple=True,
    default=("float32", "dfp16"),
    show_default=True,
    help="Policy to train under; give it several times to compare.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=30, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    default=0.002,
    show_default=True,
    help="Adam's learning rate at the start; it falls to zero along a cosine.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=1, show_default=True)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/lenet"),
    show_default=True,
    help="Folder for curves.png and one POLICY.keras per policy.",
)
def train(
    network: str,
    policies: tuple[str, ...],
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    output: Path,
) -> None:
    """Train NETWORK from the same seed under each policy, and compare.

    NETWORK is lenet, the default: a small CNN on the 1,797 handwritten digits that come with
    scikit-learn. Prints a table; writes the trained models and their loss and accuracy curves.

    \b
    Examples:
      keras-dfp train
      keras-dfp train --policy dfp16_paper --epochs 10
      keras-dfp train lenet --policy float32 --policy dfp16 --seed 7 --output runs/seed7
    """
    require("matplotlib", "sklearn")
    make_folder(output)
    train_data, test_data = lenet.digits()
    runs = []
    for policy in dict.fromkeys(policies):
        click.secho(f"\nTraining {network} under {policy}", bold=True)
        keras.utils.set_random_seed(seed)
        model = zoo.load(network, policy=policy, classifier_activation=None)
        steps = epochs * -(-len(train_data[0]) // batch_size)
        model.compile(
            keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(lr, steps)),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        start = time.perf_counter()
        history = model.fit(
            *train_data,
            batch_size=batch_size,
            epochs=epochs,
            validation_data=test_data,
            # A progress bar draws over itself, which only a terminal understands.
            verbose=1 if sys.stdout.isatty() else 2,
        )
        runs.append(Run(policy, history.history, time.perf_counter() - start))
        with written_whole(output / f"{policy}.keras") as path:
            model.save(path)
    with written_whole(output / "curves.png") as path:
        plot(runs, path)
    click.echo(f"\n{table(runs)}\n\nWritten to {output}: curves.png, ", nl=False)
    click.echo(", ".join(f"{run.policy}.keras" for run in runs))


def require(*packages: str) -> None:
    """Fails, before the work, if an optional package is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise click.ClickException(
            f"train needs {' and '.join(missing)}. Install: pip install 'keras-dfp[train]'"
        )


def make_folder(path: Path) -> None:
    """Makes a folder to write to; says so before the work if that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with written_whole(path / ".writable") as temporary:
            temporary.touch()
        (path / ".writable").unlink()
    except OSError as error:
        raise click.ClickException(f"Cannot write to --output {path}: {error.strerror}") from error


def table(runs: list[Run]) -> str:
    """Returns the results of the runs, one line each."""
    lines = [
        f"{'policy':15}{'epochs':>6}{'train loss':>12}{'test accuracy':>15}{'seconds':>9}  kernel"
    ]
    for run in runs:
        loss, accuracy = run.history["loss"][-1], run.history["val_accuracy"][-1]
        kernel = keras_dfp.info()["isa"] if run.policy.startswith("dfp") else "TensorFlow"
        lines.append(
            f"{run.policy:15}{len(run.history['loss']):6}{loss:12.4f}{accuracy:15.2%}"
            f"{run.seconds:9.1f}  {kernel}"
        )
    return "\n".join(lines)


def plot(runs: list[Run], path: Path) -> None:
    """Draws the loss and the accuracy of the runs over the epochs into one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for number, run in enumerate(runs):
        for axes, metric in ((loss, "loss"), (accuracy, "accuracy")):
            for prefix, data, style in (("", "train", "--"), ("val_", "test", "-")):
                values = run.history[prefix + metric]
                epochs = range(1, len(values) + 1)
                label = f"{run.policy}, {data}"
                axes.plot(epochs, values, style, color=f"C{number}", label=label)
    loss.set(title="Loss", xlabel="epoch", yscale="log")
    accuracy.set(title="Accuracy", xlabel="epoch")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
