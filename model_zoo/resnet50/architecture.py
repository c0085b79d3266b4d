"""ResNet-50: He et al., *Deep Residual Learning for Image Recognition*, 2015 (arXiv 1512.03385).

Layer for layer, by name and by order of weights, `keras.applications.ResNet50`, so weight files of
one load into the other. Only the initial weights differ: they are those of the training recipe.
"""

from __future__ import annotations

import keras
from keras import layers


def build(
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    classifier_activation: str | None = "softmax",
) -> keras.Model:
    """Returns the network, under the current dtype policy.

    Args:
        input_shape: Height, width and channels of an image, channels last; from 32x32 it is not
            all padding.
        classes: Number of classes.
        classifier_activation: `"softmax"` for probabilities, `None` for logits.
    """
    inputs = keras.Input(input_shape)
    x = layers.ZeroPadding2D(3, name="conv1_pad")(inputs)
    x = convolution(x, 64, 7, strides=2, name="conv1_conv")
    x = normalization(x, name="conv1_bn")
    x = layers.Activation("relu", name="conv1_relu")(x)
    x = layers.ZeroPadding2D(1, name="pool1_pad")(x)
    x = layers.MaxPooling2D(3, strides=2, name="pool1_pool")(x)

    x = stack(x, 64, blocks=3, strides=1, name="conv2")
    x = stack(x, 128, blocks=4, strides=2, name="conv3")
    x = stack(x, 256, blocks=6, strides=2, name="conv4")
    x = stack(x, 512, blocks=3, strides=2, name="conv5")

    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    x = layers.Dense(
        classes,
        activation=classifier_activation,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        name="predictions",
    )(x)
    return keras.Model(inputs, x, name="resnet50")


def stack(
    x: keras.KerasTensor, filters: int, blocks: int, strides: int, name: str
) -> keras.KerasTensor:
    """Blocks of one resolution; the first reduces it and projects its shortcut."""
    x = block(x, filters, strides, project=True, name=f"{name}_block1")
    for number in range(2, blocks + 1):
        x = block(x, filters, 1, project=False, name=f"{name}_block{number}")
    return x


def block(
    x: keras.KerasTensor, filters: int, strides: int, project: bool, name: str
) -> keras.KerasTensor:
    """A bottleneck of 1x1, 3x3 and 1x1 convolutions, and a shortcut around it."""
    shortcut = x
    if project:
        shortcut = convolution(x, 4 * filters, 1, strides=strides, name=f"{name}_0_conv")
        shortcut = normalization(shortcut, name=f"{name}_0_bn")

    x = convolution(x, filters, 1, strides=strides, name=f"{name}_1_conv")
    x = normalization(x, name=f"{name}_1_bn")
    x = layers.Activation("relu", name=f"{name}_1_relu")(x)

    x = convolution(x, filters, 3, padding="same", name=f"{name}_2_conv")
    x = normalization(x, name=f"{name}_2_bn")
    x = layers.Activation("relu", name=f"{name}_2_relu")(x)

    x = convolution(x, 4 * filters, 1, name=f"{name}_3_conv")
    x = normalization(x, name=f"{name}_3_bn")

    x = layers.Add(name=f"{name}_add")([shortcut, x])
    return layers.Activation("relu", name=f"{name}_out")(x)


def convolution(x: keras.KerasTensor, filters: int, size: int, **options) -> keras.KerasTensor:
    # He et al., Delving Deep into Rectifiers, 2015, with fan-out, which keeps the variance of
    # gradients. One initializer per layer: each draws its own numbers.
    msra = keras.initializers.VarianceScaling(
        2.0, mode="fan_out", distribution="untruncated_normal"
    )
    return layers.Conv2D(filters, size, kernel_initializer=msra, **options)(x)


def normalization(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    return layers.BatchNormalization(epsilon=1.001e-5, name=name)(x)
