"""Products to be timed: the same operands, multiplied on integers and by stock TensorFlow.

Operands are random and ready: quantized for keras-dfp, cast for TensorFlow in bfloat16. What a
product does with them is timed: its result is float32, from TensorFlow in bfloat16 it is bfloat16.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import tensorflow as tf

from keras_dfp import native

PASSES = ("forward", "input gradient", "weight gradient")
# TensorFlow's side, by the name it has in a row.
DTYPES = {"float32": tf.float32, "bfloat16": tf.bfloat16}


class ProductCost(NamedTuple):
    """One product.

    Attributes:
        macs: How many pairs of numbers are multiplied; those with padding count too.
        bytes: Of the int16 operands and the float32 result.
        ways: Functions that compute it: "dfp", and by each dtype of TensorFlow.
    """

    macs: int
    bytes: int
    ways: dict[str, Callable]


class Tensor:
    """A random tensor in every form that is asked for.

    Args:
        shape: Its shape.
        against: The forms for TensorFlow.
        samples: Whether its first axis counts samples, or rows: each has an exponent then, and they
            differ as they do in training, by a factor of up to 16.
    """

    def __init__(self, shape: Sequence[int], against: Iterable[str], samples: bool):
        x = tf.random.normal(shape)
        if samples:
            x *= 2.0 ** tf.random.uniform([shape[0], *[1] * (len(shape) - 1)], 0, 4)
        self.shape = tuple(x.shape)
        self.size = math.prod(self.shape)
        self.floats = {name: tf.cast(x, DTYPES[name]) for name in against}
        self.quantize = lambda: native.lib.dfp_quantize(
            x=x, exponent=[], step=[], group_axes=int(samples)
        )
        # Kernels do not read the token; it carries gradients.
        self.operand = (*self.quantize()[:2], tf.zeros([0]))


def traffic(first: Tensor, second: Tensor, result: int) -> int:
    """Returns the bytes of two int16 operands and a float32 result of that many elements."""
    return 2 * first.size + 2 * second.size + 4 * result


def matmul(
    a: Tensor, b: Tensor, transpose_a: bool = False, transpose_b: bool = False
) -> ProductCost:
    """Returns the product of two matrices, either of them transposed."""
    how = {"transpose_a": transpose_a, "transpose_b": transpose_b}
    inner, rows = a.shape if transpose_a else a.shape[::-1]
    columns = b.shape[0 if transpose_b else 1]
    ways: dict[str, Callable] = {
        "dfp": lambda: native.lib.dfp_matmul(*a.operand, *b.operand, **how)
    }
    for name in a.floats:
        x, y = a.floats[name], b.floats[name]
        ways[name] = functools.partial(tf.linalg.matmul, x, y, **how)
    return ProductCost(rows * inner * columns, traffic(a, b, rows * columns), ways)


def dense(batch: int, inputs: int, outputs: int, against: Sequence[str]):
    """Returns the three passes of a dense layer, and the tensors x, w and dy they multiply."""
    x = Tensor([batch, inputs], against, samples=True)
    w = Tensor([inputs, outputs], against, samples=False)
    dy = Tensor([batch, outputs], against, samples=True)
    products = (
        matmul(x, w),
        matmul(dy, w, transpose_b=True),
        matmul(x, dy, transpose_a=True),
    )
    return dict(zip(PASSES, products, strict=True)), (x, w, dy)


def convolution(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    strides: Sequence[int],
    padding: str,
    depthwise: bool,
    against: Sequence[str],
):
    """Returns the three passes of a 2D convolution, and the tensors x, w and dy they multiply."""
    geometry = {"strides": list(strides), "padding": padding}
    integer = {**geometry, "dilations": [1, 1], "depthwise": depthwise}
    lib = native.lib
    x_sizes, w_sizes = tf.constant(x_shape), tf.constant(w_shape)

    x, w = Tensor(x_shape, against, samples=True), Tensor(w_shape, against, samples=False)
    y = lib.dfp_conv(*x.operand, *w.operand, **integer)
    dy = Tensor(y.shape, against, samples=True)
    macs = dy.size * math.prod(w_shape[: 2 if depthwise else 3])

    dfp = (
        lambda: lib.dfp_conv(*x.operand, *w.operand, **integer),
        lambda: lib.dfp_conv_backprop_input(x_sizes, *w.operand, *dy.operand, **integer),
        lambda: lib.dfp_conv_backprop_filter(*x.operand, w_sizes, *dy.operand, **integer),
    )
    moved = (traffic(x, w, dy.size), traffic(w, dy, x.size), traffic(x, dy, w.size))
    if depthwise:
        stock = functools.partial(_stock, "DepthwiseConv2dNative")
    elif x.shape[-1] == w.shape[-2]:
        stock = functools.partial(_stock, "Conv2D")
    else:
        stock = _stock_grouped
    ways = [{"dfp": function} for function in dfp]
    for name in against:
        functions = stock(x.floats[name], w.floats[name], dy.floats[name], **geometry)
        for way, function in zip(ways, functions, strict=True):
            way[name] = function
    products = (ProductCost(macs, b, way) for b, way in zip(moved, ways, strict=True))
    return dict(zip(PASSES, products, strict=True)), (x, w, dy)


def _stock(op, x, w, dy, strides, padding):
    how = {"strides": [1, *strides, 1], "padding": padding}
    forward, input_gradient, weight_gradient = (
        getattr(tf.raw_ops, op + what) for what in ("", "BackpropInput", "BackpropFilter")
    )
    x_sizes, w_sizes = tf.constant(x.shape), tf.constant(w.shape)
    return (
        lambda: forward(input=x, filter=w, **how),
        lambda: input_gradient(input_sizes=x_sizes, filter=w, out_backprop=dy, **how),
        lambda: weight_gradient(input=x, filter_sizes=w_sizes, out_backprop=dy, **how),
    )


def _stock_grouped(x, w, dy, strides, padding):
    # As Keras runs it: TensorFlow has no gradients for groups on the CPU, so Keras goes through
    # XLA, which drops what a result does not need.
    def compiled(function):
        return tf.function(function, jit_compile=True)

    def forward(x, w):
        return tf.nn.convolution(x, w, strides, padding)

    def input_gradient(x, w, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = forward(x, w)
        return tape.gradient(y, x, output_gradients=dy)

    def weight_gradient(x, w, dy):
        with tf.GradientTape() as tape:
            tape.watch(w)
            y = forward(x, w)
        return tape.gradient(y, w, output_gradients=dy)

    forward_, dx, dw = map(compiled, (forward, input_gradient, weight_gradient))
    return lambda: forward_(x, w), lambda: dx(x, w, dy), lambda: dw(x, w, dy)
