"""The embedded default of `keras-dfp train`: handwritten digits, and a small CNN to learn them."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers

Images = tuple[np.ndarray, np.ndarray]


def digits() -> tuple[Images, Images]:
    """Returns scikit-learn's 1,797 digits as `(images, labels)` to train on and to test on.

    The split is always the same: 1,437 and 360 images, every digit equally often in both.
    """
    # Here and not above, because scikit-learn is optional.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=0
    )
    return (train_x, train_y), (test_x, test_y)


def build() -> keras.Model:
    """Returns a LeNet-class network for 8x8 images of ten classes, under the current policy."""

    def convolution(filters):
        return layers.Conv2D(filters, 3, padding="same", activation="relu")

    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            # Less than a pixel: the digits fill their images.
            layers.RandomTranslation(0.08, 0.08, fill_mode="constant"),
            convolution(32),
            convolution(32),
            layers.MaxPooling2D(),
            convolution(64),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(10),
        ],
        name="lenet",
    )
