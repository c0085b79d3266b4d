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
from keras_dfp.backend.calling import Decision, calling_layer

# TensorFlow ops that multiply. Whoever calls them directly passes by Keras, and by the policy.
_RAW_PRODUCTS = frozenset(
    """MatMul BatchMatMul BatchMatMulV2 BatchMatMulV3 Einsum SparseTensorDenseMatMul SparseMatMul
    Conv Conv2D Conv2DBackpropInput Conv3D Conv3DBackpropInputV2 DepthwiseConv2dNative
    DepthwiseConv2dNativeBackpropInput""".split()
)
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
        _note(calling_layer(), op_type, Decision(None, f"calls TensorFlow's {op_type} directly"))
    elif op_type in _DFP_PRODUCTS:
        _note(calling_layer(), op_type, Decision(ops.current_format(), "calls keras_dfp.ops"))


def _note(layer, operation, decision):
    graph = tf.compat.v1.get_default_graph()
    _state.products.append(Product(layer, operation, decision, graph))
