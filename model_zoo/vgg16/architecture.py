"""VGG-16: Simonyan and Zisserman, *Very Deep Convolutional Networks for Large-Scale Image
Recognition*, 2014 (arXiv 1409.1556), configuration D.

Layer for layer, by name and by order of weights, `keras.applications.VGG16`, so weight files of one
load into the other; plus the dropout of the paper, which has no weights. Initial weights are
Glorot's, which the paper found to make its pre-training unnecessary.
"""

from __future__ import annotations

import keras
from keras import layers


def build(
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    classifier_activation: str | None = "softmax",
    dropout: float = 0.5,
) -> keras.Model:
    """Returns the network, under the current dtype policy.

    Args:
        input_shape: Height, width and channels of an image, channels last; at least 32x32. The
            kernel of `fc1` depends on it: at 64x64 it has 2x2x512 rows, not 7x7x512.
        classes: Number of classes.
        classifier_activation: `"softmax"` for probabilities, `None` for logits.
        dropout: Share of the values of `fc1` and `fc2` that training drops.
    """
    inputs = keras.Input(input_shape)
    x = inputs
    for number, (convolutions, filters) in enumerate(
        ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)), start=1
    ):
        for convolution in range(1, convolutions + 1):
            x = layers.Conv2D(
                filters,
                3,
                padding="same",
                activation="relu",
                name=f"block{number}_conv{convolution}",
            )(x)
        x = layers.MaxPooling2D(2, name=f"block{number}_pool")(x)

    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(4096, activation="relu", name="fc1")(x)
    x = layers.Dropout(dropout, name="drop1")(x)
    x = layers.Dense(4096, activation="relu", name="fc2")(x)
    x = layers.Dropout(dropout, name="drop2")(x)
    x = layers.Dense(classes, activation=classifier_activation, name="predictions")(x)
    return keras.Model(inputs, x, name="vgg16")
