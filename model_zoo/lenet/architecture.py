"""A LeNet-class network for small grey images, in the spirit of LeCun et al., *Gradient-Based
Learning Applied to Document Recognition*, Proc. IEEE 1998, with today's ReLU, max pooling, dropout.
"""

from __future__ import annotations

import keras
from keras import layers


def build(
    input_shape: tuple[int, int, int] = (8, 8, 1),
    classes: int = 10,
    classifier_activation: str | None = "softmax",
) -> keras.Model:
    """Returns the network, under the current dtype policy.

    Args:
        input_shape: Height, width and channels of an image, channels last; at least 4x4.
        classes: Number of classes.
        classifier_activation: `"softmax"` for probabilities, `None` for logits.
    """

    def convolution(filters):
        return layers.Conv2D(filters, 3, padding="same", activation="relu")

    return keras.Sequential(
        [
            keras.Input(input_shape),
            # Less than a pixel of an 8x8 image: digits fill theirs.
            layers.RandomTranslation(0.08, 0.08, fill_mode="constant"),
            convolution(32),
            convolution(32),
            layers.MaxPooling2D(),
            convolution(64),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(classes, activation=classifier_activation, name="predictions"),
        ],
        name="lenet",
    )
