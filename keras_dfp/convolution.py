"""Convolutions: from the arguments of `keras.ops` to the native ops, which are channels-last."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_dfp.native import Conv, ConvInputGradient, Sizes
from keras_dfp.number import DFPFormat
from keras_dfp.product import (
    View,
    as_float32,
    attributes,
    check_size,
    has_groups,
    multiply,
    sizes,
)


def channels_last(op: str, data_format: str | None) -> bool:
    """Tells whether a data format, or Keras's default, is channels-last."""
    value = data_format or keras.config.image_data_format()
    if value not in ("channels_last", "channels_first"):
        raise ValueError(
            f"keras_dfp.ops.{op}: `data_format` must be 'channels_last' or 'channels_first'; "
            f"received {data_format!r}."
        )
    return value == "channels_last"


class Convolution:
    """The arguments of a convolution, checked.

    Args:
        op: Name of the public op.
        fmt: The format.
        inputs: The tensor that is convolved.
        kernel: The kernel.
        strides: int, or one per spatial dimension.
        padding: "valid" or "same".
        data_format: "channels_last", "channels_first" or None.
        dilation_rate: int, or one per spatial dimension, or None for 1.
        most: The most spatial dimensions that the op takes.

    Raises:
        TypeError: If a tensor is not float32.
        ValueError: If the arguments are no convolution.
    """

    def __init__(
        self,
        op: str,
        fmt: DFPFormat,
        inputs,
        kernel,
        strides,
        padding,
        data_format,
        dilation_rate,
        *,
        most: int = 3,
    ):
        self.op, self.fmt = op, fmt
        self.inputs = as_float32(op, "inputs", inputs)
        self.kernel = as_float32(op, "kernel", kernel)
        self.rank = self.inputs.shape.rank - 2
        if not 1 <= self.rank <= most or self.kernel.shape.rank != self.rank + 2:
            self.fail(f"`inputs` must have rank 3 to {most + 2}, and `kernel` the same rank")
        if None in self.kernel.shape[:-2]:
            self.fail("the spatial sizes of `kernel` must be known")
        self.strides = self._per_dimension("strides", strides)
        self.dilations = self._per_dimension(
            "dilation_rate", 1 if dilation_rate is None else dilation_rate
        )
        self.padding = padding.upper() if isinstance(padding, str) else padding
        if self.padding not in ("VALID", "SAME"):
            self.fail(f"`padding` must be 'valid' or 'same'; received {padding!r}")
        self.channels_last = channels_last(op, data_format)
        # How to lay the input out channels-last, and what comes out back again.
        last = self.rank + 1
        self.perm = () if self.channels_last else (0, *range(2, last + 1), 1)
        self.back = () if self.channels_last else (0, last, *range(1, last))
        self.batch, *self.spatial, self.channels = (
            self.inputs.shape[i] for i in self.perm or range(last + 1)
        )
        self.reach = [
            (n - 1) * d + 1 for n, d in zip(self.kernel.shape[:-2], self.dilations, strict=True)
        ]

    def fail(self, why: str):
        """Raises a ValueError that says why, for which op and shapes."""
        raise ValueError(
            f"keras_dfp.ops.{self.op}: {why}; received inputs of shape {self.inputs.shape} and "
            f"kernel of shape {self.kernel.shape}."
        )

    def _per_dimension(self, name: str, value, least: int = 1) -> list[int]:
        try:
            values = [operator.index(v) for v in value] if np.iterable(value) else None
            values = values or [operator.index(value)]
        except TypeError:
            values = []
        if len(values) == 1:
            values = values * self.rank
        if len(values) != self.rank or min(values) < least:
            self.fail(f"`{name}` must be an int or {self.rank} ints, at least {least}: {value!r}")
        return values

    def convolve(self, depthwise: bool) -> tf.Tensor:
        """Returns the convolution."""
        product = Conv(self._attributes(depthwise))
        x_shape = [self.batch, *self.spatial, self.channels]
        shape = product.output_shape(x_shape, self.kernel.shape)
        if any(n is not None and n < 1 for n in shape[1:-1]) and 0 not in self.spatial:
            self.fail(f"a kernel reaching over {self.reach} pixels is larger than the input")
        check_size(self.op, shape, f"inputs of shape {self.inputs.shape}")
        return self._multiply(product)

    def transposed(self, output_padding) -> tf.Tensor:
        """Returns the transposed convolution."""
        extra: Sequence[int | None] = [None] * self.rank
        if output_padding is not None:
            extra = self._per_dimension("output_padding", output_padding, least=0)
        batch, *spatial, _ = (sizes(self.inputs)[i] for i in self.perm or range(self.rank + 2))
        shape = [batch]
        for n, reach, stride, more in zip(spatial, self.reach, self.strides, extra, strict=True):
            shape.append(self._transposed_size(n, reach, stride, more))
        shape.append(sizes(self.kernel)[-2])
        known = tf.TensorShape([n if isinstance(n, int) else None for n in shape])
        attrs = self._attributes(depthwise=False)
        check_size(self.op, shape, f"inputs of shape {self.inputs.shape}")
        product = ConvInputGradient(attrs, Sizes(tf.stack(shape), known))
        return self._multiply(product)

    def _transposed_size(self, n, reach: int, stride: int, extra: int | None):
        """Returns the size of which `n` is the convolved size."""
        if self.padding == "VALID":
            most = stride - 1
            size = (n - 1) * stride + reach + (max(stride - reach, 0) if extra is None else extra)
        elif extra is None:
            return n * stride
        else:
            most = stride - reach % 2
            size = (n - 1) * stride + reach % 2 + extra
        least = most - stride + 1
        if extra is not None and not least <= extra <= most:
            self.fail(
                f"`output_padding` must lie from {least} to {most} with padding "
                f"{self.padding.lower()!r} and stride {stride}; received {extra}"
            )
        return size

    def _attributes(self, depthwise: bool) -> dict:
        return attributes(
            self.fmt,
            "x_bits",
            "w_bits",
            "dy_bits",
            strides=self.strides,
            padding=self.padding,
            explicit_paddings=[],
            dilations=self.dilations,
            depthwise=depthwise,
        )

    def _multiply(self, product) -> tf.Tensor:
        # Every sample has an exponent; the sums run over the kernel's leading axes.
        groups = int(has_groups(self.fmt, self.inputs))
        inputs, kernel = View(self.inputs, 0, self.perm, group_axes=groups), View(self.kernel, 1)
        # The transposed convolution is a gradient op, and has its factors the other way round.
        factors = (inputs, kernel) if isinstance(product, Conv) else (kernel, inputs)
        y = multiply(self.op, self.fmt, product, *factors)
        return tf.transpose(y, self.back) if self.back else y
