"""The products of `keras.ops`, on INT16 dynamic fixed point.

Same signatures and same shapes as in `keras.ops`; float32 in, float32 out, integers in between:

    y = keras_dfp.ops.conv(x, kernel, padding="same")

They run eagerly, in graphs and on Keras's symbolic tensors, and are differentiable; their gradients
are products of the same kind. The format is that of the innermost `format_scope`, else the global
policy's, else `DFPFormat()`. Nothing is converted silently: a tensor that is not float32 is a
TypeError.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import threading
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf

from keras_dfp import contraction
from keras_dfp.attention import Seen
from keras_dfp.convolution import Convolution, channels_last
from keras_dfp.number import DFPFormat
from keras_dfp.operand import watch_only
from keras_dfp.product import as_float32, sizes

__all__ = [
    "conv",
    "conv_transpose",
    "current_format",
    "depthwise_conv",
    "dot",
    "dot_product_attention",
    "einsum",
    "format_scope",
    "matmul",
    "separable_conv",
    "tensordot",
]

# ---- the format ----------------------------------------------------------------------------------

_local = threading.local()


def _no_format() -> DFPFormat | None:
    return None


# Says which format holds outside of every scope; the policy module puts the global policy's here.
default_format: Callable[[], DFPFormat | None] = _no_format


def current_format() -> DFPFormat:
    """Returns the format in which the ops compute now."""
    scopes = getattr(_local, "formats", ())
    return scopes[-1] if scopes else default_format() or DFPFormat()


@contextlib.contextmanager
def format_scope(fmt: DFPFormat) -> Iterator[None]:
    """Makes `fmt` the format of the ops called inside, on this thread."""
    if not hasattr(_local, "formats"):
        _local.formats = []
    _local.formats.append(fmt)
    try:
        yield
    finally:
        _local.formats.pop()


# ---- Keras's symbolic tensors --------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPOperation(keras.Operation):
    """One of the ops below as a node of a functional model; it keeps the format it was built with.

    Args:
        op: Name of the op.
        fmt: The fields of its `DFPFormat`.
        name: Name of the node.
    """

    def __init__(self, op: str, fmt: dict, *, name: str | None = None):
        super().__init__(name=name)
        self.op = op
        self.fmt = fmt

    def call(self, *args, **kwargs):
        with format_scope(DFPFormat(**self.fmt)):
            return _OPS[self.op](*args, **kwargs)


_OPS: dict[str, Callable] = {}


def _op(function):
    """Lets an op take Keras's symbolic tensors, and keeps AutoGraph from rewriting it."""
    name = function.__name__

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if any(isinstance(x, keras.KerasTensor) for x in (*args, *kwargs.values())):
            return DFPOperation(name, dataclasses.asdict(current_format()))(*args, **kwargs)
        return function(*args, **kwargs)

    _OPS[name] = tf.autograph.experimental.do_not_convert(wrapper)
    return _OPS[name]


# ---- convolutions --------------------------------------------------------------------------------


@_op
def conv(inputs, kernel, strides=1, padding="valid", data_format=None, dilation_rate=1):
    """`keras.ops.conv` in dynamic fixed point: convolution in one, two or three dimensions.

    Args:
        inputs: float32 tensor of rank N+2.
        kernel: float32 tensor `(spatial..., channels / groups, filters)`.
        strides: int or N ints.
        padding: `"valid"` or `"same"`.
        data_format: `"channels_last"`, `"channels_first"` or None for Keras's default.
        dilation_rate: int or N ints; not above 1 together with `strides`.

    Returns:
        float32 tensor of rank N+2.

    Raises:
        TypeError: If a tensor is not float32.
        ValueError: If shapes or arguments do not fit.

    Example:

    >>> keras_dfp.ops.conv(tf.ones((1, 4, 4, 2)), tf.ones((3, 3, 2, 5))).shape
    TensorShape([1, 2, 2, 5])
    """
    fmt = current_format()
    args = Convolution("conv", fmt, inputs, kernel, strides, padding, data_format, dilation_rate)
    if max(args.strides) > 1 and max(args.dilations) > 1:
        args.fail("`strides` and `dilation_rate` must not both be above 1")
    channels, (per_group, filters) = args.channels, args.kernel.shape[-2:]
    if None not in (channels, per_group, filters) and channels != per_group:
        groups = channels // per_group if per_group else 0
        if groups * per_group != channels or groups == 0 or filters % groups:
            args.fail(
                f"the input's {channels} channels must be a multiple of the kernel's {per_group}, "
                f"and its {filters} filters a multiple of the number of groups"
            )
    return args.convolve(depthwise=False)


@_op
def depthwise_conv(inputs, kernel, strides=1, padding="valid", data_format=None, dilation_rate=1):
    """`keras.ops.depthwise_conv` in dynamic fixed point, in one or two dimensions.

    Args:
        inputs: float32 tensor of rank N+2.
        kernel: float32 tensor `(spatial..., channels, multiplier)`.
        strides: int or N ints.
        padding: `"valid"` or `"same"`.
        data_format: `"channels_last"`, `"channels_first"` or None for Keras's default.
        dilation_rate: int or N ints.

    Returns:
        float32 tensor of rank N+2 with `channels * multiplier` channels.

    Raises:
        TypeError: If a tensor is not float32.
        ValueError: If shapes or arguments do not fit.
    """
    given = (inputs, kernel, strides, padding, data_format, dilation_rate)
    args = Convolution("depthwise_conv", current_format(), *given, most=2)
    channels = args.kernel.shape[-2]
    if None not in (args.channels, channels) and args.channels != channels:
        args.fail(f"the input has {args.channels} channels, the kernel {channels}")
    return args.convolve(depthwise=True)


@_op
def separable_conv(
    inputs,
    depthwise_kernel,
    pointwise_kernel,
    strides=1,
    padding="valid",
    data_format=None,
    dilation_rate=1,
):
    """`keras.ops.separable_conv` in dynamic fixed point: `depthwise_conv`, then a 1x1 `conv`.

    Args:
        inputs: float32 tensor of rank N+2, N 1 or 2.
        depthwise_kernel: float32 tensor `(spatial..., channels, multiplier)`.
        pointwise_kernel: float32 tensor `(1..., channels * multiplier, filters)`.
        strides: int or N ints.
        padding: `"valid"` or `"same"`.
        data_format: `"channels_last"`, `"channels_first"` or None for Keras's default.
        dilation_rate: int or N ints.

    Returns:
        float32 tensor of rank N+2.

    Raises:
        TypeError: If a tensor is not float32.
        ValueError: If shapes or arguments do not fit.
    """
    pointwise = as_float32("separable_conv", "pointwise_kernel", pointwise_kernel)
    if any(n != 1 for n in pointwise.shape[:-2]):
        raise ValueError(
            "keras_dfp.ops.separable_conv: `pointwise_kernel` must have spatial sizes of 1; "
            f"received shape {pointwise.shape}."
        )
    y = depthwise_conv(inputs, depthwise_kernel, strides, padding, data_format, dilation_rate)
    if pointwise.shape[-2] != y.shape[-1 if channels_last("separable_conv", data_format) else 1]:
        raise ValueError(
            "keras_dfp.ops.separable_conv: `pointwise_kernel` must take the channels of the "
            f"depthwise convolution; received shape {pointwise.shape} for an intermediate result "
            f"of shape {y.shape}."
        )
    return conv(y, pointwise, 1, "valid", data_format)


@_op
def conv_transpose(
    inputs,
    kernel,
    strides=1,
    padding="valid",
    output_padding=None,
    data_format=None,
    dilation_rate=1,
):
    """`keras.ops.conv_transpose` in dynamic fixed point, in one, two or three dimensions.

    Args:
        inputs: float32 tensor of rank N+2.
        kernel: float32 tensor `(spatial..., filters, channels)`.
        strides: int or N ints.
        padding: `"valid"` or `"same"`.
        output_padding: int, N ints, or None to infer the output's size.
        data_format: `"channels_last"`, `"channels_first"` or None for Keras's default.
        dilation_rate: int or N ints.

    Returns:
        float32 tensor of rank N+2.

    Raises:
        TypeError: If a tensor is not float32.
        ValueError: If shapes or arguments do not fit.
    """
    given = (inputs, kernel, strides, padding, data_format, dilation_rate)
    args = Convolution("conv_transpose", current_format(), *given)
    channels = args.kernel.shape[-1]
    if None not in (args.channels, channels) and args.channels != channels:
        args.fail(f"the input has {args.channels} channels, the kernel takes {channels}")
    return args.transposed(output_padding)


# ---- contractions --------------------------------------------------------------------------------


def _pair(op: str, x1, x2):
    return as_float32(op, "x1", x1), as_float32(op, "x2", x2)


@_op
def matmul(x1, x2):
    """`keras.ops.matmul` in dynamic fixed point; broadcasts as NumPy does.

    Args:
        x1: float32 tensor, at least 1-D.
        x2: float32 tensor, at least 1-D.

    Returns:
        float32 tensor.

    Raises:
        TypeError: If a tensor is not float32.
        ValueError: If the shapes do not fit.

    Example:

    >>> keras_dfp.ops.matmul([[1.0, 2.0]], [[3.0], [4.0]])
    <tf.Tensor: shape=(1, 1), dtype=float32, numpy=array([[11.]], dtype=float32)>
    """
    return contraction.matmul("matmul", current_format(), *_pair("matmul", x1, x2))


@_op
def dot(x1, x2):
    """`keras.ops.dot` in dynamic fixed point: the last axis of x1 meets the last but one of x2.

    Args:
        x1: float32 tensor of any rank.
        x2: float32 tensor of any rank; of a 1-D one the only axis is summed over. If either is a
            scalar, the result is the elementwise product.

    Returns:
        float32 tensor.

    Raises:
        TypeError: If a tensor is not float32.
        ValueError: If the shapes do not fit.
    """
    x1, x2 = _pair("dot", x1, x2)
    ranks = x1.shape.rank, x2.shape.rank
    axes = ([], []) if 0 in ranks else ([ranks[0] - 1], [max(0, ranks[1] - 2)])
    return contraction.tensordot("dot", current_format(), x1, x2, *axes)


@_op
def tensordot(x1, x2, axes=2):
    """`keras.ops.tensordot` in dynamic fixed point.

    Args:
        x1: float32 tensor.
        x2: float32 tensor.
        axes: int n to sum over the last n axes of x1 and the first n of x2, or a pair of axes or
            of sequences of axes, one for each tensor.

    Returns:
        float32 tensor: the free axes of x1, then those of x2.

    Raises:
        TypeError: If a tensor is not float32.
        ValueError: If the shapes or the axes do not fit.
    """
    x1, x2 = _pair("tensordot", x1, x2)
    ranks = x1.shape.rank, x2.shape.rank
    try:
        if np.iterable(axes):
            first, second = axes
            pairs = [[operator.index(i) for i in np.atleast_1d(side)] for side in (first, second)]
        else:
            n = operator.index(axes)
            pairs = [list(range(ranks[0] - n, ranks[0])), list(range(n))]
        valid = len(pairs[0]) == len(pairs[1])
        for i, rank in enumerate(ranks):
            valid = valid and all(-rank <= axis < rank for axis in pairs[i])
            pairs[i] = [axis % rank for axis in pairs[i]] if valid else []
            valid = valid and len(set(pairs[i])) == len(pairs[i])
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(
            "keras_dfp.ops.tensordot: `axes` must be an int or a pair of axes, as many of x1 as of "
            f"x2; received {axes!r} for x1 of shape {x1.shape} and x2 of shape {x2.shape}."
        )
    return contraction.tensordot("tensordot", current_format(), x1, x2, *pairs)


@_op
def einsum(subscripts, *operands, **kwargs):
    """`keras.ops.einsum` in dynamic fixed point.

    Two operands make one product: one exact dot product per element of the result. More are
    multiplied from left to right, each intermediate result quantized again. A single operand (a
    transpose, a sum, a trace) is not a product and is computed in float32; so is the diagonal of
    an operand that repeats a label.

    Args:
        subscripts: As NumPy's, with `...` and with or without `->`; without, the result's labels
            come in the order of their appearance, as in Keras on TensorFlow.
        *operands: float32 tensors.
        **kwargs: `optimize` is accepted and has no effect.

    Returns:
        float32 tensor.

    Raises:
        TypeError: If a tensor is not float32.
        ValueError: If subscripts and shapes do not fit.

    Example:

    >>> keras_dfp.ops.einsum("btd,dnh->btnh", tf.ones((2, 3, 4)), tf.ones((4, 5, 6))).shape
    TensorShape([2, 3, 5, 6])
    """
    if unknown := set(kwargs) - {"optimize"}:
        raise TypeError(f"keras_dfp.ops.einsum: unexpected arguments {sorted(unknown)}.")
    if not operands or not isinstance(subscripts, str):
        raise ValueError(
            "keras_dfp.ops.einsum: expected a string of subscripts and at least one operand; "
            f"received {subscripts!r} and {len(operands)} operands."
        )
    tensors = [as_float32("einsum", f"operands[{i}]", x) for i, x in enumerate(operands)]
    return contraction.einsum("einsum", current_format(), subscripts, tensors)


@_op
def dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    scale=None,
    is_causal=False,
    flash_attention=None,
    attn_logits_soft_cap=None,
):
    """`keras.ops.dot_product_attention` with both products in dynamic fixed point.

    Args:
        query: float32 tensor `(B, T, N, H)`.
        key: float32 tensor `(B, S, K, H)`; K is N, 1, or divides N.
        value: float32 tensor of the shape of `key`.
        bias: Added to the logits; broadcastable to `(B, N, T, S)`.
        mask: Boolean, True where an element takes part; broadcastable to `(B, N, T, S)`. What no
            query sees, whatever it holds, does not touch the rounding of the rest.
        scale: Factor of the logits; None for `1 / sqrt(H)`.
        is_causal: Whether to mask what comes after the query's position.
        flash_attention: Must be None or False, as in Keras's TensorFlow backend.
        attn_logits_soft_cap: Must be None, as in Keras's TensorFlow backend.

    Returns:
        float32 tensor `(B, T, N, H)`.

    Raises:
        TypeError: If query, key or value is not float32.
        ValueError: If shapes do not fit or an argument is not supported.
    """
    op = "dot_product_attention"
    if flash_attention or attn_logits_soft_cap is not None:
        raise ValueError(
            f"keras_dfp.ops.{op}: `flash_attention` and `attn_logits_soft_cap` are not available "
            f"on TensorFlow; received {flash_attention!r} and {attn_logits_soft_cap!r}."
        )
    names = ("query", "key", "value")
    query, key, value = (
        as_float32(op, name, x) for name, x in zip(names, (query, key, value), strict=True)
    )
    if any(x.shape.rank != 4 for x in (query, key, value)):
        raise ValueError(
            f"keras_dfp.ops.{op}: `query`, `key` and `value` must have rank 4; received shapes "
            f"{query.shape}, {key.shape} and {value.shape}."
        )
    heads, kv_heads = query.shape[2], key.shape[2]
    if None in (heads, kv_heads):
        key, value = (_for_all_heads(op, x, query) for x in (key, value))
        kv_heads = key.shape[2]
    elif heads > kv_heads > 1:
        if heads % kv_heads:
            raise ValueError(
                f"keras_dfp.ops.{op}: the {heads} heads of `query` must be a multiple of the "
                f"{kv_heads} of `key`; received shapes {query.shape} and {key.shape}."
            )
        key, value = (tf.repeat(x, heads // kv_heads, axis=2) for x in (key, value))
    one_head = kv_heads == 1 != heads
    keys = "bsh" if one_head else "bsnh"
    if one_head:
        key, value = tf.squeeze(key, 2), tf.squeeze(value, 2)

    seen, whole = None, value
    if mask is not None or is_causal:
        seen = Seen(_visible(query, key, mask, is_causal), "bnts")
    if mask is not None:
        query, key, value = (
            seen.hide(x, labels) for x, labels in ((query, "btnh"), (key, keys), (value, keys))
        )
    logits = einsum(f"btnh,{keys}->bnts", query, key)
    if scale is None:
        scale = 1.0 / tf.sqrt(tf.cast(tf.shape(query)[-1], tf.float32))
    logits *= tf.cast(scale, tf.float32)
    if bias is not None:
        logits += tf.cast(bias, tf.float32)
    if seen is not None:
        # Keras's own value: far below any logit, and far from the largest float32.
        logits = tf.where(seen.mask, logits, -0.7 * 3.38953e38)
    # Weights near zero are meant to be: only the values are looked at.
    with watch_only(1):
        y = einsum(f"bnts,{keys}->btnh", tf.nn.softmax(logits), value)
    return y if mask is None else seen.or_mean(y, "btnh", whole, keys)


def _for_all_heads(op, x, query):
    """Returns keys or values with a head for each of the query's; who has how many, is seen late.

    One head of keys is not repeated if it is known to be one.
    """
    if x.shape[2] == 1:
        return x
    heads, own = sizes(query)[2], sizes(x)[2]
    remainder = tf.math.floormod(heads, tf.maximum(own, 1))
    check = tf.debugging.assert_equal(
        remainder, 0, f"keras_dfp.ops.{op}: the heads of `query` must be a multiple of `key`'s."
    )
    with tf.control_dependencies([] if check is None else [check]):
        x = tf.repeat(x, heads // tf.maximum(own, 1), axis=2)
    x.set_shape([*x.shape[:2], query.shape[2], x.shape[3]])
    return x


def _visible(query, key, mask, is_causal):
    """Returns the mask of what queries see, broadcastable to the logits."""
    visible = []
    if mask is not None:
        visible.append(tf.cast(mask, tf.bool))
    if is_causal:
        ones = tf.ones([sizes(query)[1], sizes(key)[1]], tf.bool)
        visible.append(tf.linalg.band_part(ones, -1, 0))
    return functools.reduce(tf.logical_and, visible)
