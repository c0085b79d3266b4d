"""Batch norm, biases, residual sums and SiLU on the native ops, and their gradients.

Each function here is one step of float32 arithmetic over rows of channels (docs/numerics.md, "Batch
norm"), with the same bits on every machine. `fusion.py` joins steps that follow each other into one
pass, and with the quantizing that comes after; what a step computes stays the same.
"""

from __future__ import annotations

import tensorflow as tf

from keras_dfp import native


def moments(x) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns mean and variance over all axes but the last.

    Args:
        x: Float32, `[batch, .., channels]`.

    Returns:
        Two float32 tensors `[channels]`. The variance is the biased one, as in batch norm.
    """
    y = native.lib.dfp_moments(x=x)
    for result in (y.mean, y.variance):
        # Eagerly, there is no graph in which `normalize` could see it.
        result._dfp_moments_of = x
    return y.mean, y.variance


def normalize(x, mean, variance, scale, offset, epsilon: float, fused: bool = True) -> tf.Tensor:
    """Returns `(x - mean) * (scale / sqrt(variance + epsilon)) + offset`.

    If mean and variance are the `moments` of this very x, they count as a part of the function: its
    gradient is the whole one of batch norm.

    Args:
        x: Float32, `[batch, .., channels]`.
        mean, variance, scale, offset: Float32, `[channels]`.
        epsilon: Added to the variance.
        fused: Whether `fusion` may join this step with others.

    Returns:
        A float32 tensor of the shape of x.
    """
    training = are_moments(x, mean, variance)
    return _step(
        x, [offset, mean, variance, scale], [], epsilon=epsilon, training=training, fused=fused
    )


def are_moments(x, mean, variance) -> bool:
    """Tells whether mean and variance are the `moments` of this very x."""
    return all(getattr(t, "_dfp_moments_of", None) is x for t in (mean, variance))


def add_bias(x, bias, fused: bool = True) -> tf.Tensor:
    """Returns x plus a bias for each channel; `bias` has as many elements as x has channels."""
    return _step(x, [tf.reshape(bias, [x.shape[-1]])], [], fused=fused)


def add(x, y) -> tf.Tensor:
    """Returns the sum of two tensors of one shape, as residual connections need it."""
    return _step(x, [], [y])


def silu(x, fused: bool = True) -> tf.Tensor:
    """Returns `x / (1 + exp(-x))` for float32 `[batch, .., channels]`."""
    return _step(x, [], [], activation="silu", fused=fused)


def local_response(x, radius: int, bias: float, alpha: float, quarters: int) -> tf.Tensor:
    """Returns `x / (bias + alpha * sum of the squares of near channels) ** (quarters / 4)`.

    Args:
        x: Float32, `[batch, .., channels]`.
        radius: How many channels on either side are near.
        bias, alpha: Numbers.
        quarters: Four times the power, from 1 to 4.

    Returns:
        A float32 tensor of the shape of x.
    """
    return native.lib.dfp_local_response(
        x=x, radius=radius, bias=bias, alpha=alpha, quarters=quarters
    )


def _step(x, parameters, residual, **attrs):
    y = native.lib.dfp_normalize(
        x=x, parameters=parameters, residual=residual, bounds=[], step=[], **attrs
    ).y
    if not tf.executing_eagerly():
        for other in residual:
            y.set_shape(other.shape)
    return y


# ---- gradients -----------------------------------------------------------------------------------


# Ops that `fusion` made are differentiated where a function has come back as a graph: in a loaded
# SavedModel. What they are then given may have no elements in place of their result.


def _silu_gradient(gradients, features, fused=True):
    return native.lib.dfp_normalize_gradient(
        parts=[gradients], mask_map=[features], mask_bits=[], norm=[], sums=[], step=[],
        activation="silu", fused=fused,
    ).y  # fmt: skip


@tf.RegisterGradient("DfpNormalize")
def _normalize_gradient(op, dy, *_):
    n, n_residual = op.get_attr("n_parameters"), op.get_attr("n_residual")
    x, *rest = op.inputs
    parameters, residual = rest[:n], rest[n : n + n_residual]
    dy = tf.convert_to_tensor(dy)
    activation = op.get_attr("activation")
    if activation != b"none":
        before = x
        if parameters or residual:
            epsilon = op.get_attr("epsilon")
            before = _step(x, parameters, residual, epsilon=epsilon, fused=False)
        if activation == b"silu":
            dy = _silu_gradient(dy, before, op.get_attr("fused"))
        else:
            dy = native.through_clip(activation, dy, before)
    known = _step_gradient(op, dy, x, parameters, n_residual)
    return *known, *[None] * (len(op.inputs) - len(known))


def _step_gradient(op, dy, x, parameters, n_residual):
    n, residual = len(parameters), [dy] * n_residual
    if n == 0:
        return dy, *residual
    if n == 1:
        return dy, native.channel_sums(dy), *residual
    _, mean, variance, scale = parameters
    epsilon, training = op.get_attr("epsilon"), op.get_attr("training")
    sums = _sums(dy, [x, mean, variance], epsilon)
    dx = native.lib.dfp_normalize_gradient(
        parts=[dy], mask_map=[], mask_bits=[], norm=[x, mean, variance, scale],
        sums=[sums.sums] if training else [], step=[], epsilon=epsilon,
        fused=op.get_attr("fused"),
    ).y  # fmt: skip
    if training:
        dmean = dvariance = None
    else:
        with_epsilon = variance + epsilon
        dmean = -scale * tf.math.rsqrt(with_epsilon) * sums.doffset
        dvariance = -0.5 * scale * sums.dscale / with_epsilon
    return dx, sums.doffset, dmean, dvariance, sums.dscale, *residual


def _sums(dy, norm, epsilon):
    return native.lib.dfp_normalize_sums(
        parts=[dy], mask_map=[], mask_bits=[], norm=norm, epsilon=epsilon
    )


# What follows serves gradients of gradients: the same formulas in TensorFlow's ops, differentiated.


def _through(op, gradients, formula):
    """Returns the gradients of an op whose results `formula` computes from its inputs."""
    inputs = [tf.identity(x) for x in op.inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        results = formula(*inputs)
    results, gradients = zip(
        *[(y, dy) for y, dy in zip(results, gradients, strict=False) if y is not None],
        strict=True,
    )
    return tape.gradient(results, inputs, output_gradients=gradients)


def _all_but_last(x):
    return list(range(x.shape.rank - 1))


def _response_attrs(op):
    return {name: op.get_attr(name) for name in ("radius", "bias", "alpha", "quarters")}


@tf.RegisterGradient("DfpLocalResponse")
def _response_gradient(op, dy):
    return native.lib.dfp_local_response_gradient(x=op.inputs[0], dy=dy, **_response_attrs(op))


@tf.RegisterGradient("DfpLocalResponseGradient")
def _response_gradient_gradient(op, ddx):
    radius, bias, alpha, quarters = _response_attrs(op).values()

    def window(x):
        n = tf.shape(x)[-1]
        padded = tf.pad(x, [[0, 0]] * (x.shape.rank - 1) + [[radius, radius]])
        return tf.add_n([padded[..., k : k + n] for k in range(2 * radius + 1)])

    def formula(x, dy):
        s = bias + alpha * window(x * x)
        d = dy * s ** (-quarters / 4)
        return [d - alpha * quarters / 2 * x * window(d * x / s)]

    return _through(op, [ddx], formula)


@tf.RegisterGradient("DfpMoments")
def _moments_gradient(op, dmean, dvariance, *_):
    def formula(x):
        mean = tf.reduce_mean(x, _all_but_last(x))
        return mean, tf.reduce_mean(tf.square(x - mean), _all_but_last(x))

    return _through(op, (dmean, dvariance), formula)


def is_silu_gradient(op: tf.Operation) -> bool:
    """Tells whether an op is the gradient of a SiLU and nothing else, as float32."""
    return (
        op.type == "DfpNormalizeGradient"
        and op.get_attr("activation") == b"silu"
        and op.get_attr("n_parts") == op.get_attr("n_mask_map") == 1
        and not (op.get_attr("n_norm") or op.get_attr("want_q"))
    )


def _refuse_fused(op):
    if op.get_attr("n_parts") > 1 or op.get_attr("n_mask_map") or op.get_attr("n_mask_bits"):
        raise NotImplementedError(
            f"keras_dfp: the gradient of a gradient (here of {op.type}) is not available in a "
            "loaded SavedModel. Save it with the policy DFPPolicy(fused=False)."
        )


@tf.RegisterGradient("DfpNormalizeSums")
def _sums_gradient(op, *gradients):
    _refuse_fused(op)
    epsilon = op.get_attr("epsilon")

    def formula(dy, *norm):
        total = tf.reduce_sum(dy, _all_but_last(dy))
        if not norm:
            return [total, None, None]
        x, mean, variance = norm
        products = tf.reduce_sum(dy * (x - mean), _all_but_last(dy))
        both = tf.cast(tf.stack([total, products]), tf.float64)
        return total, products * tf.math.rsqrt(variance + epsilon), both

    return _through(op, gradients, formula)


@tf.RegisterGradient("DfpNormalizeGradient")
def _gradient_gradient(op, ddx, *_):
    if is_silu_gradient(op):
        return _through(op, [ddx], _silu_slope)
    _refuse_fused(op)
    epsilon = op.get_attr("epsilon")

    def formula(dy, x, mean, variance, scale, sums=None):
        inverse = tf.math.rsqrt(variance + epsilon)
        dx = scale * inverse * dy
        if sums is None:
            return [dx]
        total, products = tf.unstack(tf.cast(sums, tf.float32), 2)
        pixels = tf.cast(tf.size(dy) // tf.shape(dy)[-1], tf.float32)
        dx -= scale * inverse**3 * (x - mean) * products / pixels
        return [dx - scale * inverse * total / pixels]

    return _through(op, [ddx], formula)


def _silu_slope(dy, x):
    s = tf.sigmoid(x)
    return [dy * s * (1.0 + x * (1.0 - s))]
