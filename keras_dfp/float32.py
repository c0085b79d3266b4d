"""The products in stock TensorFlow float32, for those a format leaves out of `products`.

Convolutions take the geometry of the native ops: channels-last, `strides`, `padding` ("VALID",
"SAME" or "EXPLICIT" with `explicit_paddings`), `dilations` and `depthwise`. TensorFlow's own
kernels on the CPU refuse groups, dilated gradients and unequal depthwise strides; those cases are
summed one kernel position at a time.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf


def conv(x, w, *, strides, padding, explicit_paddings, dilations, depthwise):
    """Returns the convolution of `x` with `w`; groups follow from the shapes."""
    x = _padded(x, w, strides, padding, explicit_paddings, dilations)
    dense = not depthwise and x.shape[-1] is not None and x.shape[-1] == w.shape[-2]
    if dense and set(dilations) == {1}:
        # The layout is spelled out because an eager second-order gradient fails without it.
        layout = ("NWC", "NHWC", "NDHWC")[len(strides) - 1]
        return tf.nn.convolution(x, w, strides, "VALID", data_format=layout)
    y = 0.0
    for position in np.ndindex(*w.shape[:-2]):
        y += _tap(_window(x, w, position, strides, dilations), w[position], depthwise)
    return y


def conv_input_gradient(sizes, w, dy, **geometry):
    """Returns the gradient of `conv` with respect to an `x` of shape `sizes`."""
    return _gradient(lambda x: conv(x, w, **geometry), tf.zeros(sizes), dy)


def conv_filter_gradient(x, sizes, dy, **geometry):
    """Returns the gradient of `conv` with respect to a `w` of shape `sizes`."""
    return _gradient(lambda w: conv(x, w, **geometry), tf.zeros(sizes), dy)


def _gradient(function, at, dy):
    # A convolution is linear in each factor, so its gradient does not depend on `at`.
    with tf.GradientTape() as tape:
        tape.watch(at)
        y = function(at)
    return tape.gradient(y, at, output_gradients=dy)


def _padded(x, w, strides, padding, explicit_paddings, dilations):
    if padding == "VALID":
        return x
    if padding == "EXPLICIT":
        pairs = [explicit_paddings[i : i + 2] for i in range(0, len(explicit_paddings), 2)]
    else:
        pairs = []
        for i, (stride, dilation) in enumerate(zip(strides, dilations, strict=True)):
            size = tf.shape(x)[i + 1]
            reach = (w.shape[i] - 1) * dilation + 1
            total = tf.maximum(((size + stride - 1) // stride - 1) * stride + reach - size, 0)
            pairs.append([total // 2, total - total // 2])
    return tf.pad(x, [[0, 0], *pairs, [0, 0]])


def _window(x, w, position, strides, dilations):
    """Returns what the kernel's tap at `position` sees of `x`, for every output pixel."""
    cut = [slice(None)]
    for i, offset in enumerate(position):
        start = offset * dilations[i]
        last = (w.shape[i] - 1) * dilations[i] - start
        cut.append(slice(start, tf.shape(x)[i + 1] - last, strides[i]))
    return x[tuple(cut)]


def _tap(window, w, depthwise):
    outer = tf.shape(window)[:-1]
    if depthwise:
        y = window[..., None] * w
        return tf.reshape(y, tf.concat([outer, [w.shape[0] * w.shape[1]]], 0))
    per_group, filters = w.shape
    groups = window.shape[-1] // per_group
    # Matrix products and not tf.einsum, which returned wrong sums here under TensorFlow 2.16.
    grouped = tf.reshape(window, tf.concat([outer, [groups, 1, per_group]], 0))
    w = tf.reshape(w, [per_group, groups, filters // groups])
    y = tf.matmul(grouped, tf.transpose(w, [1, 0, 2]))
    return tf.reshape(y, tf.concat([outer, [filters]], 0))
