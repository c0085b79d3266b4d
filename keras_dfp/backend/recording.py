"""Watching a model being traced: which layer multiplied what, and how; which normalised what."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_dfp import ops
from keras_dfp.backend.calling import Decision, calling_layer, decide
from keras_dfp.internals import compute_output_spec, op_callbacks
from keras_dfp.operand import Quantized, noted

# TensorFlow ops that multiply, and what Keras calls them. Whoever calls them directly passes by
# Keras, and by the policy.
_RAW_PRODUCTS = {
    **dict.fromkeys(("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), "matmul"),
    **dict.fromkeys(("SparseTensorDenseMatMul", "SparseMatMul"), None),
    "Einsum": "einsum",
    **dict.fromkeys(("Conv", "Conv2D", "Conv3D"), "conv"),
    **dict.fromkeys(("Conv2DBackpropInput", "Conv3DBackpropInputV2"), "conv_transpose"),
    "DepthwiseConv2dNative": "depthwise_conv",
    "DepthwiseConv2dNativeBackpropInput": None,
}
_DFP_PRODUCTS = frozenset(["DfpMatmul", "DfpConv", "DfpConvBackpropInput"])


@dataclasses.dataclass(frozen=True)
class TracedProduct:
    """One traced product: `layer` ran `operation` as `decision` says, in the graph `graph`.

    `operands` are the tensors that it quantized, or found quantized, in a graph.
    """

    layer: keras.layers.Layer | None
    operation: str
    decision: Decision
    graph: tf.Graph
    operands: list[Quantized] = dataclasses.field(default_factory=list, compare=False)


@dataclasses.dataclass(frozen=True)
class Normalization:
    """One traced call of a `BatchNormalization`.

    Attributes:
        layer: The layer.
        x: What it normalised.
        mean: With which mean.
        reason: Why not on the native op; empty if it did.
        whole: Whether the statistics are native too, and their gradient a part of the op's.
    """

    layer: keras.layers.Layer
    x: tf.Tensor
    mean: tf.Tensor
    reason: str
    whole: bool


class Recording(list[TracedProduct]):
    """The products that were traced, in their order, and what else was seen.

    Attributes:
        normalizations: What batch norm did.
        makers: From an op of a graph to the layer that made it.
        graph: The graph that `trace` traced the model in; not set by `record`.
    """

    graph: tf.Graph

    def __init__(self) -> None:
        super().__init__()
        self.normalizations: list[Normalization] = []
        self.makers: dict[tf.Operation, keras.layers.Layer | None] = {}


class _State(threading.local):
    def __init__(self) -> None:
        self.products: Recording | None = None
        self.operands: list[Quantized] = []
        self.inside_product = False


_state = _State()


@contextlib.contextmanager
def record() -> Iterator[Recording]:
    """Collects the products traced inside the `with` block, by layer.

    Besides those that pass the dispatcher, it sees the multiplying TensorFlow ops that a layer
    creates directly, such as `tf.matmul`.
    """
    recorded = _state.products = Recording()
    _state.operands = []
    op_callbacks.add_op_callback(_watch_op)
    try:
        with noted(_state.operands.append):
            yield recorded
    finally:
        op_callbacks.remove_op_callback(_watch_op)
        _state.products, _state.operands = None, []


def active() -> bool:
    """Returns whether somebody is recording."""
    return _state.products is not None


class TraceError(ValueError):
    """A model cannot be called with the inputs it was to be traced with."""


def trace(model: keras.layers.Layer, inputs) -> Recording:
    """Returns what a model multiplies in the forward pass of a training step.

    Args:
        model: A Keras model or layer.
        inputs: The `KerasTensor`s it is called with, in their structure.

    Raises:
        TraceError: If it cannot be called with them.
    """

    def call(*args):
        products.graph = tf.compat.v1.get_default_graph()
        return model(*args, training=True)

    functions_run_eagerly = tf.config.functions_run_eagerly()
    # What a tf.function of the user's multiplies shows only while it is traced, and it may have
    # been before; so it is inlined. One that needs AutoGraph cannot be.
    for inline in (True, False):
        tf.config.run_functions_eagerly(inline)
        try:
            with record() as products:
                compute_output_spec(call, inputs)
            return products
        except Exception as exception:
            error = exception
        finally:
            tf.config.run_functions_eagerly(functions_run_eagerly)
    raise TraceError(
        f"describe: model '{model.name}' cannot be called with inputs {inputs}. Pass inputs=, an "
        f"example batch or keras.Input()s. The model raised: {error}"
    ) from error


@contextlib.contextmanager
def product(layer, operation: str, decision: Decision) -> Iterator[None]:
    """Marks what a product of the dispatcher runs, and notes it if somebody is recording."""
    recorded = _state.products
    if recorded is None or _state.inside_product:
        yield
        return
    _state.operands.clear()
    noticed = _note(recorded, layer, operation, decision)
    _state.inside_product = True
    try:
        yield
    finally:
        _state.inside_product = False
        noticed.operands.extend(_state.operands)
        _state.operands.clear()


def normalized(layer, x, mean, reason: str = "", whole: bool = False) -> None:
    """Notes a call of a `BatchNormalization` if somebody is recording, as `Normalization` says."""
    if _state.products is not None:
        _state.products.normalizations.append(Normalization(layer, x, mean, reason, whole))


def _watch_op(op_type, inputs, attrs, outputs, op_name=None, graph=None):
    if _state.products is None:
        return
    if graph is not None and outputs:
        _state.products.makers[outputs[0].op] = calling_layer()
    if _state.inside_product:
        return
    if op_type in _RAW_PRODUCTS:
        layer = calling_layer()
        _note(_state.products, layer, op_type, _decide_raw(layer, op_type))
    elif op_type in _DFP_PRODUCTS:
        decision = Decision(ops.current_format(), "calls keras_dfp.ops")
        _note(_state.products, calling_layer(), op_type, decision).operands.extend(_state.operands)
        _state.operands.clear()


def _decide_raw(layer, op_type) -> Decision:
    decision = decide(layer)
    if decision.format is None:
        return decision
    reason, name = f"calls TensorFlow's {op_type} directly", _RAW_PRODUCTS[op_type]
    if name is not None:
        reason += f"; to run it on integers, write keras.ops.{name}"
    return Decision(None, reason)


def _note(recorded: Recording, layer, operation, decision) -> TracedProduct:
    graph = tf.compat.v1.get_default_graph()
    recorded.append(TracedProduct(layer, operation, decision, graph))
    return recorded[-1]
