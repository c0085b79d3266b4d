"""The networks, data for them, and the layers of them that multiply."""

from __future__ import annotations

import collections
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_dfp import zoo
from keras_dfp.policy import policy_scope

WORDS = 20_000  # that tokens stand for


# ---- small ones ----------------------------------------------------------------------------------


def _dense() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(1024, "relu"),
            keras.layers.Dense(1024, "relu"),
            keras.layers.Dense(10, "softmax"),
        ]
    )


def _convnet() -> keras.Model:
    # Of Keras's example "Simple MNIST convnet".
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(10, "softmax"),
        ]
    )


def _lstm() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((100,), dtype="int32"),
            keras.layers.Embedding(WORDS, 128),
            keras.layers.LSTM(128),
            keras.layers.Dense(1, "sigmoid"),
        ]
    )


class TokenAndPositionEmbedding(keras.layers.Layer):
    """The sum of what a token is embedded as and what its place is."""

    def __init__(self, length: int, width: int):
        super().__init__()
        self.token = keras.layers.Embedding(WORDS, width)
        self.position = keras.layers.Embedding(length, width)

    def call(self, tokens):
        return self.token(tokens) + self.position(keras.ops.arange(tokens.shape[-1]))


def _transformer() -> keras.Model:
    tokens = keras.Input((64,), dtype="int32")
    x = TokenAndPositionEmbedding(64, 128)(tokens)
    for _ in range(2):
        y = keras.layers.MultiHeadAttention(num_heads=4, key_dim=32)(x, x)
        x = keras.layers.LayerNormalization()(keras.layers.Add()([x, y]))
        y = keras.layers.Dense(512, "relu")(x)
        y = keras.layers.Dense(128)(y)
        x = keras.layers.LayerNormalization()(keras.layers.Add()([x, y]))
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, keras.layers.Dense(10, "softmax")(x))


# ---- all of them ---------------------------------------------------------------------------------


class Network(NamedTuple):
    """How to build a network, and what to measure it with unless told otherwise.

    Attributes:
        build: Returns it untrained; takes `input_shape` if it is for images of any size.
        batch: Samples in a batch.
        image_size: Height and width of its colour images; None if its input has a fixed shape.
    """

    build: Callable[..., keras.Model]
    batch: int = 32
    image_size: int | None = 224


# GoogLeNet comes without its auxiliary classifiers.
NETWORKS = {
    "resnet50": Network(partial(zoo.load, "resnet50")),
    "vgg16": Network(partial(zoo.load, "vgg16"), 16),
    "googlenet_v1": Network(partial(zoo.load, "googlenet_v1")),
    "alexnet": Network(partial(zoo.load, "alexnet"), 32, 227),
    "mobilenet_v2": Network(partial(keras.applications.MobileNetV2, weights=None)),
    "resnet20": Network(partial(zoo.load, "resnet20"), 128, 32),
    "densenet121": Network(partial(keras.applications.DenseNet121, weights=None), 8),
    "efficientnet_b0": Network(partial(keras.applications.EfficientNetB0, weights=None), 16),
    "dense": Network(_dense, 256, None),
    "convnet": Network(_convnet, 128, None),
    "lstm": Network(_lstm, 64, None),
    "transformer": Network(_transformer, 64, None),
}
# Those of images of any size.
OF_IMAGES = tuple(name for name, network in NETWORKS.items() if network.image_size)
# What "all" stands for.
ALL = ("resnet50", "vgg16", "googlenet_v1", "alexnet", "mobilenet_v2")


def build(network: str, image_size: int | None, policy: str = "float32") -> keras.Model:
    """Returns an untrained network; `image_size` is None if its input has a fixed shape."""
    shape = {"input_shape": (image_size, image_size, 3)} if image_size else {}
    with policy_scope(policy):
        return NETWORKS[network].build(**shape)


def data(model: keras.Model, batch: int) -> tuple[tf.Tensor, tf.Tensor, keras.losses.Loss]:
    """Returns random inputs of a network, random targets, and the loss between its outputs and
    these."""
    (inputs,) = model.inputs
    shape, classes = (batch, *inputs.shape[1:]), model.output_shape[-1]
    if inputs.dtype == "int32":
        x = tf.random.uniform(shape, maxval=WORDS, dtype=tf.int32)
    else:
        x = tf.random.normal(shape)
    # A single output is the probability of the second of two classes.
    y = tf.random.uniform([batch], maxval=max(classes, 2), dtype=tf.int32)
    if classes == 1:
        return x, y[:, None], keras.losses.BinaryCrossentropy()
    return x, y, keras.losses.SparseCategoricalCrossentropy()


# ---- their layers --------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A layer that multiplies, without its batch size.

    Attributes:
        kind: "conv", "grouped", "depthwise" or "dense".
        x: Shape of its input: height, width and channels, or features.
        w: Shape of its kernel.
        strides: Of a convolution.
        padding: Of a convolution: "VALID" or "SAME".
    """

    kind: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    strides: tuple[int, int] = (1, 1)
    padding: str = "VALID"

    def __str__(self) -> str:
        if self.kind == "dense":
            return f"{self.w[0]} -> {self.w[1]}"
        height, width, channels = self.x
        text = f"{height}x{width}x{channels} {self.w[0]}x{self.w[1]}/{self.strides[0]}"
        if self.kind == "depthwise":
            return f"{text} depthwise"
        groups = channels // self.w[2]
        return f"{text} -> {self.w[3]}" + (f", {groups} groups" if groups > 1 else "")


def layers(network: str, image_size: int) -> collections.Counter[Layer]:
    """Returns how often each layer that multiplies occurs, in the network's order."""
    found = [_layer(layer) for layer in build(network, image_size).layers]
    return collections.Counter(layer for layer in found if layer is not None)


def _layer(layer: keras.Layer) -> Layer | None:
    if isinstance(layer, keras.layers.Dense):
        return Layer("dense", layer.input.shape[1:], tuple(layer.kernel.shape))
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        kind = "depthwise"
    elif isinstance(layer, keras.layers.Conv2D):
        kind = "grouped" if layer.groups > 1 else "conv"
    else:
        return None
    return Layer(
        kind, layer.input.shape[1:], tuple(layer.kernel.shape), layer.strides, layer.padding.upper()
    )
