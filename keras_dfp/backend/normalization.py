"""Batch norm, biases, residual sums and SiLU of layers on integers run on native ops.

They are float32 arithmetic, as Keras's are, but with the same bits on every machine; and being one
op each, they can be fused with their neighbours (`keras_dfp.fusion`).
"""

import functools

import keras
import tensorflow as tf

from keras_dfp import fusion, internals, normalization
from keras_dfp.backend import recording
from keras_dfp.backend.calling import calling_layer, decide
from keras_dfp.backend.registry import replaces


def _format(layer):
    return decide(layer).format


def _is_rows_of_channels(x) -> bool:
    """Tells whether x is a float32 tensor [batch, .., channels] with known channels."""
    return (
        isinstance(x, tf.Tensor)
        and x.dtype == tf.float32
        and x.shape.rank is not None
        and x.shape.rank >= 2
        and x.shape[-1] is not None
    )


def _not_native(decision, x, axis, parameters) -> str:
    """Returns why batch norm stays Keras's, or `""`."""
    if decision.format is None:
        return decision.reason
    if not _is_rows_of_channels(x):
        if getattr(x, "dtype", tf.float32) != tf.float32:
            return f"its input is {keras.backend.standardize_dtype(x.dtype)}"
        return f"its input has shape {tuple(x.shape) if x.shape.rank is not None else '?'}"
    if axis not in (-1, x.shape.rank - 1):
        return f"axis {axis} is not the last"
    for parameter in parameters:
        if parameter is not None and parameter.dtype != tf.float32:
            return f"a parameter is {keras.backend.standardize_dtype(parameter.dtype)}"
    return ""


@replaces(internals.nn, "moments", "x axes keepdims synchronized", called_by=keras.ops.moments)
def _moments(original):
    @functools.wraps(original)
    def moments(x, axes, keepdims=False, synchronized=False):
        layer = calling_layer()
        if (
            isinstance(layer, keras.layers.BatchNormalization)
            and not keepdims
            and not synchronized
            and _is_rows_of_channels(x)
            and sorted(axis % x.shape.rank for axis in axes) == list(range(x.shape.rank - 1))
            and _format(layer) is not None
        ):
            return normalization.moments(x)
        return original(x, axes, keepdims=keepdims, synchronized=synchronized)

    return moments


@replaces(
    internals.nn,
    "batch_normalization",
    "x mean variance axis offset scale epsilon",
    called_by=keras.ops.batch_normalization,
)
def _batch_normalization(original):
    @functools.wraps(original)
    def batch_normalization(x, mean, variance, axis, offset=None, scale=None, epsilon=1e-3):
        layer = calling_layer()
        if not isinstance(layer, keras.layers.BatchNormalization):
            return original(x, mean, variance, axis, offset, scale, epsilon)
        decision = decide(layer)
        reason = _not_native(decision, x, axis, (mean, variance, offset, scale))
        if reason:
            recording.normalized(layer, x, mean, reason)
            return original(x, mean, variance, axis, offset, scale, epsilon)
        whole = normalization.are_moments(x, mean, variance)
        recording.normalized(layer, x, mean, whole=whole)
        scale = tf.ones_like(mean) if scale is None else scale
        offset = tf.zeros_like(mean) if offset is None else offset
        fused = decision.format.fused
        return normalization.normalize(x, mean, variance, scale, offset, epsilon, fused)

    return batch_normalization


@replaces(internals.numpy, "add", "x1 x2", called_by=keras.ops.add)
def _add(original):
    @functools.wraps(original)
    def add(x1, x2):
        fmt = _format(calling_layer()) if _is_rows_of_channels(x1) else None
        y = x2.value if isinstance(x2, keras.Variable) else x2
        if fmt is not None and isinstance(y, tf.Tensor | tf.Variable) and y.dtype == tf.float32:
            if _is_bias(y, x1):
                return normalization.add_bias(x1, y, fmt.fused)
            if fmt.fused and _is_residual(x1, y):
                return normalization.add(x1, y)
        return original(x1, x2)

    return add


def _is_bias(bias, x) -> bool:
    """Tells whether `bias` has a value for each channel of x and changes nothing of its shape."""
    shape = bias.shape
    return (
        shape.is_fully_defined()
        and 1 <= shape.rank <= x.shape.rank
        and shape[-1] == shape.num_elements() == x.shape[-1]
    )


def _is_residual(x, y) -> bool:
    """Tells whether a sum is that of a residual connection: of equal shapes, in a graph.

    Eagerly, and of tensors that may differ in more than the size of the batch, it is TensorFlow's.
    """
    return (
        not tf.executing_eagerly()
        and x.shape.rank > 2
        and x.shape[1:].is_fully_defined()
        and y.shape.rank is not None
        and x.shape.as_list() == y.shape.as_list()
        and (x.shape[0] is not None or len(_batches(x) | _batches(y)) == 1)
    )


def _batches(tensor) -> frozenset[int]:
    """Returns the inputs of unknown batch size that a tensor of a graph is computed from.

    Two tensors of one input have its samples. Of two inputs, one may be a single sample, which the
    sum repeats.
    """
    stack = [tensor]
    while stack:
        top = stack[-1]
        if not hasattr(top, "_dfp_batches"):
            before = _read(top)
            missing = [t for t in before if not hasattr(t, "_dfp_batches")]
            if missing:
                stack += missing
                continue
            found = frozenset().union(*(t._dfp_batches for t in before))
            if not before and top.shape.rank and top.shape[0] is None:
                found = frozenset([id(top)])
            top._dfp_batches = found
        stack.pop()
    return tensor._dfp_batches


def _read(tensor) -> list[tf.Tensor]:
    """Returns what a tensor is computed from; of one that a graph captured, what it stands for."""
    op = tensor.op
    if op.type == "Placeholder":
        captures = getattr(tensor.graph, "captures", ())
        return [
            outer
            for outer, inner in captures
            if inner is tensor and not isinstance(outer, tf.__internal__.EagerTensor)
        ]
    if op.type in fusion.SIZES:
        return []
    return list(op.inputs)


@replaces(internals.nn, "silu", "x", called_by=keras.ops.silu)
def _silu(original):
    @functools.wraps(original)
    def silu(x):
        fmt = _format(calling_layer()) if _is_rows_of_channels(x) else None
        return original(x) if fmt is None else normalization.silu(x, fmt.fused)

    return silu


@replaces(
    internals.atomic_function,
    "from_func_graph",
    "name graph ...",
    called_by=internals.from_func_graph,
)
def _from_func_graph(original):
    """Every function that TensorFlow makes of a graph is made of the fused one."""

    @functools.wraps(original)
    def from_func_graph(name, graph, *args, **kwargs):
        with fusion.fused(graph):
            return original(name, graph, *args, **kwargs)

    return from_func_graph
