"""The networks, and the layers of them that multiply."""

from __future__ import annotations

import collections
from typing import NamedTuple

import keras

from keras_dfp import zoo
from keras_dfp.policy import policy_scope

NETWORKS = ("resnet50", "vgg16", "googlenet_v1", "alexnet", "mobilenet_v2")
BATCHES = {"vgg16": 16}  # elsewhere 32
IMAGE_SIZES = {"alexnet": 227}  # elsewhere 224


def build(network: str, image_size: int, policy: str = "float32") -> keras.Model:
    """Returns an untrained network for square colour images and 1,000 classes.

    GoogLeNet comes without its auxiliary classifiers.
    """
    shape = (image_size, image_size, 3)
    if network in zoo.list():
        return zoo.load(network, input_shape=shape, policy=policy)
    with policy_scope(policy):
        return keras.applications.MobileNetV2(weights=None, input_shape=shape)


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
