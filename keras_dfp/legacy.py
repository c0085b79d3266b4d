"""Keras 2, which the plugin does not reach: `tf_keras`, and `tf.keras` where it stands for that."""

from __future__ import annotations

import os
import warnings
from typing import Any

import keras


def warn_of_legacy_keras() -> None:
    """Warns where `tf.keras` is Keras 2: a policy set for Keras 3 would do nothing to it."""
    # As TensorFlow asks.
    if os.environ.get("TF_USE_LEGACY_KERAS") in ("true", "True", "1"):
        warnings.warn(
            "keras_dfp: TF_USE_LEGACY_KERAS makes tf.keras Keras 2 (tf_keras), whose models no "
            "policy of keras_dfp reaches: they stay float32. Build models with `import keras`, "
            "or unset it.",
            stacklevel=3,
        )


def check_model(function: str, model: Any) -> None:
    """Raises TypeError unless something is a model, or layer, of Keras 3."""
    if isinstance(model, keras.layers.Layer):
        return
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    legacy = any(base.__module__.split(".")[0] == "tf_keras" for base in type(model).__mro__)
    raise TypeError(
        f"{function}: model must be a Keras model (keras.Model); got {kind}"
        + (", of Keras 2, which keras_dfp does not reach. Build it with `import keras`." * legacy)
    )
