"""Batch norm, biases, residual sums, ReLU and SiLU: native ops bit for bit, and gradients."""

import itertools
import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import ISAS, assert_same_bits, guarded, running

from keras_dfp import normalization, reference
from keras_dfp.native import lib

THREADS = (1, 2, 4)
ROUNDINGS = ("nearest", "truncate", "stochastic")
ACTIVATIONS = ("none", "relu", "relu6", "silu")


# ---- The ops -------------------------------------------------------------------------------------


def native_normalize(x, parameters=(), residual=(), bounds=(), step=(), **attributes):
    return lib.dfp_normalize(
        x=x, parameters=list(parameters), residual=list(residual), bounds=list(bounds),
        step=[np.int64(n) for n in step], **attributes,
    )  # fmt: skip


def native_gradient(parts, mask_map=(), mask_bits=(), norm=(), sums=(), step=(), **attributes):
    return lib.dfp_normalize_gradient(
        parts=list(parts), mask_map=list(mask_map), mask_bits=list(mask_bits), norm=list(norm),
        sums=list(sums), step=[np.int64(n) for n in step], **attributes,
    )  # fmt: skip


def native_sums(parts, mask_map=(), mask_bits=(), norm=(), **attributes):
    return lib.dfp_normalize_sums(
        parts=list(parts), mask_map=list(mask_map), mask_bits=list(mask_bits), norm=list(norm),
        **attributes,
    )  # fmt: skip


def assert_same(actual, expected, what=""):
    """Bit for bit, but any NaN is one."""
    actual = np.asarray(actual)
    if expected.dtype.kind == "f":
        actual, expected = (
            np.where(np.isnan(a), a.dtype.type(np.nan), a) for a in (actual, expected)
        )
    assert_same_bits(actual, expected, what)


def everywhere():
    """Runs what is in a loop over this on every instruction set, on 1, 2 and 4 threads."""
    for isa, threads in itertools.product(ISAS, THREADS):
        with running(isa, threads, small=0):
            yield f"{isa}, {threads} threads"


# ---- Data ----------------------------------------------------------------------------------------

CHANNELS = (1, 3, 8, 10, 16, 63, 64, 65, 100, 257)
KINDS = ("ordinary", "wide", "special", "zeros", "subnormal", "huge")


def floats(rng, shape, kind):
    x = rng.standard_normal(shape)
    if kind == "wide":
        x *= 10.0 ** rng.uniform(-44, 37, shape)
    elif kind == "subnormal":
        x *= 1e-40
    elif kind == "huge":
        x *= 1e38
    elif kind == "zeros":
        x *= 0.0
    x = np.clip(x, -3e38, 3e38).astype(np.float32)
    if kind == "special":
        odd = np.float32([0, -0.0, 1e-45, -1e-40, 3e38, 1e-20, 6, np.nan, np.inf, -np.inf])
        where = rng.random(shape) < rng.choice([0.001, 0.1])
        x = np.where(where, rng.choice(odd, shape), x)
    return x


def shape_from(data):
    n = data.draw(st.sampled_from(CHANNELS))
    rank = data.draw(st.integers(2, 5))
    if rank == 2:
        leading = [data.draw(st.sampled_from([0, 1, 7, 128, 129, 300]))]
    else:
        most = {3: [0, 1, 5, 128, 300], 4: [0, 1, 2, 7, 17], 5: [0, 1, 2, 7]}[rank]
        sizes = st.sampled_from(most)
        leading = [data.draw(st.sampled_from([0, 1, 2, 3]))]
        leading += [data.draw(sizes) for _ in range(rank - 2)]
    while math.prod(leading) * n > 60_000:
        n = CHANNELS[CHANNELS.index(n) - 1]
    return (*leading, n)


class Random:
    """What hypothesis draws of it: a shape, a generator, and what kind of values there are."""

    def __init__(self, data, shape=None):
        self.shape = shape_from(data) if shape is None else shape
        self.rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        self.kind = data.draw(st.sampled_from(KINDS))

    def tensor(self):
        return floats(self.rng, self.shape, self.kind)

    def parameters(self):
        """Offset, mean, variance and scale, most of them of ordinary size."""
        n = self.shape[-1:]
        offset, mean, variance, scale = (
            floats(self.rng, n, self.rng.choice(["ordinary", "ordinary", self.kind]))
            for _ in range(4)
        )
        return offset, mean, abs(variance), scale


def rounding_from(data, rank):
    how = dict(
        mantissa_bits=data.draw(st.integers(8, 16)),
        rounding=data.draw(st.sampled_from(ROUNDINGS)),
        group_axes=data.draw(st.sampled_from([0, 1, rank - 1])),
    )
    step = []
    if how["rounding"] == "stochastic":
        how |= dict(seed=data.draw(st.integers(-9, 9)), tensor_id=data.draw(st.integers(0, 9)))
        step = [data.draw(st.integers(0, 2**63 - 1))]
    return how, step


def quantized(y, how, step):
    return reference.quantize(y, **how, step=step[0] if step else 0)


# ---- Forward, bit for bit ------------------------------------------------------------------------


def check_moments(x):
    mean, variance = reference.moments(x)
    images = 1 if x.ndim == 2 else x.shape[0]
    pixels = x.reshape((images, math.prod(x.shape[:-1]) // images if images else 0, x.shape[-1]))
    bounds = np.stack(
        [
            np.fmin.reduce(pixels, axis=1, initial=np.float32(np.inf)),
            np.fmax.reduce(pixels, axis=1, initial=np.float32(-np.inf)),
        ],
        axis=1,
    )
    x = guarded(x)
    for where in everywhere():
        y = lib.dfp_moments(x=x)
        assert_same(y.mean, mean, where)
        assert_same(y.variance, variance, where)
        np.testing.assert_array_equal(y.bounds, bounds, where)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_moments(data):
    check_moments(Random(data).tensor())


def assert_wanted(result, want, y, q, e, what):
    """Checks the float and the mantissas of an op, those that are wanted."""
    if "y" in want:
        assert_same(result.y, y, what)
    if "q" in want:
        assert_same(result.e, e, what)
        assert_same(result.q, q, what)


def check_normalize(x, parameters, residual, activation, epsilon, how, step, wants):
    expected = reference.normalize(
        x, *parameters, epsilon=epsilon, residual=residual[0] if residual else None,
        activation=activation,
    )  # fmt: skip
    mask = np.packbits(expected.ravel() > 0, bitorder="little")
    q, e = quantized(expected, how, step)
    x, parameters, residual = guarded(x), [*map(guarded, parameters)], [*map(guarded, residual)]
    for where in everywhere():
        for want in wants:
            result = native_normalize(
                x, parameters, residual, step=step, activation=activation, epsilon=epsilon,
                **how, **{f"want_{name}": name in want for name in ("y", "q", "mask")},
            )  # fmt: skip
            what = f"{want}, {where}, {how}"
            assert_wanted(result, want, expected, q, e, what)
            if "mask" in want:
                np.testing.assert_array_equal(result.mask, mask, what)
            sizes = zip(result, ("y", "q", "q", "mask"), strict=True)
            assert all(name in want or tf.size(value) == 0 for value, name in sizes)


def wants_of(channels, *names):
    """All sets of outputs that can be wanted: bits only of a multiple of 8 channels."""
    names = [name for name in names if name != "mask" or channels % 8 == 0]
    return [want for n in range(1, len(names) + 1) for want in itertools.combinations(names, n)]


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_normalize(data):
    some = Random(data)
    how, step = rounding_from(data, len(some.shape))
    check_normalize(
        some.tensor(),
        some.parameters()[: data.draw(st.sampled_from([0, 1, 4]))],
        [some.tensor()] if data.draw(st.booleans()) else [],
        data.draw(st.sampled_from(ACTIVATIONS)),
        data.draw(st.sampled_from([0.0, 1e-3, 1e-41])),
        how,
        step,
        wants_of(some.shape[-1], "y", "q", "mask"),
    )


# Groups beyond 131,072 elements, few of them, or beyond 524,288, are taken in pieces.
LARGE = [((2, 70, 110, 24), 1), ((3, 100, 80, 24), 0), ((3, 65_000, 3), 1), ((70_000, 10), 1)]


@pytest.mark.parametrize(("shape", "group_axes"), LARGE)
def test_large(shape, group_axes):
    rng = np.random.default_rng(1)
    x, residual = floats(rng, shape, "ordinary"), floats(rng, shape, "ordinary")
    parameters = [abs(floats(rng, shape[-1:], "ordinary")) for _ in range(4)]
    how = dict(mantissa_bits=14, rounding="nearest", group_axes=group_axes)
    check_moments(x)
    wants = wants_of(shape[-1], "y", "q", "mask")[-3:]
    check_normalize(x, parameters, [residual], "relu", 1e-3, how, [], wants)
    norm = [x, *parameters[1:]]
    check_gradient([x, residual], [residual, *parameters], [], "relu6", norm, 1e-3, True, how, [])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_bounds(data):
    """Exponents from the extremes of images are those from all elements."""
    some = Random(data)
    if len(some.shape) == 2:
        some.shape = (1, *some.shape)
    x, (offset, _, _, scale) = some.tensor(), some.parameters()
    activation = data.draw(st.sampled_from(ACTIVATIONS))
    how, step = rounding_from(data, len(some.shape))
    how["group_axes"] = 1
    mean, variance = reference.moments(x)
    y = reference.normalize(x, offset, mean, variance, scale, 1e-3, activation=activation)
    q, e = quantized(y, how, step)
    for where in everywhere():
        moments = lib.dfp_moments(x=x)
        result = native_normalize(
            x, [offset, moments.mean, moments.variance, scale], [], [moments.bounds], step,
            activation=activation, epsilon=1e-3, want_y=False, want_q=True, **how,
        )  # fmt: skip
        assert_same(result.e, e, f"{where}, {how}")
        assert_same(result.q, q, f"{where}, {how}")


def test_bounds_of_silu():
    """Its exponents are sure, or not: near a power of two, and where it stays below 0."""
    rng = np.random.default_rng(7)
    how = dict(mantissa_bits=14, rounding="nearest", group_axes=1)
    # silu(x) = 1, 2, 4: there and next to there.
    powers = np.float32([1.2784645, 2.2177164, 4.070339])
    near = np.concatenate([np.float32(powers).view(np.int32) + k for k in range(-20, 21)])
    tops = [*near.view(np.float32), 0.3, 0.4, 0.45, 0.5, -0.5, -1.2784645, -3, 30, 3e38]
    x = np.minimum(rng.standard_normal((len(tops), 3, 2, 8)), -0.01).astype(np.float32)
    x[:, 1, 1, 3] = tops
    none, one = np.zeros(8, np.float32), np.ones(8, np.float32)
    bounds = np.stack([x.min((1, 2)), x.max((1, 2))], 1)
    for first in range(len(tops)):
        part = slice(first, first + 1)
        q, e = quantized(reference.normalize(x[part], activation="silu"), how, [])
        result = native_normalize(
            x[part], [none, none, one, one], [], [bounds[part]], activation="silu", want_y=False,
            want_q=True, **how,
        )  # fmt: skip
        assert_same(result.e, e, f"{tops[first]}")
        assert_same(result.q, q, f"{tops[first]}")


def test_what_bounds_of_silu_rest_on():
    """Every float32 from which it could be otherwise: SILU_LEAST and SILU_ERROR, channels.pxi."""

    def silu(first, last):
        """In blocks, of the floats from `first` to `last`."""
        first, last = np.float32([first, last]).view(np.int32).tolist()
        for start in range(first, last + 1, 1 << 22):
            bits = np.arange(start, min(start + (1 << 22), last + 1), dtype=np.int32)
            x = np.zeros((-(-bits.size // 8), 8), np.float32)
            x.ravel()[: bits.size] = bits.view(np.float32)
            yield native_normalize(x, activation="silu").y.numpy().ravel()[: bits.size]

    # Closer to 0 it is smaller; from 87 on it is x.
    least = min(y.min() for y in silu(-0.25, -128.0))
    assert -0.27847 < least < -0.2784
    highest = np.int32(0)
    for y in silu(0.25, 88.0):
        rising = np.maximum(np.maximum.accumulate(y.view(np.int32)), highest)
        assert np.max(rising - y.view(np.int32)) <= 2
        highest = rising[-1]


# ---- Backward, bit for bit -----------------------------------------------------------------------


def backward(dy, x, activation):
    if activation == "silu":
        return reference.silu_gradient(dy, x)
    return reference.mask(dy, x, activation)


def check_gradient(parts, mask_map, mask_bits, activation, norm, epsilon, training, how, step):
    """Checks sums and gradient; `norm` is x, mean, variance and scale, or nothing."""
    with np.errstate(all="ignore"):
        dy = parts[0]
        for part in parts[1:]:
            dy = dy + part
        if mask_bits:
            kept = np.unpackbits(mask_bits[0], bitorder="little").reshape(dy.shape)
            dy = dy * kept.astype(np.float32)
    if mask_map:
        dy = backward(dy, reference.normalize(*mask_map, epsilon=1e-2), activation)
    x, mean, variance, scale = norm or [None] * 4
    expected = reference.normalize_sums(dy, x, mean, variance, epsilon)
    sums = [expected[2]] if training and norm else []
    dx = reference.normalize_gradient(dy, *norm, epsilon, *sums) if norm else dy
    q, e = quantized(dx, how, step)
    # The gradient of a bias before it: of images, quantizing sums too.
    of_images = dx.ndim > 2 and how["group_axes"] == 1
    (doffset, *_) = reference.normalize_sums(dx)
    parts, norm = [*map(guarded, parts)], [*map(guarded, norm)]
    arguments = dict(
        parts=parts, mask_map=[*map(guarded, mask_map)], mask_bits=[*map(guarded, mask_bits)],
        activation=activation, mask_epsilon=1e-2, epsilon=epsilon,
    )  # fmt: skip
    for where in everywhere():
        results = native_sums(norm=norm[:3], **arguments)
        for result, truth in zip(results, expected, strict=True):
            if truth is None:
                assert tf.size(result) == 0
            else:
                assert_same(result, truth, where)
        for want in wants_of(1, "y", "q"):
            result = native_gradient(
                norm=norm, sums=sums, step=step, want_y="y" in want, want_q="q" in want,
                want_doffset=of_images and "q" in want, **arguments, **how,
            )  # fmt: skip
            what = f"{want}, {where}, {how}"
            assert_wanted(result, want, dx, q, e, what)
            if "q" in want and of_images:
                assert_same(result.doffset, doffset, what)


@pytest.mark.parametrize("shape", [(1, 300, 301, 3), (2, 130, 9, 257), (3, 700, 200, 1)])
def test_gradient_of_large_images(shape):
    """That are shared out among threads in pieces."""
    rng = np.random.default_rng(5)
    dy, x = floats(rng, shape, "ordinary"), floats(rng, shape, "wide")
    how = dict(mantissa_bits=14, rounding="nearest", group_axes=1)
    check_gradient([dy, x], [x], [], "relu", [], 0.0, False, how, [])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_gradient(data):
    some = Random(data)
    mask = data.draw(st.sampled_from(["none", "bits", 1, 2, 5]))
    if mask == "bits":
        some.shape = (*some.shape[:-1], some.shape[-1] // 8 * 8 or 8)
    parts = [some.tensor() for _ in range(data.draw(st.integers(1, 8)))]
    mask_map, mask_bits, activation = [], [], "none"
    if mask == "bits":
        mask_bits = [some.rng.integers(0, 256, math.prod(some.shape) // 8, np.uint8)]
    elif mask != "none":
        mask_map = [some.tensor(), *some.parameters()][:mask]
        activation = data.draw(st.sampled_from(ACTIVATIONS[1:]))
    norm = data.draw(st.sampled_from(["none", "given", "training"]))
    check_gradient(
        parts,
        mask_map,
        mask_bits,
        activation,
        [] if norm == "none" else [some.tensor(), *some.parameters()[1:]],
        data.draw(st.sampled_from([0.0, 1e-3])),
        norm == "training",
        *rounding_from(data, len(some.shape)),
    )


def test_nothing_depends_on_flush_modes():
    """TensorFlow flushes subnormals on its own threads, where a graph's ops run."""
    rng = np.random.default_rng(5)
    x, dy, offset = (floats(rng, (3, 5, 8), "subnormal") for _ in range(3))
    offset, variance = offset[0, 0], abs(floats(rng, (2, 8), "subnormal"))[0]
    scale = np.float32(2.0**-70) * np.ones(8, np.float32)
    mean, scaled_x = x[0, 1], x * np.float32(2**60)
    variance_of_x = reference.moments(scaled_x)[1]
    how = dict(mantissa_bits=14, group_axes=1)

    @tf.function
    def run(x, scaled_x, dy, offset, mean, variance, scale):
        moments = lib.dfp_moments(x=x)
        scaled = lib.dfp_moments(x=scaled_x)
        four = [offset, mean, variance, scale]
        both = native_normalize(x, four, [dy], want_q=True, fused=False, **how)
        alone = native_normalize(x, four, bounds=[moments.bounds], want_y=False, want_q=True, **how)
        bias = native_sums([dy, dy])
        sums = native_sums([tf.ones_like(x)], norm=[x, mean, variance], epsilon=1.0)
        dx = native_gradient([dy], norm=[x, mean, variance, scale], sums=[sums.sums])
        return (
            moments.mean, scaled.variance, both.y, both.q, alone.q, alone.e, bias.doffset,
            sums.dscale, sums.sums, dx.y,
        )  # fmt: skip

    arguments = x, scaled_x, dy, offset, mean, variance, scale
    y = reference.normalize(x, offset, mean, variance, scale, residual=dy)
    q, e = reference.quantize(
        reference.normalize(x, offset, mean, variance, scale), 14, group_axes=1
    )
    doffset, _, _ = reference.normalize_sums(dy + dy)
    _, dscale, sums = reference.normalize_sums(np.ones_like(x), x, mean, variance, 1.0)
    expected = [
        reference.moments(x)[0],
        variance_of_x,
        y,
        reference.quantize(y, 14, group_axes=1)[0],
        q,
        e,
        doffset,
        dscale,
        sums,
        reference.normalize_gradient(dy, x, mean, variance, scale, 0.0, sums),
    ]
    results = run(*map(tf.constant, arguments))
    for i, (result, truth) in enumerate(zip(results, expected, strict=True)):
        assert np.any(truth), i
        assert_same(result, truth, i)


# ---- Local response normalisation ----------------------------------------------------------------


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_local_response(data):
    r = Random(data)
    x, dy = r.tensor(), r.tensor()
    how = {
        "radius": data.draw(st.sampled_from([0, 1, 2, 7, 300])),
        "bias": data.draw(st.sampled_from([0.0, 1.0, 2.0])),
        "alpha": data.draw(st.sampled_from([2e-5, 0.3])),
        "quarters": data.draw(st.integers(1, 4)),
    }
    y = reference.local_response(x, **how)
    dx = reference.local_response_gradient(x, dy, **how)
    for where in everywhere():
        assert_same(lib.dfp_local_response(x=guarded(x), **how), y, where)
        actual = lib.dfp_local_response_gradient(x=guarded(x), dy=guarded(dy), **how)
        assert_same(actual, dx, where)


@pytest.mark.parametrize("quarters", [1, 2, 3, 4])
def test_local_response_is_tensorflows(quarters):
    rng = np.random.default_rng(quarters)
    x = tf.constant(rng.normal(size=(2, 3, 5, 11)) * 3, tf.float32)
    dy, ddx = (tf.constant(rng.normal(size=x.shape), tf.float32) for _ in range(2))

    def derivatives(function):
        with tf.GradientTape() as outer:
            outer.watch([x, dy])
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = function(x)
            dx = inner.gradient(y, x, output_gradients=dy)
        return y, dx, *outer.gradient(dx, [x, dy], output_gradients=ddx)

    ours = derivatives(lambda x: normalization.local_response(x, 2, 1.5, 0.1, quarters))
    # Of the definition: TensorFlow's own op has no second derivative.
    padded = tf.linalg.band_part(tf.ones([11, 11]), 2, 2)
    stock = derivatives(lambda x: x * (1.5 + 0.1 * (x * x) @ padded) ** (-quarters / 4))
    for actual, expected in zip(ours, stock, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    op = tf.nn.local_response_normalization(x, 2, 1.5, 0.1, quarters / 4)
    np.testing.assert_allclose(ours[0], op, rtol=1e-5)


# ---- Errors --------------------------------------------------------------------------------------

X, C = np.zeros((2, 4, 3), np.float32), np.zeros(3, np.float32)
EIGHT = np.zeros((2, 4, 8), np.float32)
SHAPES = r"must have the same shape .*; got {} of shape \[2,3,4\] and the first of shape \[2,4,3\]"


def sized(name, expected, received):
    return f"{name} must have {expected} elements; got {received}"


@pytest.mark.parametrize(
    ("op", "call", "message"),
    [
        ("DfpMoments", lambda: lib.dfp_moments(x=C), "x must be .batch, .., channels.; got rank 1"),
        (
            "DfpLocalResponse",
            lambda: normalization.local_response(C, 2, 1.0, 0.1, 3),
            "x must be .batch, .., channels.; got rank 1",
        ),
        ("", lambda: normalization.local_response(X, 2, 1.0, 0.1, 5), "quarters must be from 1"),
        (
            "DfpLocalResponseGradient",
            lambda: lib.dfp_local_response_gradient(
                x=X, dy=X.swapaxes(1, 2), radius=1, bias=1.0, alpha=1.0, quarters=3
            ),
            "the gradient must have the shape of x",
        ),
        ("DfpNormalize", lambda: native_normalize(C), "x must be .batch, .., channels.; got rank"),
        ("", lambda: native_normalize(X, [C, C]), "n_parameters must not be 2"),
        ("", lambda: native_normalize(X, [C] * 5), "n_parameters must not be 5"),
        ("", lambda: native_normalize(X, [], [X, X]), "n_residual must not be 2"),
        ("", lambda: native_normalize(X, step=[1, 2]), "n_step must not be 2"),
        ("DfpNormalize", lambda: native_normalize(X, [C[:2]]), sized("parameter", 3, 2)),
        ("DfpNormalize", lambda: native_normalize(X, [C, C, X, C]), sized("parameter", 3, 24)),
        (
            "DfpNormalize",
            lambda: native_normalize(X, [], [X.swapaxes(1, 2)]),
            SHAPES.format("residual"),
        ),
        ("DfpNormalize", lambda: native_normalize(X, want_mask=True), "a multiple of 8 channels"),
        (
            "DfpNormalize",
            lambda: native_normalize(X, bounds=[X], want_q=True, want_y=False, group_axes=1),
            sized("bounds", 12, 24),
        ),
        *(
            (
                "DfpNormalize",
                lambda wrong=wrong: native_normalize(
                    **dict(
                        x=EIGHT, bounds=[np.zeros((2, 2, 8), np.float32)], want_q=True,
                        want_y=False, group_axes=1,
                    ) | wrong,
                ),
                "bounds are for images whose mantissas alone are wanted",
            )
            for wrong in (
                dict(want_y=True),
                dict(want_mask=True),
                dict(group_axes=2),
                dict(residual=[EIGHT]),
                dict(x=np.zeros((4, 8), np.float32), bounds=[np.zeros((2, 8), np.float32)]),
            )
        ),
        (
            "DfpNormalize",
            lambda: native_normalize(X, want_q=True, group_axes=4),
            "group_axes must be from 0 to the rank of x; got 4 and rank 3",
        ),
        ("", lambda: native_normalize(X, want_q=True, group_axes=-1), "group_axes"),
        ("", lambda: native_normalize(X, want_q=True, mantissa_bits=17), "mantissa_bits"),
        ("DfpNormalizeSums", lambda: native_sums([C]), "parts must be .batch, .., channels.; got"),
        ("", lambda: native_sums([X] * 9), "n_parts must not be 9"),
        ("", lambda: native_sums([X], norm=[X, C]), "n_norm must not be 2"),
        ("", lambda: native_sums([X], [X, C, C]), "n_mask_map must not be 3"),
        ("DfpNormalizeSums", lambda: native_sums([X, X.swapaxes(1, 2)]), SHAPES.format("parts")),
        (
            "DfpNormalizeSums",
            lambda: native_sums([X], [X.swapaxes(1, 2)]),
            SHAPES.format("mask_map"),
        ),
        ("DfpNormalizeSums", lambda: native_sums([X], [X, C[:1]]), sized("parameter", 3, 1)),
        (
            "DfpNormalizeSums",
            lambda: native_sums([X], norm=[X.swapaxes(1, 2), C, C]),
            SHAPES.format("x"),
        ),
        ("DfpNormalizeSums", lambda: native_sums([X], norm=[X, C[:2], C]), sized("mean", 3, 2)),
        ("DfpNormalizeSums", lambda: native_sums([X], norm=[X, C, X]), sized("variance", 3, 24)),
        (
            "DfpNormalizeSums",
            lambda: native_sums([X], mask_bits=[np.zeros(3, np.uint8)]),
            "a mask of bits needs a multiple of 8 channels",
        ),
        (
            "DfpNormalizeGradient",
            lambda: native_gradient([EIGHT], mask_bits=[np.zeros(7, np.uint8)]),
            sized("mask_bits", 8, 7),
        ),
        ("", lambda: native_gradient([X], norm=[X, C, C]), "n_norm must not be 3"),
        ("", lambda: native_gradient([X], sums=[np.zeros((2, 3))]), "n_sums must not be 1"),
        (
            "DfpNormalizeGradient",
            lambda: native_gradient([X], norm=[X, C, C, C[:2]]),
            sized("scale", 3, 2),
        ),
        (
            "DfpNormalizeGradient",
            lambda: native_gradient([X], norm=[X, C, C, C], sums=[np.zeros(3)]),
            sized("sums", 6, 3),
        ),
    ],
)  # fmt: skip
def test_errors(op, call, message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=message) as info:
        call()
    assert (op + ": " if op else "Dfp") in str(info.value)


# ---- Gradients in Python -------------------------------------------------------------------------


def standard_moments(x):
    axes = list(range(x.shape.rank - 1))
    mean = tf.reduce_mean(x, axes)
    return mean, tf.reduce_mean(tf.square(x - mean), axes)


def standard_normalize(x, mean, variance, scale, offset, epsilon):
    return (x - mean) * (scale * tf.math.rsqrt(variance + epsilon)) + offset


def in_training(moments, normalize):
    def layer(x, scale, offset):
        return normalize(x, *moments(x), scale, offset, 1e-3)

    return layer


def on_a_copy(x, scale, offset):
    """Moments that are not those of the very tensor: their own gradients count."""
    mean, variance = normalization.moments(x)
    return normalization.normalize(tf.identity(x), mean, variance, scale, offset, 1e-3)


def with_moments_in_use(moments, normalize):
    def layer(x, scale, offset):
        mean, variance = moments(x)
        return normalize(x, mean, variance, scale, offset, 1e-3) * mean + tf.sqrt(variance)

    return layer


def of_one_moment(moments):
    return lambda x, scale, offset: x * moments(x)[1] * scale + offset


def given_statistics(normalize):
    def layer(x, mean, spread, scale, offset):
        return normalize(x, mean, tf.square(spread), scale, offset, 1e-3)

    return layer


def with_silu(silu):
    def layer(x, scale, offset):
        return silu(x * scale + offset)

    return layer


def with_bias(add_bias, add):
    def layer(x, bias, y):
        return add(tf.square(add_bias(x, bias)), tf.broadcast_to(y, tf.shape(x)))

    return layer


ours, theirs = (
    (normalization.moments, normalization.normalize),
    (standard_moments, standard_normalize),
)
# Each: what is tested, and the same in TensorFlow; and how many parameters it has.
LAYERS = {
    "training": (in_training(*ours), in_training(*theirs), 2),
    "training, not linked": (on_a_copy, in_training(*theirs), 2),
    "moments used elsewhere": (with_moments_in_use(*ours), with_moments_in_use(*theirs), 2),
    "variance alone": (of_one_moment(ours[0]), of_one_moment(theirs[0]), 2),
    "given statistics": (given_statistics(ours[1]), given_statistics(theirs[1]), 4),
    "SiLU": (with_silu(normalization.silu), with_silu(tf.nn.silu), 2),
    "bias and residual": (
        with_bias(normalization.add_bias, normalization.add), with_bias(tf.add, tf.add), 2,
    ),
}  # fmt: skip


def derivatives(layer, weight, *inputs):
    """Result, gradients and gradients of gradients of a layer."""
    with tf.GradientTape() as second:
        second.watch(inputs)
        with tf.GradientTape() as first:
            first.watch(inputs)
            y = layer(*inputs)
            loss = tf.reduce_sum(weight * y + y**3 / 8)
        gradients = first.gradient(loss, inputs)
        total = tf.add_n([tf.reduce_sum(tf.square(g)) for g in gradients])
    return y, *gradients, *second.gradient(total, inputs)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("shape", [(6, 3), (3, 4, 5), (2, 4, 3, 8), (2, 2, 3, 2, 4)])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name, shape, mode):
    layer, stock, n = LAYERS[name]
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((2, *shape)) + 0.5
    parameters = rng.uniform(0.5, 1.5, (n, shape[-1]))
    inputs = [t.astype(np.float32) for t in (weight, x, *parameters)]
    wide = derivatives(stock, *(tf.constant(t, tf.float64) for t in inputs))
    narrow = derivatives(stock, *map(tf.constant, inputs))

    def run(*inputs):
        return derivatives(layer, *inputs)

    if mode == "graph":
        unknown = tf.TensorSpec((None, *shape[1:]), tf.float32)
        known = tf.TensorSpec(shape[-1:], tf.float32)
        run = tf.function(run, input_signature=[unknown, unknown, *[known] * n])
    results = run(*map(tf.constant, inputs))
    for result, expected, rounded in zip(results, wide, narrow, strict=True):
        expected = expected.numpy()
        most = np.max(np.abs(expected))
        np.testing.assert_allclose(result, expected, rtol=2e-4, atol=2e-5 * most)
        np.testing.assert_allclose(result, rounded, rtol=2e-4, atol=2e-5 * most)


@pytest.mark.parametrize("clip", ["relu", "relu6"])
@pytest.mark.parametrize("with_result", [False, True])
def test_gradient_of_relu_after_a_residual_sum(clip, with_result):
    """In a graph it does not read the ReLU's result; the bits are the same."""
    rng = np.random.default_rng(3)
    x, y = 6 * rng.standard_normal((2, 2, 3, 3, 8)).astype(np.float32)
    activation = getattr(tf.nn, clip)

    def run(x, y):
        with tf.GradientTape() as tape:
            tape.watch(x)
            z = activation(normalization.add(x, y))
            loss = tf.reduce_sum(z * z if with_result else z)
        return tape.gradient(loss, x)

    eager, graph = run(tf.constant(x), tf.constant(y)), tf.function(run)(x, y)
    assert_same(graph, eager.numpy())


def test_bias_of_any_shape():
    x, bias = np.ones((2, 3, 4), np.float32), np.arange(4, dtype=np.float32)
    for shape in ((4,), (1, 4), (1, 1, 4)):
        b = tf.Variable(bias.reshape(shape))
        with tf.GradientTape() as tape:
            y = normalization.add_bias(tf.constant(x), b)
        np.testing.assert_array_equal(y, x + bias)
        np.testing.assert_array_equal(tape.gradient(y, b), np.full(shape, 6))


def test_shapes_in_a_graph():
    @tf.function(input_signature=[tf.TensorSpec((None, None, 8), tf.float32)])
    def run(x):
        mean, variance = normalization.moments(x)
        y = normalization.normalize(x, mean, variance, mean, mean, 1e-3)
        assert mean.shape == variance.shape == [8]
        assert y.shape.as_list() == [None, None, 8]
        known = tf.ensure_shape(x, [2, 3, 8])
        assert normalization.add(x, known).shape == [2, 3, 8]
        return y

    run(np.ones((2, 3, 8), np.float32))
