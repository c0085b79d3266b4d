"""How a float32 tensor becomes the operand of a native op: in a graph once, wherever it is used.

The mantissas and the exponents are remembered on the tensor of the graph that they came from, so
that all its consumers share them. They are computed in the graph the tensor belongs to, and the
graphs of loops and branches inside it capture them. A function does not: it is traced once and
called from many graphs. Eagerly nothing is remembered, or the mantissas would live, and the noise
of stochastic rounding would stay the same, as long as the tensor does. A token, which only exists
to carry a gradient, is made anew for every consumer, under the gradient tape that is recording
then.

A variable is read and quantized where it is used, because its value may change between two uses;
in the steps of a loop (`loop_step`) once, unless they assign to it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import tensorflow as tf

from keras_dfp import native
from keras_dfp.internals import (
    CondBranchFuncGraph,
    ControlFlowFuncGraph,
    get_read_write_resource_inputs,
)
from keras_dfp.native import Operand
from keras_dfp.number import DFPFormat

# A size is an int where it is known while tracing, else a scalar int32 tensor.
Size: TypeAlias = int | tf.Tensor

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
    shape: Sequence[Size] | None = None,
) -> Operand:
    """Quantizes a tensor, or finds it quantized, and gives it a token.

    Args:
        x: A float32 `tf.Tensor` or `tf.Variable` of known rank.
        fmt: The format.
        perm: Transposes the mantissas; empty for none.
        tensor_id: Keeps apart the stochastic noise of the operands of one op.
        expand: A function that repeats elements of a tensor (say, `tf.broadcast_to`), applied
            before `perm`.
        group_axes: How many leading axes of `x` have an exponent for each of their indices.
        arrange: A function that brings these exponents into the order of the rows after `perm`.
        shape: Reshapes the mantissas, after `perm`; None for not at all.

    Returns:
        The operand.
    """
    value = tf.convert_to_tensor(x)
    q, exponent = _quantized(x, value, fmt, tensor_id, group_axes)
    if arrange is not None:
        exponent = arrange(exponent)
    source, mantissas = value, q
    if expand is not None:
        q, value = expand(q), expand(value)
    note = getattr(_local, "note", None)
    if note is not None and _is_activation(x):
        note(Quantized(source, mantissas, q, tuple(perm), fmt.fused))
    own_shape = [] if shape is None else [tf.shape(q)]
    if perm:
        q = native.transpose(q, perm)
    if shape is not None:
        q = reshape(q, shape)
    token = native.lib.dfp_token(x=value, q=q, shape=own_shape, perm=list(perm))
    return Operand(q, exponent, token)


def reshape(x, shape: Sequence[Size]):
    """Reshapes, keeping as much of the static shape as TensorFlow can know."""
    unknown = [i for i, n in enumerate(shape) if not isinstance(n, int)]
    if len(unknown) == 1 and 0 not in [n for n in shape if isinstance(n, int)]:
        shape = [-1 if i == unknown[0] else n for i, n in enumerate(shape)]
    return tf.reshape(x, shape)


class Quantized(NamedTuple):
    """A tensor of a graph that became an operand, as `noted` tells it.

    Attributes:
        x: The tensor.
        mantissas: What it was quantized to, shared by all that read x in this format.
        expanded: The mantissas with the elements that a product repeats.
        perm: How the product transposes these; empty for not at all.
        fused: Whether `fusion` may compute the mantissas.
    """

    x: tf.Tensor
    mantissas: tf.Tensor
    expanded: tf.Tensor
    perm: tuple[int, ...]
    fused: bool


@contextlib.contextmanager
def noted(note: Callable[[Quantized], None] | None) -> Iterator[None]:
    """Calls `note` of tensors of graphs that become operands inside; variables apart."""
    previous = getattr(_local, "note", None)
    _local.note = note
    try:
        yield
    finally:
        _local.note = previous


def loop_step(step: Callable) -> Callable:
    """Wraps the step of a loop, so that what the loop does not change is quantized once, before it.

    That holds for every variable that the step multiplies until something in it assigns to it;
    from then on the variable is quantized wherever it is read. To be found in time, an assignment
    in a `tf.while_loop` must have been seen: the step has to be called once before the loop, as
    Keras does to see what comes out of it, and what it has not multiplied then is not shared.

    Args:
        step: A function that is called for every step, or once while its loop is traced.

    Returns:
        A function with the same arguments and results, for one loop in the current graph.
    """
    loop = _Loop(_current_graph())

    @functools.wraps(step)
    def wrapped(*args, **kwargs):
        previous = getattr(_local, "loop", None)
        _local.loop = loop
        loop.step_graph = _current_graph()
        try:
            return step(*args, **kwargs)
        finally:
            _local.loop = previous

    return wrapped


class _Loop:
    """What was quantized before a loop, and whether that still holds."""

    def __init__(self, graph):
        self.graph = self.step_graph = graph
        self.quantized = {}
        self._before = set() if graph is None else set(graph.get_operations())
        self._first_values = {}

    def keeps(self, variable, value) -> bool:
        """Tells whether all steps can share what `variable`, now read as `value`, becomes."""
        graph = _current_graph()
        if graph is None is self.graph:
            # An assignment never writes into memory that somebody holds.
            first = self._first_values.setdefault(variable.ref(), value)
            return _address(first) == _address(value)
        if not _encloses(self.step_graph, CondBranchFuncGraph) or not _encloses(self.graph):
            return False
        if self.step_graph is not self.graph and variable.ref() not in self.quantized:
            return False
        while not self._assigns(graph, variable.handle):
            if graph is self.graph:
                return True
            graph = graph.outer_graph
        return False

    def _assigns(self, graph, handle) -> bool:
        """Tells whether what the steps have put into a graph so far writes to a variable."""
        if isinstance(graph, tf.__internal__.FuncGraph):
            handle = graph.capture(handle)
        return any(
            op not in self._before and handle in get_read_write_resource_inputs(op)[1]
            for op in handle.consumers()
        )


def _address(tensor) -> int:
    return np.asarray(memoryview(tensor)).ctypes.data


@contextlib.contextmanager
def site_scope(site: str, tensor_ids: Collection[int] = (0, 1)) -> Iterator[None]:
    """Names the place where operands are quantized and multiplied inside.

    By this name they are known to the warning of what operands lose, and to statistics.

    Args:
        site: The name; empty for neither.
        tensor_ids: The operands that the warning looks at.
    """
    previous = getattr(_local, "site", ("", ()))
    _local.site = site, tensor_ids
    try:
        yield
    finally:
        _local.site = previous


def watch_only(*tensor_ids: int):
    """A `site_scope` of the same name that looks at fewer operands."""
    return site_scope(current_site(), tensor_ids)


def current_site() -> str:
    """Returns the name of the innermost `site_scope`, on this thread."""
    return getattr(_local, "site", ("", ()))[0]


def _quantized(x, value, fmt, tensor_id, group_axes):
    """Returns q and exponents of `value`, which is `x` or what was read from the variable `x`."""
    site, watched = getattr(_local, "site", ("", ()))
    role = "weight" if is_weight(x) else "activation"
    how = (fmt.mantissa_bits, fmt.rounding, tensor_id, group_axes, site, fmt.fused, role)
    watched = tensor_id in watched
    loop = getattr(_local, "loop", None)
    graph = getattr(value, "graph", None)
    key = (fmt.mantissa_bits, fmt.rounding, group_axes, fmt.fused)
    if isinstance(x, tf.Variable) and loop is not None and loop.keeps(x, value):
        known, graph = loop.quantized.setdefault(x.ref(), {}), loop.graph
    elif graph is not None and _encloses(graph):
        known = value.__dict__.setdefault("_dfp_operands", {})
    else:
        # The tensor is eager, or of a graph that this one does not lie in (a loop's gradient
        # reads tensors of the loop's body).
        return native.quantize(value, *how, watched)
    if key in known:
        share_site(known[key][0], site)
    else:
        with contextlib.nullcontext() if graph is None else graph.as_default():
            source = x if isinstance(x, tf.Variable) else value
            known[key] = native.quantize(source, *how, watched)
    return known[key]


def share_site(q: tf.Tensor, site: str) -> None:
    """Adds a site to those of mantissas in a graph, which it multiplies too."""
    if not site or isinstance(q, tf.__internal__.EagerTensor):
        return
    sites = q.op.get_attr("site").decode().split(",")
    # The native op knows as much as 199 bytes.
    if site not in sites and len(text := ",".join([*sites, site])) < 200:
        q.op._set_attr("site", tf.compat.v1.AttrValue(s=text.encode()))


def is_weight(x) -> bool:
    """Tells whether x is a variable, or what one holds in a call without state."""
    return isinstance(x, tf.Variable) or hasattr(x, "_dfp_variable")


def _is_activation(x) -> bool:
    """Tells whether x is a tensor of a graph, and not what a variable holds."""
    return not is_weight(x) and getattr(x, "graph", None) is not None


def _current_graph():
    """Returns the graph being built, None when executing eagerly."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _encloses(graph, kind=ControlFlowFuncGraph) -> bool:
    """Tells whether `graph` is the current one, or the current one lies in its loops, branches."""
    current = _current_graph()
    while current is not graph and isinstance(current, kind):
        current = current.outer_graph
    return current is graph
