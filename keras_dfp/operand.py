"""How a float32 tensor becomes the operand of a native op: once, wherever it is used.

The mantissas and the exponents are remembered on the tensor they came from, so that all its
consumers share them. They are computed in the graph the tensor belongs to, and the graphs of
loops, branches and functions inside it capture them. A token, which only exists to carry a
gradient, is made anew for every consumer: it has to be in the consumer's own graph (TensorFlow
cannot carry it across), and under the gradient tape that is recording then.

A variable is read and quantised where it is used, because its value may change between two uses;
`loop_scope` promises that it does not.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Sequence

import tensorflow as tf

from keras_dfp import native
from keras_dfp.native import Operand
from keras_dfp.number import DFPFormat

_local = threading.local()


def operand(
    x,
    fmt: DFPFormat,
    perm: Sequence[int] = (),
    *,
    tensor_id: int = 0,
    expand: Callable | None = None,
    group_axes: int = 0,
    arrange: Callable | None = None,
) -> Operand:
    """Quantises a tensor, or finds it quantised, and gives it a token.

    Args:
        x: A float32 `tf.Tensor` or `tf.Variable` of known rank.
        fmt: The format.
        perm: Transposes the mantissas; empty for none.
        tensor_id: Keeps apart the stochastic noise of the operands of one op.
        expand: A function that repeats elements of a tensor (say, `tf.broadcast_to`), applied
            before `perm`.
        group_axes: How many leading axes of `x` have an exponent for each of their indices.
        arrange: A function that brings these exponents into the order of the rows after `perm`.

    Returns:
        The operand. Its mantissas may be reshaped freely; the token takes a gradient of any shape
        with as many elements.
    """
    value = tf.convert_to_tensor(x)
    q, exponent = _quantized(x, value, fmt.mantissa_bits, fmt.rounding, tensor_id, group_axes)
    if arrange is not None:
        exponent = arrange(exponent)
    if expand is not None:
        q, value = expand(q), expand(value)
    if perm:
        q = tf.transpose(q, perm)
    return Operand(q, exponent, native.lib.dfp_token(x=value, perm=list(perm)))


@contextlib.contextmanager
def loop_scope() -> Iterator[None]:
    """Declares that no variable changes until the scope ends: around the loop of an RNN, say.

    A variable used inside is quantised once, in the graph in which the scope was entered.
    """
    previous = getattr(_local, "loop", None)
    _local.loop = _Loop(_current_graph())
    try:
        yield
    finally:
        _local.loop = previous


class _Loop:
    def __init__(self, graph):
        self.graph = graph
        self.quantized = {}


@contextlib.contextmanager
def site_scope(site: str, tensor_ids: Collection[int] = (0, 1)) -> Iterator[None]:
    """Names the place where operands are quantised inside, for the warning of what they lose.

    Args:
        site: The name; empty for no warning.
        tensor_ids: The operands that are looked at.
    """
    previous = getattr(_local, "site", ("", ()))
    _local.site = site, tensor_ids
    try:
        yield
    finally:
        _local.site = previous


def watch_only(*tensor_ids: int):
    """A `site_scope` of the same name that looks at fewer operands."""
    return site_scope(getattr(_local, "site", ("", ()))[0], tensor_ids)


def _quantized(x, value, bits, rounding, tensor_id, group_axes):
    """Returns q and exponents of `value`, which is `x` or what was read from the variable `x`."""
    name, tensor_ids = getattr(_local, "site", ("", ()))
    how = bits, rounding, tensor_id, group_axes, name if tensor_id in tensor_ids else ""
    loop = getattr(_local, "loop", None)
    if isinstance(x, tf.Variable) and loop is not None and _encloses(loop.graph):
        known, key, graph = loop.quantized, (x.ref(), bits, rounding), loop.graph
    elif _encloses(graph := getattr(value, "graph", None)):
        known, key = value.__dict__.setdefault("_dfp_operands", {}), (bits, rounding, group_axes)
    else:
        # The tensor is of a graph that this one does not lie in (a loop's gradient reads tensors
        # of the loop's body), or eager while this is a graph: TensorFlow captures it here.
        return native.quantize(value, *how)
    if key not in known:
        with contextlib.nullcontext() if graph is None else graph.as_default():
            source = x if isinstance(x, tf.Variable) else value
            known[key] = native.quantize(source, *how)
    return known[key]


def _current_graph():
    """Returns the graph being built, None when executing eagerly."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _encloses(graph) -> bool:
    """Tells whether `graph` is the current one or one that the current one may capture from."""
    current = _current_graph()
    if graph is None or current is None:
        return graph is current
    while current is not None and current is not graph:
        current = getattr(current, "outer_graph", None)
    return current is graph
