"""What all of `ops` shares: checking a tensor, laying it out for a native op, multiplying two."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from keras_dfp import native
from keras_dfp.internals import control_flow_util
from keras_dfp.native import Factor, Operand, ProductOp
from keras_dfp.number import DFPFormat
from keras_dfp.operand import Size, current_site, is_weight, reshape
from keras_dfp.operand import operand as make_operand


def as_float32(op: str, argument: str, x):
    """Returns `x` as a `tf.Tensor` or `tf.Variable`, refusing what is not float32."""
    is_variable = isinstance(x, keras.Variable)
    if is_variable:
        x = x.value
    if isinstance(x, tf.SparseTensor | tf.RaggedTensor):
        raise TypeError(
            f"keras_dfp.ops.{op}: `{argument}` must be a dense tensor; received a "
            f"{type(x).__name__} of shape {x.shape}. Use keras.ops.{op} for it."
        )
    if not isinstance(x, tf.Variable):
        x = tf.convert_to_tensor(x)
    if x.dtype != tf.float32:
        raise TypeError(
            f"keras_dfp.ops.{op}: `{argument}` must be float32; received {x.dtype.name} of shape "
            f"{x.shape}. Cast it with keras.ops.cast, or use keras.ops.{op}."
        )
    if x.shape.rank is None:
        raise ValueError(f"keras_dfp.ops.{op}: the rank of `{argument}` must be known.")
    if is_variable and not isinstance(x, tf.Variable):
        # In a call without state, a variable's value is a tensor.
        x._dfp_variable = True
    return x


def sizes(x) -> list[Size]:
    """Returns the sizes of a tensor's axes."""
    if x.shape.is_fully_defined():
        return x.shape.as_list()
    dynamic = tf.shape(x)
    return [dynamic[i] if n is None else n for i, n in enumerate(x.shape.as_list())]


def total(group: Sequence[Size]) -> Size:
    """Returns the product of sizes."""
    if 0 in [n for n in group if isinstance(n, int)]:
        return 0
    return functools.reduce(operator.mul, group) if group else 1


def check_size(op: str, shape: Sequence[Size], of: str):
    """Raises if a result of this shape has more elements than a tensor is allowed."""
    if all(isinstance(n, int) for n in shape) and math.prod(shape) >= 2**31:
        raise ValueError(
            f"keras_dfp.ops.{op}: the result of {of} would have shape {tuple(shape)}, "
            f"{math.prod(shape)} elements; at most 2**31 - 1 are allowed."
        )


class View:
    """A tensor laid out for a native op: expanded, transposed, reshaped.

    Args:
        x: The tensor or variable.
        tensor_id: Keeps apart the stochastic noise of the operands of one op.
        perm: How to transpose; empty for not at all.
        shape: How to reshape; None for not at all.
        expand: A function that repeats elements, applied first.
        group_axes: How many leading axes of `x` have an exponent for each of their indices.
        arrange: A function that brings these exponents into the order of the rows laid out.
    """

    def __init__(
        self,
        x,
        tensor_id: int,
        perm: Sequence[int] = (),
        shape: Sequence[Size] | None = None,
        expand: Callable | None = None,
        group_axes: int = 0,
        arrange: Callable | None = None,
    ):
        self.x = x
        self.tensor_id = tensor_id
        self.perm = () if list(perm) == list(range(len(perm))) else tuple(perm)
        self.shape = shape
        self.expand = expand
        self.group_axes = group_axes
        self.arrange = arrange

    def operand(self, fmt: DFPFormat) -> Operand:
        return make_operand(
            self.x,
            fmt,
            self.perm,
            tensor_id=self.tensor_id,
            expand=self.expand,
            group_axes=self.group_axes,
            arrange=self.arrange,
            shape=self.shape,
        )

    def float32(self) -> tf.Tensor:
        x = tf.convert_to_tensor(self.x)
        if self.expand is not None:
            x = self.expand(x)
        if self.perm:
            x = tf.transpose(x, self.perm)
        return x if self.shape is None else reshape(x, self.shape)


def has_groups(fmt: DFPFormat, x) -> bool:
    """Tells whether a tensor may have more than one exponent; variables always have one."""
    return fmt.exponents == "sample" and not is_weight(x)


def attributes(fmt: DFPFormat, *bits: str, swapped: bool = False, **others) -> dict:
    """Returns the attributes of a native op that computes in a format."""
    modes = ("weight_gradient", "input_gradient") if swapped else ProductOp.modes
    return {
        **dict.fromkeys(bits, fmt.mantissa_bits),
        "accumulation": fmt.accumulation,
        "rounding": fmt.rounding,
        "exponents": fmt.exponents,
        "fused": fmt.fused,
        "site": current_site(),
        "product": "forward",
        **{
            mode: "dfp" if product in fmt.products else "float32"
            for mode, product in zip(modes, ProductOp.modes, strict=True)
        },
        **others,
    }


def multiply(op: str, fmt: DFPFormat, product: ProductOp, first: View, second: View) -> tf.Tensor:
    """Returns the product of two tensors, each of its three products in the arithmetic of `fmt`."""
    refuse_xla(f"keras_dfp.ops.{op}")
    native.follow_thread_setting()
    if "forward" in fmt.products:
        return product.dfp(first.operand(fmt), second.operand(fmt))

    @tf.custom_gradient
    def float32_forward(a, b):
        def gradient(dy):
            return product.gradients(factor(a, first), factor(b, second), dy)

        return product.float32(a, b), gradient

    def factor(x, view):
        def quantized():
            if view.group_axes:
                # Laid out, its groups could not be told any more.
                return view.operand(fmt)
            return make_operand(x, fmt, tensor_id=view.tensor_id)

        return Factor(x, lambda: x, quantized)

    return float32_forward(first.float32(), second.float32())


def refuse_xla(what: str):
    """Raises while a function with `jit_compile=True` is traced; `what` runs on integers in it."""
    if tf.executing_eagerly():
        return
    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise RuntimeError(
            f"keras_dfp: {what} runs on integers inside a function with jit_compile=True, and XLA "
            "has no kernels for that. Use jit_compile=False, or dtype='float32' for this layer."
        )
