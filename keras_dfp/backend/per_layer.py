"""What is known of a layer, for as long as it lives."""

from __future__ import annotations

import weakref
from typing import Any

import keras


class PerLayer:
    """A dict from layers, which may not be hashable, and are not kept alive by it."""

    def __init__(self):
        self._values: dict[int, tuple[weakref.ref, Any]] = {}

    def __setitem__(self, layer: keras.layers.Layer, value: Any) -> None:
        key = id(layer)
        self._values[key] = weakref.ref(layer, lambda _: self._values.pop(key, None)), value

    def get(self, layer: keras.layers.Layer, default: Any = None) -> Any:
        reference, value = self._values.get(id(layer), (None, default))
        return value if reference is not None and reference() is layer else default
