"""AlexNet: Krizhevsky et al., *ImageNet Classification with Deep Convolutional Neural Networks*,
NIPS 2012, in the order of its text: response normalisation after ReLU, then pooling.

conv2, conv4 and conv5 have two groups: the halves that lay on two GPUs. Initial weights are He's
and biases zero. The paper's (a deviation of 0.01 in every layer, biases of one) fit its own sizes
only: on 64x64 images its network did not learn.
"""

from __future__ import annotations

import keras
from keras import layers

from keras_dfp.layers import LocalResponseNormalization


def build(
    input_shape: tuple[int, int, int] = (227, 227, 3),
    classes: int = 1000,
    classifier_activation: str | None = "softmax",
    lrn: bool = True,
    dropout: float = 0.5,
) -> keras.Model:
    """Returns the network, under the current dtype policy.

    Args:
        input_shape: Height, width and channels of an image, channels last; at least 35x35. The
            paper says 224, but its 55x55 outputs of conv1 need 227. On small images the last
            pooling window shrinks with its input, and so does the kernel of `fc6`: 1x1x256 rows
            at 64x64, 6x6x256 at 227x227.
        classes: Number of classes.
        classifier_activation: `"softmax"` for probabilities, `None` for logits.
        lrn: Whether responses are normalised after conv1 and conv2.
        dropout: Share of the values of `fc6` and `fc7` that training drops.
    """
    inputs = keras.Input(input_shape)
    x = convolution(inputs, 96, 11, strides=4, padding="valid", name="conv1")
    x = LocalResponseNormalization(name="norm1")(x) if lrn else x
    x = pooling(x, name="pool1")
    x = convolution(x, 256, 5, groups=2, name="conv2")
    x = LocalResponseNormalization(name="norm2")(x) if lrn else x
    x = pooling(x, name="pool2")
    x = convolution(x, 384, 3, name="conv3")
    x = convolution(x, 384, 3, groups=2, name="conv4")
    x = convolution(x, 256, 3, groups=2, name="conv5")
    x = pooling(x, name="pool5")
    x = layers.Flatten(name="flatten")(x)
    x = dense(x, 4096, "relu", name="fc6")
    x = layers.Dropout(dropout, name="drop6")(x)
    x = dense(x, 4096, "relu", name="fc7")
    x = layers.Dropout(dropout, name="drop7")(x)
    x = dense(x, classes, classifier_activation, name="predictions")
    return keras.Model(inputs, x, name="alexnet")


def convolution(
    x: keras.KerasTensor, filters: int, size: int, padding="same", **options
) -> keras.KerasTensor:
    return layers.Conv2D(
        filters,
        size,
        padding=padding,
        activation="relu",
        kernel_initializer="he_normal",
        **options,
    )(x)


def pooling(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """The maximum of overlapping 3x3 windows; of smaller ones where there are not 3x3 values."""
    return layers.MaxPooling2D(min(3, *x.shape[1:3]), strides=2, name=name)(x)


def dense(x: keras.KerasTensor, units: int, activation: str | None, name: str) -> keras.KerasTensor:
    return layers.Dense(
        units,
        activation=activation,
        kernel_initializer="he_normal",
        name=name,
    )(x)
