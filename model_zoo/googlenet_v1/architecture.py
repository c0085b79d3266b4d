"""GoogLeNet (Inception v1): Szegedy et al., *Going Deeper with Convolutions*, 2014
(arXiv 1409.4842), table 1 and figure 3. Initial weights and the constants of the response
normalisation are those of Caffe's bvlc_googlenet, because the paper does not state them.
"""

from __future__ import annotations

import keras
from keras import layers

from keras_dfp.layers import LocalResponseNormalization

# Filters of an inception module: 1x1; 3x3 reduce, 3x3; 5x5 reduce, 5x5; pool projection.
INCEPTION = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def build(
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    classifier_activation: str | None = "softmax",
    lrn: bool = True,
    auxiliary: bool = False,
) -> keras.Model:
    """Returns the network, under the current dtype policy.

    Args:
        input_shape: Height, width and channels of an image, channels last; from 32x32 it is not
            all padding. On small images the pooling window of the auxiliary classifiers shrinks
            with its input, and so does the kernel of their `fc`.
        classes: Number of classes.
        classifier_activation: `"softmax"` for probabilities, `None` for logits.
        lrn: Whether responses are normalised after conv1 and conv2.
        auxiliary: Whether the model has the two auxiliary classifiers, for training: its outputs
            are then `[predictions, auxiliary1, auxiliary2]`. Without them:
            `keras.Model(model.inputs, model.outputs[0])`.
    """
    inputs = keras.Input(input_shape)
    x = convolution(inputs, 64, 7, strides=2, name="conv1")
    x = pooling(x, name="pool1")
    x = normalization(x, name="norm1") if lrn else x
    x = convolution(x, 64, 1, name="conv2_reduce")
    x = convolution(x, 192, 3, name="conv2")
    x = normalization(x, name="norm2") if lrn else x
    x = pooling(x, name="pool2")

    x = inception(x, "3a")
    x = inception(x, "3b")
    x = pooling(x, name="pool3")
    x = after_4a = inception(x, "4a")
    x = inception(x, "4b")
    x = inception(x, "4c")
    x = after_4d = inception(x, "4d")
    x = inception(x, "4e")
    x = pooling(x, name="pool4")
    x = inception(x, "5a")
    x = inception(x, "5b")

    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    x = layers.Dropout(0.4, name="drop")(x)
    outputs = dense(x, classes, activation=classifier_activation, name="predictions")
    if auxiliary:
        outputs = [
            outputs,
            classifier(after_4a, classes, classifier_activation, name="auxiliary1"),
            classifier(after_4d, classes, classifier_activation, name="auxiliary2"),
        ]
    return keras.Model(inputs, outputs, name="googlenet_v1")


def inception(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """Convolutions of three sizes and a pooling of the same values, side by side."""
    one, three_reduce, three, five_reduce, five, projection = INCEPTION[name]
    name = f"inception_{name}"
    branch3 = convolution(x, three_reduce, 1, name=f"{name}_3x3_reduce")
    branch5 = convolution(x, five_reduce, 1, name=f"{name}_5x5_reduce")
    pooled = layers.MaxPooling2D(3, strides=1, padding="same", name=f"{name}_pool")(x)
    return layers.Concatenate(name=f"{name}_output")(
        [
            convolution(x, one, 1, name=f"{name}_1x1"),
            convolution(branch3, three, 3, name=f"{name}_3x3"),
            convolution(branch5, five, 5, name=f"{name}_5x5"),
            convolution(pooled, projection, 1, name=f"{name}_pool_projection"),
        ]
    )


def classifier(
    x: keras.KerasTensor, classes: int, activation: str | None, name: str
) -> keras.KerasTensor:
    """An auxiliary classifier on the values between two modules."""
    x = layers.AveragePooling2D(min(5, *x.shape[1:3]), strides=3, name=f"{name}_pool")(x)
    x = convolution(x, 128, 1, name=f"{name}_conv")
    x = layers.Flatten(name=f"{name}_flatten")(x)
    x = dense(x, 1024, activation="relu", bias_initializer=bias(), name=f"{name}_fc")
    x = layers.Dropout(0.7, name=f"{name}_drop")(x)
    return dense(x, classes, activation=activation, name=name)


def convolution(x: keras.KerasTensor, filters: int, size: int, **options) -> keras.KerasTensor:
    return layers.Conv2D(
        filters,
        size,
        padding="same",
        activation="relu",
        kernel_initializer="lecun_uniform",
        bias_initializer=bias(),
        **options,
    )(x)


def dense(x: keras.KerasTensor, units: int, **options) -> keras.KerasTensor:
    # Caffe's "xavier" counts a kernel's inputs only, unlike Glorot's.
    return layers.Dense(units, kernel_initializer="lecun_uniform", **options)(x)


def bias() -> keras.initializers.Initializer:
    return keras.initializers.Constant(0.2)


def pooling(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    return layers.MaxPooling2D(3, strides=2, padding="same", name=name)(x)


def normalization(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    # Caffe divides its alpha, 1e-4, by the number of channels in the window.
    return LocalResponseNormalization(bias=1.0, alpha=1e-4 / 5, name=name)(x)
