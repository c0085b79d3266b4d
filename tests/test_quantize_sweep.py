"""The quantizer on every float32 there is, on every instruction set."""

import numpy as np
import pytest
import tensorflow as tf
from kernels import ISAS, running

from keras_dfp import reference
from keras_dfp.native import lib

SEED, TENSOR, STEP = 7, 3, 2**33 + 1
BLOCK = 2**20
INFINITY = 0x7F800000
# Mantissa bits and exponents: ordinary numbers, subnormals, the least and the greatest exponents.
FORMATS = [(14, -12), (16, -163), (12, -140), (8, 121)]
CASES = [(r, b, e) for r in ("nearest", "truncate") for b, e in FORMATS]
CASES += [("stochastic", b, e) for b, e in FORMATS[:2]]


def noise(count):
    """u of the first elements, as float64."""
    block = np.arange(count // 4)
    counter = np.stack(
        [block, 0 * block, 0 * block + STEP % 2**32, 0 * block + STEP // 2**32], axis=1
    )
    return (reference.philox4x32(counter, (SEED, TENSOR)).ravel() >> 8) * 2.0**-24


def statement(x, rounding, bits, exponent, u):
    """What numerics.md says, in float64, where the scaling is exact."""
    z = np.ldexp(x.astype(np.float64), -exponent)
    if rounding == "nearest":
        rounded = np.rint(z)
    elif rounding == "truncate":
        rounded = np.trunc(z)
    else:
        # floor(z + u) where z + u may need more than 53 bits; what is compared here does not.
        rounded = np.ceil(z) - (u < np.ceil(z) - z)
    limit = reference.qmax(bits)
    return np.clip(rounded, -limit, limit).astype(np.int16)


def native(x, rounding, bits, exponent):
    """Returns mantissas and exponents, of as many groups as there are exponents."""
    exponent = np.asarray(exponent, np.int32)
    q, e, _ = lib.dfp_quantize(
        x=x,
        exponent=[exponent],
        step=[np.int64(STEP)],
        mantissa_bits=bits,
        rounding=rounding,
        seed=SEED,
        tensor_id=TENSOR,
        group_axes=exponent.ndim,
    )
    return q.numpy(), e.numpy()


def check_block(patterns, rounding, bits, exponent, u):
    x = patterns.view(np.float32)
    finite = (patterns & 0x7FFFFFFF).max() < INFINITY
    expected = statement(x, rounding, bits, exponent, u) if finite else np.zeros(x.shape, np.int16)
    # As one tensor, and as groups of four.
    forms = (
        (tf.constant(x), exponent),
        (tf.constant(x.reshape(-1, 4)), np.full(x.size // 4, exponent)),
    )
    for isa in ISAS:
        for x, of_groups in forms:
            with running(isa, 2):
                q, e = native(x, rounding, bits, of_groups)
            where = f"{isa}, {x.shape}, patterns from {patterns[0]:#010x} on"
            assert np.all(e == (exponent if finite else reference.NAN_EXPONENT)), where
            if not np.array_equal(q.ravel(), expected):
                np.testing.assert_array_equal(q.ravel(), expected, where)


@pytest.mark.parametrize(("rounding", "bits", "exponent"), CASES)
def test_some_patterns_also_against_the_reference(rounding, bits, exponent):
    rng = np.random.default_rng(bits)
    patterns = rng.integers(0, 2**32, 40_000, np.uint32)
    patterns = patterns[(patterns & 0x7FFFFFFF) < INFINITY]
    # And many near the format's own range.
    near = (exponent + 127 + rng.integers(-3, bits + 2, 20_000)).clip(0, 254).astype(np.uint32)
    near = near << 23 | rng.integers(0, 2**23, near.size, np.uint32)
    patterns = np.concatenate([patterns, near, near | 0x80000000])
    patterns = patterns[: patterns.size // 4 * 4]
    u = noise(patterns.size)
    x = patterns.view(np.float32)
    truth, _ = reference.quantize(x, bits, rounding, exponent, SEED, TENSOR, STEP)
    np.testing.assert_array_equal(statement(x, rounding, bits, exponent, u), truth)
    check_block(patterns, rounding, bits, exponent, u)


def check_exponents(patterns):
    """Compares the exponent of each, and of groups of them, with what is said in float64."""
    x = patterns.view(np.float32)
    with np.errstate(invalid="ignore"):
        most = np.maximum(np.abs(x.astype(np.float64)), 2.0**-149)
    for n in (1, 4):
        with np.errstate(invalid="ignore"):
            largest = most.reshape(-1, n).max(axis=1)  # NaN, if there is one
        expected = np.frexp(largest)[1] - 1 - 12
        expected[~np.isfinite(largest)] = reference.NAN_EXPONENT
        groups = tf.constant(x.reshape(-1, n))
        for isa in ISAS:
            with running(isa, 2):
                _, e, _ = lib.dfp_quantize(x=groups, exponent=[], step=[], group_axes=1)
            where = f"{isa}, {n} each, patterns from {patterns[0]:#010x} on"
            np.testing.assert_array_equal(e, expected, where)


def test_some_exponents():
    rng = np.random.default_rng(0)
    check_exponents(rng.integers(0, 2**32, 40_000, np.uint32))
    check_exponents(
        rng.integers(0, 2**23, 40_000, np.uint32) >> rng.integers(0, 24, 40_000, np.uint32)
    )


@pytest.mark.slow
def test_all_exponents():
    block = np.arange(BLOCK, dtype=np.uint32)
    for first in range(0, 2**32, BLOCK):
        check_exponents(block + np.uint32(first))


@pytest.mark.slow
@pytest.mark.parametrize(("rounding", "bits", "exponent"), CASES)
def test_all_patterns(rounding, bits, exponent):
    u = noise(BLOCK)
    block = np.arange(BLOCK, dtype=np.uint32)
    for first in range(0, 2**32, BLOCK):
        check_block(block + np.uint32(first), rounding, bits, exponent, u)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_a_nan_alone_is_seen(isa):
    """Every 2048th pattern of them, alone among numbers, at changing places."""
    x = np.ones(4100, np.float32)
    with running(isa):
        for number, pattern in enumerate(range(INFINITY, 2**31, 2**11)):
            for sign in (0, 2**31):
                x.view(np.uint32)[:] = 0x3F800000
                x.view(np.uint32)[number % x.size] = pattern + sign
                q, e, _ = lib.dfp_quantize(x=x, exponent=[], step=[])
                assert int(e) == reference.NAN_EXPONENT and not np.any(q), hex(pattern + sign)
                q, e, _ = lib.dfp_quantize(x=x.reshape(82, 50), exponent=[], step=[], group_axes=1)
                alone = np.arange(82) == number % x.size // 50
                assert np.array_equal(e, np.where(alone, reference.NAN_EXPONENT, -12)), hex(pattern)
                assert np.array_equal(np.any(q, axis=1), ~alone), hex(pattern + sign)
