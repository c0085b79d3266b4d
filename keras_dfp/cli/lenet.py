"""The embedded data of `keras-dfp train`: handwritten digits."""

from __future__ import annotations

import numpy as np

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
