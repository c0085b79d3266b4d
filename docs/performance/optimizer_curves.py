"""Loss curves of Keras's SGD and Adam against keras-dfp's, which the page about speed shows.

    python docs/performance/optimizer_curves.py

Trains LeNet on scikit-learn's handwritten digits under dfp16, for each seed from equal weights on
equal batches; prints a table, and draws training losses into optimizer_curves.png beside this file.
"""

from pathlib import Path

import click
import keras
import numpy as np
from matplotlib.figure import Figure

from keras_dfp import zoo
from keras_dfp.files import written_whole
from keras_dfp.optimizers import DFPSGD, DFPAdam
from keras_dfp.training.sources import digits

EPOCHS, BATCH, SHOWN = 12, 32, (1, 3, 6, 12)
SGD, ADAM = {"learning_rate": 0.05, "momentum": 0.9}, {"learning_rate": 0.002}
# By panel of the plot.
OPTIMIZERS = {
    "SGD 0.05, momentum 0.9": {
        "Keras's SGD": lambda: keras.optimizers.SGD(**SGD),
        "DFPSGD": lambda: DFPSGD(**SGD),
        'DFPSGD, `slots="dfp16"`': lambda: DFPSGD(**SGD, slots="dfp16"),
    },
    "Adam 0.002": {
        "Keras's Adam": lambda: keras.optimizers.Adam(**ADAM),
        "DFPAdam": lambda: DFPAdam(**ADAM),
        'DFPAdam, `slots="dfp16"`': lambda: DFPAdam(**ADAM, slots="dfp16"),
    },
}


@click.command(help=__doc__.split("\n")[0])
@click.option("--seeds", type=click.IntRange(min=2), default=3, show_default=True)
@click.option("--output", type=Path, default=Path(__file__).with_suffix(".png"))
def main(seeds: int, output: Path) -> None:
    training, test = ((d.images.numpy() / 255.0, d.labels.numpy()) for d in digits())
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(OPTIMIZERS), sharey=True)
    print("| | " + " | ".join(map(str, SHOWN)) + " | test accuracy |", "|---" + "|---:" * 5 + "|",
          sep="\n")  # fmt: skip
    for axes, (title, optimizers) in zip(panels, OPTIMIZERS.items(), strict=True):
        for (name, make), dashes in zip(optimizers.items(), ("-", "--", ":"), strict=True):
            runs = [train(make, seed, training, test) for seed in range(seeds)]
            losses, accuracies = zip(*runs, strict=True)
            mean, spread = np.mean(losses, axis=0), np.std(losses, axis=0, ddof=1)
            cells = [name, *(f"{mean[e - 1]:.3f} ± {spread[e - 1]:.3f}" for e in SHOWN)]
            cells.append(f"{np.mean(accuracies):.1%} ± {100 * np.std(accuracies, ddof=1):.1f}")
            print(f"| {' | '.join(cells)} |", flush=True)
            x = range(1, EPOCHS + 1)
            axes.plot(x, mean, dashes, label=name.replace("`", ""))
            axes.fill_between(x, np.min(losses, axis=0), np.max(losses, axis=0), alpha=0.15, lw=0)
        axes.set(title=title, xlabel="epoch", yscale="log")
        axes.legend()
    panels[0].set(ylabel="training loss")
    with written_whole(output) as path:
        figure.savefig(path, dpi=120)


def train(make, seed, training, test) -> tuple[list[float], float]:
    """Returns the training loss of each epoch, and the accuracy on the test images at the end."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = zoo.load("lenet", policy="dfp16")
    model.compile(make(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(*training, batch_size=BATCH, epochs=EPOCHS, verbose=0).history
    return history["loss"], model.evaluate(*test, verbose=0)[1]


if __name__ == "__main__":
    main()
