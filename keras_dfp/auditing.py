"""Watching one batch eagerly: what every product multiplies, and what is lost in quantizing.

The dispatcher (`backend.products`) hands its products here while an audit is on; `audit` is what
users call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dfp import native
from keras_dfp.number import DFPFormat

OPERANDS = ("first", "second", "gradient")  # by tensor_id


@dataclasses.dataclass
class Call:
    """One product that ran: `ours` and `stock` compute it again from operands.

    Attributes:
        layer: Whose it is.
        operation: Its name in `keras.ops`.
        format: What it runs in.
        operands: Tensors and variables.
        ours: Computes it on integers.
        stock: Computes it in float32.
        output: What came out.
        gradient: What came back to it, once the gradients have been computed.
    """

    layer: keras.layers.Layer
    operation: str
    format: DFPFormat
    operands: Sequence[Any]
    ours: Callable
    stock: Callable
    output: tf.Tensor
    gradient: tf.Tensor | None = None


@dataclasses.dataclass
class Losses:
    """What quantizing lost of tensors of one kind, added up.

    Attributes:
        nonzero: Elements that were not zero.
        lost: Those of them that became zero.
        spread: In bits: how far the largest and the smallest nonzero magnitude of a group that
            shares an exponent are apart, at most.
    """

    nonzero: int = 0
    lost: int = 0
    spread: int = 0

    def add(self, x: np.ndarray, q: np.ndarray, group_axes: int) -> None:
        magnitude = np.abs(x).reshape((int(np.prod(x.shape[:group_axes])), -1))
        there = (magnitude > 0) & np.isfinite(magnitude)
        self.nonzero += int(there.sum())
        self.lost += int((there & (q.reshape(magnitude.shape) == 0)).sum())
        exponent = np.frexp(np.where(there, magnitude, 1))[1]
        if magnitude.size:
            most = np.max(exponent, axis=1, initial=-200, where=there)
            least = np.min(exponent, axis=1, initial=200, where=there)
            self.spread = max(self.spread, int(np.max(most - least)))

    def merge(self, other: Losses) -> None:
        self.nonzero += other.nonzero
        self.lost += other.lost
        self.spread = max(self.spread, other.spread)

    @property
    def share(self) -> float:
        return self.lost / self.nonzero if self.nonzero else 0.0


class Watch:
    """Notes the products of a forward pass.

    Args:
        float32: Whether they are to be computed by stock Keras.
    """

    def __init__(self, float32: bool):
        self.float32 = float32
        self.calls: list[Call] = []
        self.is_forward = True

    def product(self, layer, operation, fmt, operands, ours, stock) -> tf.Tensor:
        """Computes a product and, in the forward pass, notes it."""
        with _watched(None):  # what it is made of is no product of the layer
            y = (stock if self.float32 else ours)(*operands)
        if not self.is_forward:
            return y
        call = Call(layer, operation, fmt, list(operands), ours, stock, y)
        self.calls.append(call)

        @tf.custom_gradient
        def through(y):
            def gradient(dy):
                call.gradient = dy
                return dy

            return tf.identity(y), gradient

        return through(y)

    def forward(self):
        """Watches the products inside."""
        self.is_forward = True
        return _watched(self)

    def backward(self):
        """Computes what the backward pass computes again in the same arithmetic."""
        self.is_forward = False
        return _watched(self)


_local = threading.local()


def current() -> Watch | None:
    """Returns the watch that is on, on this thread."""
    return getattr(_local, "watch", None)


@contextlib.contextmanager
def _watched(watch: Watch | None) -> Iterator[None]:
    previous = current()
    _local.watch = watch
    try:
        yield
    finally:
        _local.watch = previous


@contextlib.contextmanager
def losses() -> Iterator[dict[str, Losses]]:
    """Collects what the quantizer loses inside, by the role of the operand (`OPERANDS`)."""
    found = {name: Losses() for name in OPERANDS}

    def note(x, q, tensor_id, group_axes):
        found[OPERANDS[tensor_id]].add(np.asarray(x), np.asarray(q), group_axes)

    with native.observed(note):
        yield found


class Error:
    """The relative error of tensors taken together: of each sample, and of those the mean.

    A loud sample would hide what becomes of the others in a norm of all.
    """

    def __init__(self):
        # Squared norms of differences and of the truth, by the number of samples.
        self.sums: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, ours, truth, samples: bool = True) -> None:
        if ours is None or truth is None:
            return
        ours, truth = (np.asarray(tf.convert_to_tensor(t), np.float64) for t in (ours, truth))
        count = len(ours) if samples and ours.ndim else 1
        difference, size = (((a**2).reshape(count, -1)).sum(1) for a in (ours - truth, truth))
        before = self.sums.get(count, (0.0, 0.0))
        self.sums[count] = before[0] + difference, before[1] + size

    def result(self) -> float | None:
        if not self.sums:
            return None
        difference, size = (
            np.concatenate(parts) for parts in zip(*self.sums.values(), strict=True)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            errors = np.sqrt(difference / size)
        # Where nothing was expected, nothing is no error.
        errors = errors[(size > 0) | (difference > 0)]
        return float(errors.mean()) if errors.size else 0.0


def is_variable(x) -> bool:
    """Tells whether an operand is a weight."""
    return isinstance(x, (keras.Variable, tf.Variable))


def value(x):
    """Returns an operand as a tensor, or as a variable of TensorFlow's."""
    if isinstance(x, keras.Variable):
        return x.value
    return x if isinstance(x, tf.Variable) else tf.convert_to_tensor(x)


def gradients(product: Callable, operands: Sequence[Any], dy):
    """Returns a product of operands, and the gradients of all of them for `dy`."""
    with tf.GradientTape() as tape:
        tape.watch(operands)
        y = product(*operands)
    if dy is None:
        return y, [None] * len(operands)
    return y, tape.gradient(y, operands, output_gradients=dy)
