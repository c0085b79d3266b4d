"""The network of a run, and what is done to it: a step of training, a step of testing."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dfp import exchange, zoo
from keras_dfp.files import check_file, shown
from keras_dfp.layers import LocalResponseNormalization
from keras_dfp.model_policy import set_model_policy
from keras_dfp.optimizers import DFPSGD, DFPAdam
from keras_dfp.policy import DFPPolicy
from keras_dfp.recipe import Recipe
from keras_dfp.training.errors import DataError, RunError
from keras_dfp.training.pipeline import Pipeline
from keras_dfp.training.policies import policy
from keras_dfp.training.settings import Settings
from keras_dfp.training.sources import Source
from keras_dfp.training.workers import Workers, alone

Step = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
# The layer that tells the classes apart, in every network of the zoo.
CLASSIFIER = "predictions"


class Stopped(Exception):
    """The user wants it to stop."""


def build(
    settings: Settings, input_shape: tuple[int, int, int], classes: int, training: bool = True
) -> keras.Model:
    """Returns the network of a run, untrained.

    Args:
        settings: The run's.
        input_shape: Height, width and channels of an image.
        classes: Number of classes.
        training: `True`: its output are logits, and those of the auxiliary classifiers where the
            recipe has them. `False`: probabilities.

    Raises:
        RunError: If the images are too small for it, say.
    """
    options: dict[str, Any] = {"classifier_activation": None} if training else {}
    if training and settings.recipe.auxiliary_weight:
        options["auxiliary"] = True
    try:
        return _load(settings, input_shape=input_shape, classes=classes, **options)
    # The others: it would be too large. (A worker that ends meanwhile is another error.)
    except (
        ValueError,
        OverflowError,
        MemoryError,
        tf.errors.InvalidArgumentError,
        tf.errors.ResourceExhaustedError,
    ) as error:
        raise RunError(
            f"Cannot build {settings.network} for images of {input_shape}: {error}"
        ) from error


def pretrained(settings: Settings) -> keras.Model:
    """Returns the network with weights from elsewhere, to be tested: its outputs are logits.

    Args:
        settings: Say which network, which weights, and its policy.

    Raises:
        RunError: If there are no such weights, or they do not fit.
    """
    try:
        return _load(settings, weights=settings.weights, classifier_activation=None)
    except (ValueError, OSError) as error:
        raise RunError(str(error)) from error


def start_from(weights: str, model: keras.Model, settings: Settings) -> bool:
    """Gives a network, of what `build` returns, weights to start from.

    Auxiliary classifiers stay as they are, and so does the classifier if the weights are for
    another number of classes.

    Args:
        weights: As for `zoo.load`: `"imagenet"`, which may download them, or a file.
        model: The network.
        settings: Say which it is.

    Returns:
        Whether the classifier stayed as it was.

    Raises:
        RunError: If there are no such weights, or others than the classifier's do not fit.
    """
    main = keras.Model(model.inputs, model.outputs[0])
    try:
        if weights == "imagenet":
            source = zoo.load(settings.network, main.input_shape[1:], weights=weights)
        else:
            source = _partly_loaded(weights, main, settings)
    except (ValueError, OSError) as error:
        raise RunError(
            f"{settings.network} cannot start from the weights {shown(weights)!r}: {error}"
            f"{' Or choose a file: --weights FILE.' if weights == 'imagenet' else ''}"
        ) from error
    is_new = False
    layers = ([layer for layer in each.layers if _floats(layer)] for each in (main, source))
    for layer, theirs in zip(*layers, strict=True):
        mine = _floats(layer)
        arrays = [weight.numpy() for weight in _floats(theirs)]
        fits = [array.shape for array in arrays] == [tuple(weight.shape) for weight in mine]
        if fits and all(np.isfinite(array).all() for array in arrays):
            for weight, array in zip(mine, arrays, strict=True):
                weight.assign(array)
        elif layer.name == CLASSIFIER:
            is_new = True
        else:
            raise RunError(
                f"{settings.network} cannot start from the weights {shown(weights)!r}: they hold "
                f"none, none that fit, or NaN or infinity, for its layer {layer.name!r}; only "
                "those of the classifier may be missing, or for other classes."
            )
    return is_new


def freeze(model: keras.Model) -> None:
    """Leaves only the classifier of a network to be trained."""
    for layer in model.layers:
        layer.trainable = layer.name == CLASSIFIER


def synchronize(model: keras.Model) -> None:
    """Lets batch norm take its statistics over the images of all workers."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = True


def check_classes(model: keras.Model, source: Source) -> None:
    """Raises DataError if a source does not have as many classes as a model."""
    outputs = keras.tree.flatten(model.output_shape)[-1]
    if outputs != len(source.classes):
        raise DataError(
            f"The network tells {outputs} classes apart, but the data have {len(source.classes)}."
        )


def plain(model: keras.Model, settings: Settings) -> keras.Model:
    """Returns a trained network as `deployable` does, for use elsewhere.

    It is in FP32, of Keras's own layers only, and does not augment images, which some layers do
    unless they are told that this is no training: what an exported model is called with cannot.
    """

    def call(layer, *args, **kwargs):
        if isinstance(layer, LocalResponseNormalization):
            return layer.of_keras_ops(*args)
        training = inspect.signature(layer.call).parameters.get("training")
        if training is not None and training.default is True:
            kwargs["training"] = False
        return layer(*args, **kwargs)

    ours = deployable(model, dataclasses.replace(settings, policy="float32"))
    # Of a Sequential, Keras makes no clone with other calls.
    graph = keras.Model(ours.inputs[0], ours.outputs[0], name=ours.name)
    used = keras.models.clone_model(graph, call_function=call)
    used.set_weights(ours.get_weights())
    return used


def deployable(model: keras.Model, settings: Settings) -> keras.Model:
    """Returns a trained network as it is used: without auxiliary outputs, with probabilities."""
    main = keras.Model(model.inputs, model.outputs[0])
    used = build(settings, model.input_shape[1:], main.output_shape[-1], training=False)
    used.set_weights(main.get_weights())
    return used


def optimizer(recipe: Recipe) -> keras.Optimizer:
    """Returns the recipe's optimizer."""
    rate, options = recipe.schedule.learning_rate, recipe.optimizer
    momentum: dict[str, Any] = {"momentum": options.momentum, "nesterov": options.nesterov}
    match options.name:
        case "adam":
            return keras.optimizers.Adam(rate)
        case "dfp_adam":
            return DFPAdam(rate, slots=options.slots)
        case "dfp_sgd":
            return DFPSGD(rate, slots=options.slots, **momentum)
    return keras.optimizers.SGD(rate, **momentum)


def train_step(
    model: keras.Model,
    optimizer: keras.Optimizer,
    recipe: Recipe,
    label_smoothing: float,
    workers: Workers | None = None,
    gradient_exchange: str = "float32",
) -> Callable[..., tf.Tensor]:
    """Returns the function that trains a model on a batch.

    Args:
        model: What `build` returns.
        optimizer: What `optimizer` returns.
        recipe: Says how many images are in a batch, how much the auxiliary losses count, and the
            weight decay, which is added to the gradients of kernels before the momentum, as in the
            solvers of the papers.
        label_smoothing: Share of a label that is spread over all classes.
        workers: Who shares the batch: each calls the function with its images.
        gradient_exchange: As for `exchange.summed`.

    Returns:
        A function from images, labels and a number to what `_sums` returns of the whole batch,
        followed by the sum of all workers' numbers.
    """
    workers = workers or alone()
    several = workers.count > 1
    batch = recipe.batch_size if several else None
    weights = model.trainable_variables
    decay = recipe.optimizer.weight_decay
    if several:
        exchange.leave_as_they_are(optimizer)

    def share(images, labels, note):
        with tf.GradientTape() as tape:
            logits, *auxiliary = _logits(model(images, training=True))
            loss = total = _loss(logits, labels, label_smoothing, batch)
            for other in auxiliary:
                total += recipe.auxiliary_weight * _loss(other, labels, label_smoothing, batch)
        gradients = tape.gradient(total, [weight.value for weight in weights])
        sums = tf.concat([_sums(loss, logits, labels, batch), [note]], 0)
        *gradients, sums = exchange.summed(gradients, gradient_exchange, [sums])
        if decay:
            gradients = [
                gradient + decay * weight if is_kernel(weight) else gradient
                for gradient, weight in zip(gradients, weights, strict=True)
            ]
        optimizer.apply(gradients, weights)
        return sums

    @tf.function(autograph=False)
    def step(images, labels, note=0.0):
        return workers.strategy.run(share, args=(images, labels, note))

    return step


def test_step(model: keras.Model) -> Step:
    """Returns the function that tests a model: from images and labels to what `_sums` returns."""
    images = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32)

    @tf.function(autograph=False, input_signature=[images, tf.TensorSpec([None], tf.int32)])
    def step(images, labels):
        logits = _logits(model(images, training=False))[0]
        return _sums(_loss(logits, labels), logits, labels)

    return step


def evaluate(step: Step, pipeline: Pipeline, interrupted: Sequence = ()) -> dict[str, float]:
    """Returns loss, top-1 and top-5 accuracy over all images of a pipeline, those of all workers.

    Args:
        step: What `test_step` returns.
        pipeline: The images.
        interrupted: Not empty when the user wants it to stop.

    Raises:
        Stopped: If it is not empty, in any of the workers.
    """
    several = pipeline.workers.count > 1
    sums = np.zeros(5)
    for images, labels in pipeline.evaluation():
        sums[:4] += step(images, labels).numpy()
        if interrupted and not several:
            raise Stopped
    sums[4] = bool(interrupted)
    everyone = [np.frombuffer(each) for each in pipeline.workers.gathered(sums.tobytes())]
    sums = np.sum(everyone, axis=0)
    if sums[4] and several:
        raise Stopped
    loss, top1, top5 = (sums[:3] / sums[3]).tolist()
    return {"loss": loss, "top1": top1, "top5": top5}


def is_kernel(weight: keras.Variable) -> bool:
    """Tells what weight decay is for: what multiplies; not biases, not batch norm."""
    return weight.name.endswith("kernel")


def _partly_loaded(weights: str, main: keras.Model, settings: Settings) -> keras.Model:
    """Returns the network with the weights of a file; what the file has not, or not so, is NaN."""
    check_file(Path(weights))
    classes = main.output_shape[-1]
    source = zoo.load(settings.network, main.input_shape[1:], classes, policy="float32")
    for weight in _floats(source):
        weight.assign(np.full(weight.shape, np.nan))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            source.load_weights(weights, skip_mismatch=True)
        # What Keras raises depends on what is wrong with the file.
        except Exception as error:
            raise ValueError(f"it cannot be read: {error}") from error
    return source


def _floats(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns the weights of a layer; not the states of its random numbers, which are the run's."""
    return [weight for weight in layer.weights if keras.backend.is_float_dtype(weight.dtype)]


def _load(settings: Settings, **options) -> keras.Model:
    chosen = policy(settings.policy)
    model = zoo.load(settings.network, policy=chosen, **options)
    if isinstance(chosen, DFPPolicy):
        # Settles which are the first convolution and the last dense layer, if they are apart.
        set_model_policy(model, chosen)
    return model


def _logits(outputs) -> list[tf.Tensor]:
    return [tf.cast(output, tf.float32) for output in keras.tree.flatten(outputs)]


def _loss(
    logits: tf.Tensor, labels: tf.Tensor, smoothing: float = 0.0, batch: int | None = None
) -> tf.Tensor:
    """Returns the mean cross-entropy of a batch; its share of the mean over a larger `batch`."""
    targets = tf.one_hot(labels, logits.shape[-1])
    if smoothing:
        targets = targets * (1 - smoothing) + smoothing / logits.shape[-1]
    losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
    return tf.reduce_mean(losses) if batch is None else tf.reduce_sum(losses) / batch


def _sums(
    loss: tf.Tensor, logits: tf.Tensor, labels: tf.Tensor, batch: int | None = None
) -> tf.Tensor:
    """Returns loss, top-1 hits, top-5 hits and images of a batch; `loss` is that of `_loss`."""
    images = tf.cast(tf.shape(labels)[0], tf.float32)
    hits = [
        tf.reduce_sum(tf.cast(tf.math.in_top_k(labels, logits, k), tf.float32))
        for k in (1, min(5, logits.shape[-1]))
    ]
    return tf.stack([loss * (images if batch is None else batch), *hits, images])
