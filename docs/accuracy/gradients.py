"""How far gradients under a policy are from float32's, at the weights that a run has reached.

    python docs/accuracy/gradients.py runs/resnet20-float32 --policy dfp16 --batches 200

For each kernel, over batches of the training data:

    signal      the norm of the expected gradient, of that of a batch: the rest is chance
    error       how far a batch's gradient is from float32's, of float32's
    bias        the norm of the expected error, of the expected gradient
    along       how much longer (or, below zero, shorter) it makes the expected gradient

Norms of expectations are estimated without a bias of their own, from products of different batches;
an estimate of a square that came out below zero is printed as 0.
"""

import itertools
from pathlib import Path

import click
import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from keras_dfp import zoo
from keras_dfp.training import network
from keras_dfp.training.pipeline import Pipeline
from keras_dfp.training.run import load


@click.command(help=__doc__.split("\n")[0])
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--policy", default="dfp16", show_default=True)
@click.option("--batches", type=click.IntRange(min=2), default=200, show_default=True)
def main(run: Path, policy: str, batches: int) -> None:
    settings, model = load(run, policy="float32")
    exact, rounded = gradients_of(model), gradients_of(load(run, policy=policy)[1])
    source, _ = settings.find_data()
    pipeline = Pipeline(
        source, settings.recipe.images, settings.batch_size, zoo.preprocessing(settings.network)
    )
    batches = min(batches, pipeline.steps)
    kernels = [weight for weight in model.trainable_variables if network.is_kernel(weight)]
    moments = [Moments() for _ in kernels]
    some = itertools.islice(pipeline.training(seed=0, epoch=0), batches)
    for batch in tqdm(some, total=batches, disable=None):
        for moment, g, other in zip(moments, exact(*batch), rounded(*batch), strict=True):
            # Auxiliary classifiers have no part in the loss.
            if g is not None:
                moment.add(g.numpy().ravel(), other.numpy().ravel() - g.numpy().ravel())
    print(f"{'kernel':36}{'signal':>9}{'error':>9}{'bias':>9}{'along':>9}")
    for kernel, moment in zip(kernels, moments, strict=True):
        if moment.count:
            print(f"{kernel.path:36}" + "".join(f"{f:9.2%}" for f in moment.figures()))


class Moments:
    """Sums over batches, of gradients g and of errors e."""

    def __init__(self):
        self.count = 0
        self.g, self.e, self.gg, self.ee, self.eg = 0.0, 0.0, 0.0, 0.0, 0.0

    def add(self, g: np.ndarray, e: np.ndarray) -> None:
        g, e = g.astype(np.float64), e.astype(np.float64)
        self.count += 1
        self.g, self.e = self.g + g, self.e + e
        self.gg, self.ee, self.eg = self.gg + g @ g, self.ee + e @ e, self.eg + e @ g

    def figures(self) -> tuple[float, float, float, float]:
        """Returns signal, error, bias and along."""
        pairs = self.count * (self.count - 1)
        gg = max((self.g @ self.g - self.gg) / pairs, 0.0) or float("nan")
        ee = max((self.e @ self.e - self.ee) / pairs, 0.0)
        eg = (self.e @ self.g - self.eg) / pairs
        size = self.gg / self.count
        return (gg / size) ** 0.5, (self.ee / self.gg) ** 0.5, (ee / gg) ** 0.5, eg / gg


def gradients_of(model):
    """Returns the function from a batch to the gradients of its mean loss, of all kernels."""
    kernels = [weight.value for weight in model.trainable_variables if network.is_kernel(weight)]

    @tf.function(autograph=False)
    def gradients(images, labels):
        with tf.GradientTape() as tape:
            logits = keras.tree.flatten(model(images, training=True))[0]
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(loss)
        return tape.gradient(loss, kernels)

    return gradients


if __name__ == "__main__":
    main()
