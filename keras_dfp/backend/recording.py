"""Watching a model being traced: which layer multiplied what, and how."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import keras
import tensorflow as tf
from tensorflow.python.framework import op_callbacks

from keras_dfp import ops
from keras_dfp.backend.calling import Decision, calling_layer, decide

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
class Product:
    """One traced product: `layer` ran `operation` as `decision` says, in the graph `graph`."""

    layer: keras.layers.Layer | None
    operation: str
    decision: Decision
    graph: tf.Graph


class _State(threading.local):
    products: list[Product] | None = None
    inside_product = False


_state = _State()


@contextlib.contextmanager
def record() -> Iterator[list[Product]]:
    """Collects the products traced inside the `with` block, by layer.

    Besides those that pass the dispatcher, it sees the multiplying TensorFlow ops that a layer
    creates directly, such as `tf.matmul`.
    """
    _state.products = []
    op_callbacks.add_op_callback(_watch_op)
    try:
        yield _state.products
    finally:
        op_callbacks.remove_op_callback(_watch_op)
        _state.products = None


def active() -> bool:
    """Returns whether somebody is recording."""
    return _state.products is not None


class TraceError(ValueError):
    """A model cannot be called with the inputs it was to be traced with."""


def trace(model: keras.layers.Layer, inputs) -> list[Product]:
    """Returns what a model multiplies in the forward pass of a training step.

    Args:
        model: A Keras model or layer.
        inputs: The `KerasTensor`s it is called with, in their structure.

    Raises:
        TraceError: If it cannot be called with them.
    """
    functions_run_eagerly = tf.config.functions_run_eagerly()
    # What a tf.function of the user's multiplies shows only while it is traced, and it may have
    # been before; so it is inlined. One that needs AutoGraph cannot be.
    for inline in (True, False):
        tf.config.run_functions_eagerly(inline)
        try:
            with record() as products:
                keras.src.backend.compute_output_spec(model, inputs, training=True)
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
    if _state.products is None or _state.inside_product:
        yield
        return
    _note(layer, operation, decision)
    _state.inside_product = True
    try:
        yield
    finally:
        _state.inside_product = False


def _watch_op(op_type, inputs, attrs, outputs, op_name=None, graph=None):
    if _state.products is None or _state.inside_product:
        return
    if op_type in _RAW_PRODUCTS:
        _note(layer := calling_layer(), op_type, _decide_raw(layer, op_type))
    elif op_type in _DFP_PRODUCTS:
        _note(calling_layer(), op_type, Decision(ops.current_format(), "calls keras_dfp.ops"))


def _decide_raw(layer, op_type) -> Decision:
    decision = decide(layer)
    if decision.format is None:
        return decision
    reason, name = f"calls TensorFlow's {op_type} directly", _RAW_PRODUCTS[op_type]
    if name is not None:
        reason += f"; to run it on integers, write keras.ops.{name}"
    return Decision(None, reason)


def _note(layer, operation, decision):
    graph = tf.compat.v1.get_default_graph()
    _state.products.append(Product(layer, operation, decision, graph))
