"""How far gradients under a policy are from float32's, at the weights that a run has reached.

    python docs/accuracy/gradients.py runs/resnet20-float32 --policy dfp16 --batches 30

For each kernel, in per cent of the gradient's norm (root mean square over the batches):

    batch       how far one batch's gradient is from the mean over batches
    error       how far it is from float32's on the same batch
    mean        the error of the gradient's mean over all batches, of the norm of that mean,
    no bias     and what it would be if the errors of batches had no direction in common
"""

from pathlib import Path

import click
import numpy as np
import tensorflow as tf

from keras_dfp import zoo
from keras_dfp.training import network
from keras_dfp.training.pipeline import Pipeline
from keras_dfp.training.run import load


@click.command(help=__doc__.split("\n")[0])
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--policy", default="dfp16", show_default=True)
@click.option("--batches", type=click.IntRange(min=2), default=30, show_default=True)
def main(run: Path, policy: str, batches: int) -> None:
    settings, model = load(run, policy="float32")
    exact, rounded = gradient_of(model), gradient_of(load(run, policy=policy)[1])
    source, _ = settings.find_data()
    pipeline = Pipeline(
        source, settings.recipe.images, settings.batch_size, zoo.preprocessing(settings.network)
    )
    weights = model.trainable_variables
    kernels = [i for i, weight in enumerate(weights) if network.is_kernel(weight)]
    gradients, errors = [], []
    for _, (images, labels) in zip(
        range(batches), pipeline.training(seed=0, epoch=0), strict=False
    ):
        ours, theirs = rounded(images, labels), exact(images, labels)
        gradients.append([theirs[i].numpy().ravel() for i in kernels])
        errors.append([(ours[i] - theirs[i]).numpy().ravel() for i in kernels])
    print(f"{'kernel':32}{'batch':>8}{'error':>8}{'mean':>8}{'no bias':>8}")
    for i, gradient, error in zip(
        kernels, zip(*gradients, strict=True), zip(*errors, strict=True), strict=True
    ):
        mean = np.mean(gradient, axis=0)
        size, off = rms(gradient), rms(error)
        figures = (
            rms(gradient - mean) / size,
            off / size,
            np.linalg.norm(np.mean(error, axis=0)) / np.linalg.norm(mean),
            off / batches**0.5 / np.linalg.norm(mean),
        )
        print(f"{weights[i].path:32}" + "".join(f"{figure:8.2%}" for figure in figures))


def gradient_of(model):
    """Returns the function from a batch to the gradient of its mean loss."""

    @tf.function(autograph=False)
    def gradient(images, labels):
        with tf.GradientTape() as tape:
            logits = network._logits(model(images, training=True))[0]
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return tape.gradient(loss, [weight.value for weight in model.trainable_variables])

    return gradient


def rms(vectors) -> float:
    """Returns the root mean square of the norms of vectors."""
    return float(np.sqrt(np.mean(np.sum(np.square(vectors), axis=1))))


if __name__ == "__main__":
    main()
