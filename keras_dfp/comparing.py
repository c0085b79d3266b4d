"""A layer's products against float32 on the same numbers, within a training step.

In steps that are looked at, a branch of the graph computes the layer's product and both gradients
again, on integers and in float32, and hands Python what is between them. The training itself does
not see it: its bits are the same.
"""

from __future__ import annotations

import contextlib
import difflib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import keras
import tensorflow as tf

from keras_dfp import auditing
from keras_dfp.backend.calling import matches
from keras_dfp.operand import is_weight

MOST_NAMES = 12  # of layers in a message
# What an error is of, by the tensor that rows of statistics name.
OUTPUT, INPUT_GRADIENT, WEIGHT_GRADIENT = "output", "activation", "weight"


def unmatched(patterns: Iterable[str], paths: Sequence[str]) -> str:
    """Says which patterns match none of the paths, and what may have been meant; or nothing."""
    missing = [p for p in patterns if not any(matches(p, path) for path in paths)]
    if not missing:
        return ""
    # By what is shorter to write, where that is enough.
    names = [path.rsplit("/", 1)[-1] for path in paths]
    names = [n if names.count(n) == 1 else path for n, path in zip(names, paths, strict=True)]
    close = [n for p in missing for n in difflib.get_close_matches(p.rsplit("/", 1)[-1], names)]
    shown = list(dict.fromkeys(close)) or names[:MOST_NAMES]
    more = f", and {len(names) - len(shown)} more" if not close and names[MOST_NAMES:] else ""
    there = f"{', '.join(shown)}{more}" if shown else "none"
    return (
        f"{', '.join(map(repr, missing))} match{'es' if len(missing) == 1 else ''} no layer on "
        f"integers. {'Did you mean' if close else 'There are'}: {there}{'?' if close else '.'}"
    )


class Comparison:
    """Compares layers while it is on; what it is to see has to be traced after `start`.

    Args:
        patterns: Paths or names of layers, or patterns of them.

    Attributes:
        on: A variable: whether the steps that run now are looked at.
    """

    def __init__(self, patterns: Sequence[str]):
        self.patterns = tuple(patterns)
        self.on = tf.Variable(False, trainable=False, name="comparing")
        self._errors: dict[tuple[str, str], auditing.Error] = {}
        self._lock = threading.Lock()

    def wants(self, layer: keras.layers.Layer) -> bool:
        """Tells whether a layer is to be compared."""
        path = layer.path or layer.name
        return any(matches(pattern, path) for pattern in self.patterns)

    def watch(self, layer, operands, ours: Callable, stock: Callable, y: tf.Tensor) -> tf.Tensor:
        """Returns y, a product of the operands; looks closer when its gradient is there."""
        path = layer.path or layer.name
        # The gradient of a loop cannot read variables that the loop did not.
        on = tf.convert_to_tensor(self.on)
        values, names = [], []
        for operand in operands:
            values.append(tf.convert_to_tensor(auditing.value(operand)))
            if auditing.is_variable(operand):
                values[-1]._dfp_variable = True
            names.append(WEIGHT_GRADIENT if is_weight(values[-1]) else INPUT_GRADIENT)

        @tf.custom_gradient
        def through(y):
            def gradient(dy):
                looked = tf.cond(
                    on, lambda: self._look(path, names, values, ours, stock, dy), lambda: False
                )
                with tf.control_dependencies([] if tf.executing_eagerly() else [looked]):
                    return tf.identity(dy)

            return tf.identity(y), gradient

        return through(y)

    def _look(self, path, names, values, ours, stock, dy):
        results = []
        for product in (ours, stock):
            with _unwatched():
                y, gradients = auditing.gradients(product, values, dy)
            results.append([y, *gradients])
        found = [
            (name, tf.convert_to_tensor(one), tf.convert_to_tensor(other))
            for name, one, other in zip((OUTPUT, *names), *results, strict=True)
            if one is not None and other is not None
        ]

        def note(*arrays):
            pairs = zip(arrays[::2], arrays[1::2], strict=True)
            with self._lock:
                for (name, _, _), (one, other) in zip(found, pairs, strict=True):
                    error = self._errors.setdefault((path, name), auditing.Error())
                    error.add(one, other, samples=name != WEIGHT_GRADIENT)
            return True

        return tf.numpy_function(note, [x for _, *pair in found for x in pair], tf.bool)

    def take(self) -> dict[tuple[str, str], float]:
        """Returns the relative errors since this was asked last, by layer and tensor."""
        with self._lock:
            found, self._errors = self._errors, {}
        results = {key: error.result() for key, error in found.items()}
        return {key: result for key, result in results.items() if result is not None}


# Of the process, because replicas are traced on threads of their own.
_current: Comparison | None = None
_local = threading.local()


def current() -> Comparison | None:
    """Returns the comparison that is to see what is traced now."""
    return None if getattr(_local, "unwatched", False) else _current


@contextlib.contextmanager
def _unwatched() -> Iterator[None]:
    _local.unwatched = True
    try:
        yield
    finally:
        _local.unwatched = False


def start(comparison: Comparison | None) -> None:
    """Lets a comparison see what is traced from now on; None: none."""
    global _current
    _current = comparison
