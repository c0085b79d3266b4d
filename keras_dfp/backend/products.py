"""The functions of Keras's TensorFlow backend that multiply, routed to integers."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading

import keras
import numpy as np
import tensorflow as tf

from keras_dfp import auditing, comparing, internals, ops
from keras_dfp.backend import recording
from keras_dfp.backend.calling import ATTENTION, Decision, calling_layer, decide, in_scope
from keras_dfp.backend.losses import site_of
from keras_dfp.backend.registry import replaces
from keras_dfp.operand import site_scope
from keras_dfp.product import refuse_xla

# The operands come first; what follows them are the options that keras_dfp.ops takes too.
_CONV = "strides padding data_format dilation_rate"
_PRODUCTS = (
    (internals.nn, "conv", 2, f"* * {_CONV}"),
    (internals.nn, "depthwise_conv", 2, f"* * {_CONV}"),
    (internals.nn, "separable_conv", 3, f"* * * {_CONV}"),
    (
        internals.nn,
        "conv_transpose",
        2,
        "* * strides padding output_padding data_format dilation_rate",
    ),
    (
        internals.nn,
        "dot_product_attention",
        3,
        "* * * bias mask scale is_causal flash_attention attn_logits_soft_cap",
    ),
    (internals.numpy, "matmul", 2, "* *"),
    (internals.numpy, "dot", 2, "* *"),
    (internals.numpy, "tensordot", 2, "* * axes"),
)


class _State(threading.local):
    stock = False


_state = _State()


@contextlib.contextmanager
def _stock():
    """Leaves to Keras whatever is multiplied inside: the parts of what stays FP32."""
    outer, _state.stock = _state.stock, True
    try:
        yield
    finally:
        _state.stock = outer


def _route(name: str, split, original):
    """Returns the function that stands for `original` while the plugin is installed.

    Args:
        name: The function's name, in Keras and in `keras_dfp.ops`.
        split: Takes the arguments of a call and returns its operands, and a function that calls
            another function with other operands and the rest of the arguments.
        original: Keras's function.
    """
    ours = getattr(ops, name)

    @functools.wraps(original)
    def dispatch(*args, **kwargs):
        if _state.stock:
            return original(*args, **kwargs)
        layer = calling_layer()
        decision = decide(layer)
        if decision.format is not None:
            operands, again = split(*args, **kwargs)
            decision = _check_operands(decision, name, operands)
        if decision.format is not None:
            outer = _is_outer(name, args, kwargs, operands)
            decision = in_scope(decision, layer, name, operands, outer)
        with recording.product(layer, name, decision):
            if decision.format is None:
                with _stock():
                    return original(*args, **kwargs)
            refuse_xla(f"layer '{layer.path or layer.name}'")
            # What attention multiplies its values by is meant to be near zero where it is.
            watched = (1,) if isinstance(layer, ATTENTION) else (0, 1)

            def on_integers(*operands, site=None):
                site = site_of(layer) if site is None else site
                with ops.format_scope(decision.format), site_scope(site, watched):
                    return again(ours, operands)

            def stock(*operands):
                with _stock():
                    return again(original, operands)

            audit, comparison = auditing.current(), comparing.current()
            if audit is not None and tf.executing_eagerly():
                return audit.product(layer, name, decision.format, operands, on_integers, stock)
            y = on_integers(*operands)
            if comparison is None or not comparison.wants(layer):
                return y
            # What is computed to compare is no part of the layer's statistics.
            nameless = functools.partial(on_integers, site="")
            return comparison.watch(layer, operands, nameless, stock, y)

    return dispatch


def _is_outer(name: str, args, kwargs, operands) -> bool:
    """Tells whether a product of two operands sums over nothing."""
    if name == "einsum":
        inputs, arrow, output = str(args[0]).replace(" ", "").partition("->")
        # Without an arrow, what occurs twice is summed.
        summed = set(inputs) - {*output, ",", "."} if arrow else max(map(inputs.count, inputs)) > 1
        return len(operands) == 2 and not summed
    if name == "tensordot":
        axes = args[2] if len(args) > 2 else kwargs.get("axes", 2)
        return axes is not None and np.size(axes) == 1 and bool(np.all(np.equal(axes, 0)))
    if name in ("matmul", "dot"):
        shape = tf.TensorShape(operands[0].shape)
        return shape.rank is not None and shape.rank > 1 and shape[-1] == 1
    return False


def _check_operands(decision: Decision, name: str, operands) -> Decision:
    """Leaves to stock Keras what is not float32: mixed precision, integers, sparse tensors.

    And of which nothing is known while it is traced: what Python computes in a graph, for one.
    """
    kinds = (tf.Tensor, tf.Variable, keras.Variable, np.ndarray)
    for operand in operands:
        if not isinstance(operand, kinds):
            return Decision(None, f"an operand is a {type(operand).__name__}")
        dtype = keras.backend.standardize_dtype(operand.dtype)
        if dtype != "float32":
            return Decision(None, f"an operand is {dtype}")
        if tf.TensorShape(operand.shape).rank is None:
            return Decision(None, "the rank of an operand is not known; set_shape tells it")
    if "conv" in name and any(None in kernel.shape[:-2] for kernel in operands[1:]):
        return Decision(None, "the size of the kernel is not known; set_shape tells it")
    return decision


def _register(owner, name: str, operands: int, parameters: str) -> None:
    @replaces(owner, name, parameters, called_by=getattr(keras.ops, name))
    def make(original):
        signature = inspect.signature(original)

        def split(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            rest = dict(list(given.items())[operands:])
            return list(given.values())[:operands], lambda f, changed: f(*changed, **rest)

        return _route(name, split, original)


for _product in _PRODUCTS:
    _register(*_product)


@replaces(internals.numpy, "einsum", "subscripts operands kwargs", called_by=keras.ops.einsum)
def _einsum(original):
    def split(subscripts, *operands, **kwargs):
        return operands, lambda f, changed: f(subscripts, *changed, **kwargs)

    return _route("einsum", split, original)


# `x @ w` of two tensors, or of a tensor and a variable, is TensorFlow's operator. That of a
# keras.Variable is keras.ops.matmul.


def _split_pair(x1, x2):
    return (x1, x2), lambda f, changed: f(*changed)


@replaces(tf.Tensor, "__matmul__", "* *")
@replaces(tf.Variable, "__matmul__", "* *")
def _operator(original):
    return _route("matmul", _split_pair, original)


@replaces(tf.Tensor, "__rmatmul__", "* *")
@replaces(tf.Variable, "__rmatmul__", "* *")
def _reflected_operator(original):
    dispatch = _route("matmul", _split_pair, lambda x1, x2: original(x2, x1))

    @functools.wraps(original)
    def reflected(x2, x1):
        return dispatch(x1, x2)

    return reflected


# ---- convolutions that move data -----------------------------------------------------------------


def _register_movement(name: str) -> None:
    caller = getattr(keras.ops.image, name.lstrip("_"))

    @replaces(internals.image, name, "...", called_by=caller)
    def make(original):
        @functools.wraps(original)
        def move(*args, **kwargs):
            with recording.product(calling_layer(), name.lstrip("_"), _MOVEMENT), _stock():
                return original(*args, **kwargs)

        return move


_MOVEMENT = Decision(None, "moves data; a convolution on integers would round it")

# They multiply by an identity matrix.
_register_movement("_extract_patches")
if hasattr(keras.ops.image, "extract_patches_3d"):  # since Keras 3.13
    _register_movement("_extract_patches_3d")
