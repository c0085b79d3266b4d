"""ResNet-20 for CIFAR: He et al., *Deep Residual Learning for Image Recognition*, 2015
(arXiv 1512.03385), section 4.2, with the parameter-free shortcuts used there (option A).
"""

from __future__ import annotations

import keras
from keras import layers, ops


def build(
    input_shape: tuple[int, int, int] = (32, 32, 3),
    classes: int = 10,
    classifier_activation: str | None = "softmax",
) -> keras.Model:
    """Returns the network, under the current dtype policy.

    Args:
        input_shape: Height, width and channels of an image, channels last; any size.
        classes: Number of classes.
        classifier_activation: `"softmax"` for probabilities, `None` for logits.
    """
    inputs = keras.Input(input_shape)
    x = convolution(inputs, 16, name="conv1")
    x = layers.BatchNormalization(name="conv1_bn")(x)
    x = layers.ReLU(name="conv1_relu")(x)
    for stage, filters in enumerate((16, 32, 64), start=2):
        for number in range(1, 4):
            strides = 2 if stage > 2 and number == 1 else 1
            x = block(x, filters, strides, name=f"conv{stage}_block{number}")
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    x = layers.Dense(
        classes,
        activation=classifier_activation,
        kernel_initializer="he_normal",
        name="predictions",
    )(x)
    return keras.Model(inputs, x, name="resnet20")


def block(x: keras.KerasTensor, filters: int, strides: int, name: str) -> keras.KerasTensor:
    """Two 3x3 convolutions, and a shortcut around them."""
    shortcut = x
    if strides > 1:
        # Every other pixel, and zeros for the channels that are new.
        shortcut = layers.MaxPooling2D(1, strides, name=f"{name}_subsample")(shortcut)
        new = filters - x.shape[-1]
        shortcut = ops.pad(shortcut, [[0, 0], [0, 0], [0, 0], [new // 2, new - new // 2]])
    x = convolution(x, filters, strides, name=f"{name}_1_conv")
    x = layers.BatchNormalization(name=f"{name}_1_bn")(x)
    x = layers.ReLU(name=f"{name}_1_relu")(x)
    x = convolution(x, filters, name=f"{name}_2_conv")
    x = layers.BatchNormalization(name=f"{name}_2_bn")(x)
    x = layers.Add(name=f"{name}_add")([shortcut, x])
    return layers.ReLU(name=f"{name}_out")(x)


def convolution(
    x: keras.KerasTensor, filters: int, strides: int = 1, *, name: str
) -> keras.KerasTensor:
    """A 3x3 convolution without bias, because batch norm follows."""
    return layers.Conv2D(
        filters,
        3,
        strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=name,
    )(x)
