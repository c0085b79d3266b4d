"""The reference against an independent statement of the contract.

Everything expected here comes from plain Python integers, `fractions.Fraction` and naive loops over
single elements; nothing of it is shared with `keras_dfp.reference`.
"""

import collections
import contextlib
import ctypes
import fractions
import functools
import itertools
import math
import platform
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_dfp import reference

NAN_EXPONENT = -(2**31)
NAN_BITS = 0x7FC00000
BITS = (8, 9, 12, 13, 14, 15, 16)
CHAINS = {16: 2, 15: 8, 14: 32, 13: 128, 12: 512}

check = settings(derandomize=True, deadline=None, database=None)


# ---------------------------------------------------------------------------------------------
# The independent statement: numbers
# ---------------------------------------------------------------------------------------------


def value_of(bits):
    """The value of float32 bits; infinity counts as 2**128, which is what rounding wants."""
    if bits == 0x7F800000:
        return fractions.Fraction(2) ** 128
    return fractions.Fraction(struct.unpack("<f", struct.pack("<I", bits))[0])


@functools.cache
def rn32(value):
    """Round a rational to float32 bits: find its two neighbours, compare with their middle."""
    sign, value = (0x80000000, -value) if value < 0 else (0, value)
    low, high = 0, 0x7F800000  # value_of(low) <= value < value_of(high), unless it overflows
    if value >= value_of(high):
        return sign | high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if value_of(middle) <= value else (low, middle)
    twice, both = 2 * value, value_of(low) + value_of(high)
    if twice > both or (twice == both and low % 2):
        low = high
    return sign | low


def power(e):
    return fractions.Fraction(2) ** e


def bits_of(array):
    return [int(b) for b in np.ascontiguousarray(array).view(np.uint32).ravel()]


def floats(bits):
    return np.array(bits, np.uint32).view(np.float32)


def q_max(bits):
    return 2 ** (bits - 1) - 1


def more_bits(sums, bits_b):
    """How many bits the second factor has more after it was aligned, given the exponents along the
    product's sums."""
    differ = any(len(set(ek)) > 1 and NAN_EXPONENT not in ek for ek in sums)
    return int(differ and bits_b < 16)


def chain(bits_a, bits_b):
    return (2**31 - 1) // (q_max(bits_a) * q_max(bits_b))


def product(chunks, e, accumulation):
    """The float32 bits of one output element, given the sums of its chunks in order."""
    if accumulation == "exact":
        return rn32(sum(chunks) * power(e))
    total = fractions.Fraction(0)
    for chunk in chunks:
        assert -(2**31) <= chunk < 2**31
        total = value_signed(rn32(total + value_signed(rn32(fractions.Fraction(chunk)))))
    return rn32(total * power(e))


def value_signed(bits):
    return -value_of(bits & 0x7FFFFFFF) if bits >> 31 else value_of(bits)


def philox_word(seed, tensor_id, step, i):
    c = [i // 4 % 2**32, i // 4 // 2**32, step % 2**32, step // 2**32]
    k = [seed % 2**32, tensor_id % 2**32]
    for _ in range(10):
        (high0, low0), (high1, low1) = (
            divmod(0xD2511F53 * c[0], 2**32),
            divmod(0xCD9E8D57 * c[2], 2**32),
        )
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[i % 4]


def naive_quantize(x, bits, rounding, exponent=None, seed=0, tensor_id=0, step=0, first=0):
    """Mantissas and exponent of one group, whose first element is element `first` of the tensor."""
    flat = bits_of(x)
    if exponent == NAN_EXPONENT or any(b & 0x7FFFFFFF >= 0x7F800000 for b in flat):
        return [0] * len(flat), NAN_EXPONENT
    values = [value_signed(b) for b in flat]
    if exponent is None:
        amax = max(map(abs, values), default=0)
        log = -149
        while power(log + 1) <= amax:
            log += 1
        exponent = log - (bits - 2)
    q = []
    for i, value in enumerate(values):
        scaled = value / power(exponent)
        if rounding == "nearest":
            rounded = round(scaled)  # of a Fraction: ties to even
        elif rounding == "truncate":
            rounded = math.trunc(scaled)
        else:
            u = fractions.Fraction(philox_word(seed, tensor_id, step, first + i) >> 8, 2**24)
            rounded = math.floor(scaled + u)
        q.append(min(max(rounded, -q_max(bits)), q_max(bits)))
    return q, exponent


def sum_of_groups(terms, ek, e, more, length, accumulation):
    """The float32 bits of a sum over pairs (a, b) of mantissas, in chunks of `length`.

    Args:
        terms: The pairs.
        ek: Of each pair, the sum of those exponents of a and b that differ along the sum.
        e: The sum of the other ones.
        more: Bits that b has more after it was aligned.
        length: Pairs of a chunk.
        accumulation: "exact" or "spill".
    """
    if NAN_EXPONENT in (e, *ek):
        return NAN_BITS
    most = max(ek, default=0)
    products = [
        a * round(b * 2**more / power(most - one)) for (a, b), one in zip(terms, ek, strict=True)
    ]
    chunks = [sum(products[k : k + length]) for k in range(0, len(products), length)]
    return product(chunks, most + e - more, accumulation)


def added(*exponents):
    return NAN_EXPONENT if NAN_EXPONENT in exponents else sum(exponents)


# ---------------------------------------------------------------------------------------------
# The independent statement: convolutions
# ---------------------------------------------------------------------------------------------

Case = collections.namedtuple(
    "Case", "batch size kernel strides dilations padding channels filters groups depthwise"
)
# One product of a convolution: x[x] * w[w] belongs to y[y]. `tap` and `pixel` count the kernel's
# positions and the output's pixels in row-major order, `c` and `f` channels and filters in a group.
Link = collections.namedtuple("Link", "x w y tap pixel c f")


def axis(size, kernel, stride, dilation, padding):
    """Padding before and after and the output size of one dimension, as TensorFlow documents it."""
    span = (kernel - 1) * dilation + 1
    if padding == "same":
        rest = size % stride
        total = max(span - (rest if rest else stride), 0)
        before, after = total // 2, total - total // 2
    else:
        before, after = (0, 0) if padding == "valid" else padding
    starts = [o for o in range(size + before + after) if o % stride == 0]
    return before, after, sum(start + span <= size + before + after for start in starts)


def shapes(case):
    paddings = case.padding if isinstance(case.padding, tuple) else [case.padding] * len(case.size)
    axes = [
        axis(*one)
        for one in zip(case.size, case.kernel, case.strides, case.dilations, paddings, strict=True)
    ]
    output = tuple(a[2] for a in axes)
    x = (case.batch, *case.size, case.channels)
    if case.depthwise:
        w = (*case.kernel, case.channels, case.filters // case.channels)
    else:
        w = (*case.kernel, case.channels // case.groups, case.filters)
    return x, w, (case.batch, *output, case.filters), [a[0] for a in axes]


def links(case):
    """Every product of the convolution, one by one; those that fall on padding are left out."""
    _, _, y, before = shapes(case)
    per_group, filters = case.channels // case.groups, case.filters // case.groups
    pixels = itertools.product(range(case.batch), *map(range, y[1:-1]))
    for pixel, (n, *o) in enumerate(pixels):
        for tap, k in enumerate(itertools.product(*map(range, case.kernel))):
            i = tuple(
                o[d] * case.strides[d] + k[d] * case.dilations[d] - before[d] for d in range(len(o))
            )
            if any(not 0 <= i[d] < case.size[d] for d in range(len(o))):
                continue
            for g, c, f in itertools.product(range(case.groups), range(per_group), range(filters)):
                channel, filter_ = g * per_group + c, g * filters + f
                w = (*k, channel, f) if case.depthwise else (*k, c, filter_)
                yield Link((n, *i, channel), w, (n, *o, filter_), tap, pixel, c, f)


def naive(case, which, a, ea, b, eb, bits, accumulation):
    """Bits of the forward product (x, w), the input (dy, w) or the weight gradient (x, dy).

    Exponents of x and dy are those of their images.
    """
    x_shape, w_shape, y_shape, _ = shapes(case)
    multiplier = case.filters // case.channels if case.depthwise else None
    sums = collections.defaultdict(lambda: collections.defaultdict(int))
    if which == "weight":
        images = [added(*pair) for pair in zip(ea, eb, strict=True)]
        most = NAN_EXPONENT if NAN_EXPONENT in images else max(images, default=0)
        more = more_bits([images], bits[1])
    else:
        images = [added(e, eb) for e in ea]
        more = 0
    length = chain(bits[0], bits[1] + more)
    for link in links(case):
        if which == "forward":
            element, term = link.y, int(a[link.x]) * int(b[link.w])
            chunk = link.tap // length if case.depthwise else (link.tap, link.c // length)
        elif which == "input":
            element, term = link.x, int(a[link.y]) * int(b[link.w])
            chunk = (
                (link.tap * multiplier + link.f) // length
                if case.depthwise
                else (link.tap, link.f // length)
            )
        else:
            element, term = link.w, 0
            if most != NAN_EXPONENT:
                aligned = round((int(b[link.y]) << more) / power(most - images[link.y[0]]))
                term = int(a[link.x]) * aligned
            chunk = link.pixel // length
        sums[element][chunk] += term
    shape = {"forward": y_shape, "input": x_shape, "weight": w_shape}[which]
    result = []
    for element in itertools.product(*map(range, shape)):
        chunks = [total for _, total in sorted(sums[element].items())]
        e = added(most, -more) if which == "weight" else images[element[0]]
        result.append(NAN_BITS if e == NAN_EXPONENT else product(chunks, e, accumulation))
    return shape, result


def computed(case, which, qa, ea, qb, eb, bits_a, bits_b, accumulation):
    """The same by the reference."""
    x_shape, w_shape, _, _ = shapes(case)
    names, shape = {
        "forward": (("x_bits", "w_bits"), ()),
        "input": (("dy_bits", "w_bits"), (x_shape,)),
        "weight": (("x_bits", "dy_bits"), (w_shape,)),
    }[which]
    op = ("depthwise_conv" if case.depthwise else "conv") + {
        "forward": "",
        "input": "_input_gradient",
        "weight": "_weight_gradient",
    }[which]
    return getattr(reference, op)(
        *(qa, ea, qb, eb, *shape),
        strides=case.strides,
        padding=case.padding,
        dilations=case.dilations,
        accumulation=accumulation,
        **dict(zip(names, (bits_a, bits_b), strict=True)),
    )


def operands(case, which):
    x, w, y, _ = shapes(case)
    return {"forward": (x, w), "input": (y, w), "weight": (x, y)}[which]


def mantissas(rng, shape, bits, kind="random"):
    limit = q_max(bits)
    if kind == "extreme":
        return np.full(shape, limit, np.int16)
    if kind == "signs":
        return np.where(rng.integers(0, 2, shape), limit, -limit).astype(np.int16)
    return rng.integers(-limit, limit + 1, shape).astype(np.int16)


@st.composite
def cases(draw, depthwise=False):
    rank = draw(st.integers(1, 3))
    small = {1: 9, 2: 5, 3: 3}[rank]

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    padding = draw(st.sampled_from(["valid", "same", "explicit"]))
    if padding == "explicit":
        padding = tuple((draw(st.integers(0, 3)), draw(st.integers(0, 2))) for _ in range(rank))
    size, kernel = each(1, small), each(1, 3 if rank < 3 else 2)
    strides, dilations = each(1, 3), each(1, 3)
    if depthwise:
        groups = channels = draw(st.integers(1, 3))
        filters = channels * draw(st.integers(1, 3))
    else:
        groups = draw(st.integers(1, 3))
        channels, filters = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 3))
    batch = draw(st.integers(0, 2))
    return Case(
        batch, size, kernel, strides, dilations, padding, channels, filters, groups, depthwise
    )


def of_images(case, exponents):
    """One or more exponents as a list of one for each image; those of a list take turns."""
    exponents = np.ravel(exponents).tolist()
    return [exponents[n % len(exponents)] for n in range(case.batch)]


def compare(case, which, seed, bits_a, bits_b, kind, exponents, accumulation):
    """Compares the reference with the naive statement; lists of exponents are those of images."""
    rng = np.random.default_rng(seed)
    shape_a, shape_b = operands(case, which)
    qa, qb = mantissas(rng, shape_a, bits_a, kind), mantissas(rng, shape_b, bits_b, kind)
    ea, eb = (
        np.array(of_images(case, e), np.int32) if isinstance(e, list) else e for e in exponents
    )
    y = computed(case, which, qa, ea, qb, eb, bits_a, bits_b, accumulation)
    ea = of_images(case, ea) if case.batch else []
    if which == "weight":
        eb = of_images(case, eb) if case.batch else []
    shape, expected = naive(case, which, qa, ea, qb, eb, (bits_a, bits_b), accumulation)
    assert y.dtype == np.float32
    assert y.shape == shape
    assert bits_of(y) == expected


# ---------------------------------------------------------------------------------------------
# Rounding
# ---------------------------------------------------------------------------------------------


def test_the_independent_rounding_agrees_with_the_hardware():
    # A double converts to float32 with one rounding, so struct can judge rn32 where doubles reach.
    rng = np.random.default_rng(0)
    doubles = np.ldexp(rng.standard_normal(2000), rng.integers(-160, 127, 2000))
    for double in [*doubles, 2.0**-150, 1.5 * 2.0**-149, 2.0**-149, 0.0, 1 + 2.0**-24]:
        expected = struct.unpack("<I", struct.pack("<f", double))[0]
        assert rn32(fractions.Fraction(float(double))) == expected or double == 0


def test_round_scaled_of_ties_and_extremes():
    sums = [0, 1, -1, 2**63 - 1, -(2**63), -(2**63) + 1]
    for bits in range(23, 63):
        for low in (-3, -2, -1, 0, 1, 2, 3):
            for half in (0, 2 ** max(bits - 24, 0), 3 * 2 ** max(bits - 24, 0)):
                sums.append(min(2**bits + half + low, 2**63 - 1))
    sums += [-s for s in sums if s > -(2**63)]
    array = np.array(sums, np.int64)
    near = [
        -213,
        -212,
        -211,
        -190,
        -173,
        -172,
        -150,
        -149,
        -127,
        -126,
        0,
        64,
        65,
        66,
        104,
        105,
        128,
    ]
    for e in [-(2**31), -400, -300, *near, 400, 2**31]:
        expected = [rn32(s * power(min(max(e, -500), 500))) for s in sums]
        assert bits_of(reference.round_scaled(array, e)) == expected


@check
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 62), st.integers(-400, 400))
def test_round_scaled_of_any_sum(value, shift, e):
    sums = [value, value >> shift]
    assert bits_of(reference.round_scaled(np.array(sums), e)) == [rn32(s * power(e)) for s in sums]


def test_round_scaled_keeps_shapes():
    assert reference.round_scaled(np.int64(-3), 1) == np.float32(-6)
    assert reference.round_scaled(np.zeros((2, 0, 3), np.int64), 1).shape == (2, 0, 3)
    assert reference.round_scaled(np.zeros((), np.int64), 1).shape == ()
    with pytest.raises(ValueError, match="int64"):
        reference.round_scaled(np.zeros(3, np.int32), 0)


def test_zero_is_positive_and_underflow_keeps_its_sign():
    zero, tiny = bits_of(reference.round_scaled(np.array([0, -1]), -400))
    assert (zero, tiny) == (0, 0x80000000)


def test_dequantize():
    q = np.array([[-8191, -1, 0], [1, 3, 32767]], np.int16)
    for e in (-400, -165, -163, -151, -150, -149, -20, 0, 113, 114, 127, 128, 400, 2**31 - 1):
        expected = [rn32(int(v) * power(min(e, 500))) for v in q.ravel()]
        assert bits_of(reference.dequantize(q, e)) == expected
    assert bits_of(reference.dequantize(q, NAN_EXPONENT)) == [NAN_BITS] * 6
    with pytest.raises(ValueError, match="int16"):
        reference.dequantize(q.astype(np.int32), 0)
    with pytest.raises(ValueError, match="int32"):
        reference.dequantize(q, 2**31)
    with pytest.raises(ValueError, match=r"leading axes of \(2, 3\), received \(3,\)"):
        reference.dequantize(q, np.zeros(3, np.int32))


def test_dequantize_groups():
    q = np.random.default_rng(0).integers(-8191, 8192, (3, 2, 4)).astype(np.int16)
    rows = np.array([[0, -150], [121, NAN_EXPONENT], [-20, 3]])
    for e in (rows, rows[:, 1], np.repeat(rows[..., np.newaxis], 4, axis=-1)):
        y = reference.dequantize(q, e)
        for index in np.ndindex(e.shape):
            one = reference.dequantize(q[index], int(e[index]))
            assert bits_of(y[index]) == bits_of(one)


@check
@given(st.integers(-(2**15), 2**15), st.integers(0, 80))
def test_align(q, shift):
    assert reference.align(np.array([q, -q]), shift).tolist() == [
        round(q / power(shift)),
        round(-q / power(shift)),
    ]


# ---------------------------------------------------------------------------------------------
# Quantize
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    """The known answers of Random123's distribution."""
    assert tuple(reference.philox4x32(np.array(counter), key)) == words
    assert tuple(reference.philox4x32(np.array([[counter]] * 2), key)[1, 0]) == words


EXTREMES = {
    "empty": [],
    "zeros": [0x0, 0x80000000, 0x0],
    "one": [0x3F800000],
    "least subnormal": [0x1],
    "minus least subnormal": [0x80000001, 0x0],
    "subnormals": [0x1, 0x80000003, 0x7FFFFF, 0x12345, 0x80000000],
    "around the least normal": [0x7FFFFF, 0x800000, 0x80800001],
    "largest": [0x7F7FFFFF, 0xFF7FFFFF, 0x1, 0x3F800000],
    "minus largest": [0xFF7FFFFF],
    "rounds up to Q + 1": [0x3FFFFFFF, 0xBFFFFFFF],
    "ties": [0x3F800000, *(0x39000000 + k * 0x400000 for k in range(8)), 0x38000001, 0xB8000000],
    "whole range": [0x7F000000, 0x1, 0x80000001, 0x00800000, 0xB3800000, 0x4B000001],
    "NaN": [0x3F800000, 0x7FC00000],
    "signalling NaN": [0xFF800001, 0x0],
    "Inf": [0x7F800000, 0x1],
    "minus Inf": [0xFF800000],
}


@pytest.mark.parametrize("rounding", ["nearest", "truncate", "stochastic"])
@pytest.mark.parametrize("name", EXTREMES)
def test_quantize_of_extremes(name, rounding):
    x = floats(EXTREMES[name])
    for bits in range(8, 17):
        for exponent in (None, NAN_EXPONENT, -(2**31) + 1, -300, -149, -20, -13, 0, 115, 2**31 - 1):
            if exponent in (None, NAN_EXPONENT) or abs(exponent) < 1000:
                expected = naive_quantize(x, bits, rounding, exponent)
            else:
                # Powers that far out are too long for Fractions; 2**+-900 gives the same mantissas.
                expected, e = naive_quantize(x, bits, rounding, 900 if exponent > 0 else -900)
                expected = (expected, NAN_EXPONENT if e == NAN_EXPONENT else exponent)
            q, e = reference.quantize(x, bits, rounding, exponent)
            assert q.dtype == np.int16
            assert (q.tolist(), e) == expected


@check
@given(
    st.lists(st.integers(0, 2**32 - 1).filter(lambda b: b & 0x7F800000 != 0x7F800000), max_size=9),
    st.integers(8, 16),
    st.sampled_from(["nearest", "truncate", "stochastic"]),
    st.one_of(st.none(), st.integers(-200, 140)),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**63 - 1),
)
def test_quantize_of_any_float(bits, mantissa_bits, rounding, exponent, seed, tensor_id, step):
    x = floats(bits)
    q, e = reference.quantize(x, mantissa_bits, rounding, exponent, seed, tensor_id, step)
    expected = naive_quantize(x, mantissa_bits, rounding, exponent, seed, tensor_id, step)
    assert (q.tolist(), e) == expected


@pytest.mark.parametrize("rounding", ["nearest", "truncate", "stochastic"])
def test_quantize_of_ordinary_values(rounding):
    x = np.random.default_rng(1).standard_normal((3, 5, 7)).astype(np.float32)
    for bits in (8, 12, 14, 15, 16):
        q, e = reference.quantize(x, bits, rounding, seed=7, tensor_id=2, step=2**40 + 5)
        expected = naive_quantize(x, bits, rounding, None, 7, 2, 2**40 + 5)
        assert q.shape == x.shape
        assert (q.ravel().tolist(), e) == expected
        error = np.abs(reference.dequantize(q, e).astype(np.float64) - x)
        assert error.max() <= 2.0**e  # also where clamping cost half a unit


@pytest.mark.parametrize("rounding", ["nearest", "truncate", "stochastic"])
@pytest.mark.parametrize("group_axes", [0, 1, 2, 3])
def test_groups_are_quantized_one_by_one(rounding, group_axes):
    rng = np.random.default_rng(group_axes)
    x = rng.standard_normal((4, 2, 5)) * 10.0 ** rng.integers(-44, 38, (4, 2, 1))
    x = x.astype(np.float32)
    x[0, 1], x[1, 0], x[2, 1, 3] = 0, -0.0, np.nan
    x[3] = floats([0x1, 0x80000003, 0x7FFFFF, 0x0, 0x12345])
    noise = {"seed": 7, "tensor_id": 2, "step": 2**40 + 5}
    given = rng.integers(-200, 140, x.shape[:group_axes], np.int32)
    if group_axes:
        given.flat[-1] = NAN_EXPONENT
    for bits in (8, 14, 16):
        for exponent in (None, given):
            q, e = reference.quantize(x, bits, rounding, exponent, **noise, group_axes=group_axes)
            assert (q.shape, e.shape) == (x.shape, x.shape[:group_axes])
            assert (q.dtype, e.dtype) == (np.int16, np.int32)
            size = math.prod(x.shape[group_axes:])
            for number, index in enumerate(np.ndindex(e.shape)):
                one = None if exponent is None else int(given[index])
                expected = naive_quantize(
                    x[index], bits, rounding, one, **noise, first=number * size
                )
                assert (np.ravel(q[index]).tolist(), int(e[index])) == expected


@check
@given(st.lists(st.floats(width=32), min_size=6, max_size=6), st.integers(8, 16))
def test_a_group_knows_nothing_of_the_others(values, bits):
    x = np.array(values, np.float32).reshape(3, 2)
    q, e = reference.quantize(x, bits, group_axes=1)
    for row in range(3):
        alone, exponent = reference.quantize(x[row], bits)
        assert (q[row].tolist(), e[row]) == (alone.tolist(), exponent)


def test_zeros_and_nothing_have_the_least_exponent():
    for bits in range(8, 17):
        for x in (np.zeros((2, 3)), np.full((2, 3), -0.0), np.zeros((2, 0))):
            q, e = reference.quantize(x.astype(np.float32), bits, group_axes=1)
            assert (np.any(q), e.tolist()) == (False, [-149 - (bits - 2)] * 2)
    assert reference.quantize(np.zeros((0, 3), np.float32), group_axes=1)[1].shape == (0,)


def test_a_nan_stays_in_its_group():
    x = np.ones((3, 2), np.float32)
    x[1] = np.inf, 5
    q, e = reference.quantize(x, 14, group_axes=1)
    assert q.tolist() == [[4096] * 2, [0] * 2, [4096] * 2]
    assert e.tolist() == [-12, NAN_EXPONENT, -12]
    # With their own exponents, x and w are what they were: only sums with the NaN are NaN.
    w = np.array([[4096], [4096]], np.int16)
    y = reference.matmul(q, e[:, np.newaxis], w, -12)
    np.testing.assert_array_equal(y, [[2], [np.nan], [2]])
    dw = reference.matmul(q.T, e[np.newaxis], np.ones((3, 1), np.int16), 0)
    np.testing.assert_array_equal(dw, [[np.nan], [np.nan]])
    options = {"x_bits": 14, "w_bits": 14}
    y = reference.conv(q[:, :, np.newaxis], e, w.reshape(2, 1, 1), -12, **options)
    np.testing.assert_array_equal(y.ravel(), [2, np.nan, 2])


def test_quantize_uses_the_whole_mantissa():
    for bits in range(8, 17):
        q, e = reference.quantize(np.array([1.0, -1.0], np.float32), bits)
        assert (q.tolist(), e) == ([2 ** (bits - 2), -(2 ** (bits - 2))], 2 - bits)


def test_quantize_keeps_shapes():
    assert reference.quantize(np.float32(3), 14)[0].shape == ()
    for rounding in ("nearest", "truncate", "stochastic"):
        assert reference.quantize(np.zeros((2, 0), np.float32), 14, rounding)[0].shape == (2, 0)
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    q, _ = reference.quantize(x.T)
    assert np.array_equal(q, reference.quantize(x)[0].T)


def test_stochastic_rounding_is_unbiased_and_depends_on_each_part_of_its_key():
    x = np.full(40000, 0.3, np.float32)
    x[0] = 1 - 2.0**-20  # sets the exponent; 0.3 lies between two mantissas
    q, e = reference.quantize(x, 8, "stochastic")
    assert abs(q[1:].mean() - 0.3 * 2.0**-e) < 0.01
    others = [{"seed": 1}, {"tensor_id": 1}, {"step": 1}, {"step": 2**32}, {"seed": -1}]
    results = [q, *(reference.quantize(x, 8, "stochastic", **other)[0] for other in others)]
    for a, b in itertools.combinations(results, 2):
        assert not np.array_equal(a, b)


def test_stochastic_rounding_at_both_ends_of_the_noise():
    # Found by search: with seed 0, u is 0 for element 1 of this step, 1 - 2**-24 for element 0.
    lowest, highest = (9373564, 1), (1205178, 0)
    for (step, i), values in (
        (lowest, {0.0: 0, -(2.0**-149): -1, -(2.0**-30): -1, -1.0: -1, 1 - 2.0**-24: 0, 1.0: 1}),
        (highest, {0.0: 0, 2.0**-24: 1, 2.0**-24 - 2.0**-48: 0, 2.0**-149: 0, -(2.0**-24): 0}),
    ):
        for value, expected in values.items():
            x = np.full(2, value, np.float32)
            q, _ = reference.quantize(x, 14, "stochastic", exponent=0, step=step)
            assert q[i] == expected
            assert q.tolist() == naive_quantize(x, 14, "stochastic", 0, step=step)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": np.zeros(3)}, "float32"),
        ({"x": np.zeros(3, np.int16)}, "float32"),
        ({"mantissa_bits": 7}, "8 to 16"),
        ({"mantissa_bits": 17}, "8 to 16"),
        ({"mantissa_bits": 14.0}, "8 to 16"),
        ({"rounding": "up"}, "rounding"),
        ({"exponent": 2**31}, "int32"),
        ({"step": -1}, "step"),
        ({"step": 2**63}, "step"),
        ({"group_axes": -1}, "`group_axes` must be from 0 to the rank of `x`, 1; received -1"),
        ({"group_axes": 2}, "received 2"),
        ({"exponent": np.zeros(3, np.int32)}, r"shape \(\), received \(3,\)"),
        ({"exponent": 0, "group_axes": 1}, r"shape \(3,\), received \(\)"),
        ({"exponent": np.zeros(4, np.int32), "group_axes": 1}, r"received \(4,\)"),
        ({"exponent": np.zeros(3), "group_axes": 1}, "int32"),
    ],
)
def test_quantize_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        reference.quantize(**{"x": np.zeros(3, np.float32), **arguments})


# ---------------------------------------------------------------------------------------------
# Floating point units that flush subnormals
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def flushed_subnormals():
    """Set flush-to-zero and denormals-are-zero on this thread, as TensorFlow does on its own."""
    libm = ctypes.CDLL("libm.so.6")
    saved, flushing = ctypes.create_string_buffer(32), ctypes.create_string_buffer(32)
    libm.fegetenv(saved)
    flushing[:] = saved[:]
    mxcsr = struct.unpack_from("<I", flushing, 28)[0]
    struct.pack_into("<I", flushing, 28, mxcsr | 0x8040)
    libm.fesetenv(flushing)
    try:
        yield
    finally:
        libm.fesetenv(saved)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc",
    reason="sets the x86-64 control register through glibc",
)
def test_nothing_depends_on_the_units_flush_modes():
    x = floats([0x1, 0x80000003, 0x7FFFFF, 0x800000, 0x80000000, 0x12345] * 4)
    q = np.array([[-5, 3], [1, 8191]], np.int16)

    def everything():
        results = []
        for rounding in ("nearest", "truncate", "stochastic"):
            mantissa, e = reference.quantize(x, 14, rounding)
            results += [*mantissa.tolist(), e, *reference.quantize(x, 14, rounding, -149)[0]]
            mantissa, e = reference.quantize(x.reshape(8, 3), 14, rounding, group_axes=1)
            results += [*mantissa.ravel().tolist(), *e.tolist()]
        results += bits_of(reference.dequantize(q, -150))
        for accumulation in ("exact", "spill"):
            results += bits_of(reference.matmul(q, -80, q, -70, accumulation=accumulation))
        rows, four = x.reshape(2, 3, 4), [x[6:10]] * 3
        mean, variance = reference.moments(rows)
        _, dscale, sums = reference.normalize_sums(rows, rows, mean, variance, 1e-40)
        floats = [mean, variance, dscale, sums]
        floats += [reference.normalize(rows, x[:4], *four, epsilon, rows) for epsilon in (0, 1e-40)]
        floats += [reference.normalize_gradient(rows, rows, *four, sums=s) for s in (None, sums)]
        floats += [reference.mask(rows, rows, clip) for clip in ("relu", "relu6")]
        floats += [reference.normalize(rows, activation="silu")]
        floats += [reference.silu_gradient(rows, rows)]
        return results + [value.tobytes() for value in floats]

    expected = everything()
    with flushed_subnormals():
        flushes = np.float32(2.0**-126) * np.float32(0.5) == 0
        received = everything()
    assert flushes
    assert received == expected


# ---------------------------------------------------------------------------------------------
# Chains
# ---------------------------------------------------------------------------------------------


def test_safe_chains():
    assert {bits: reference.safe_chain(bits, bits) for bits in CHAINS} == CHAINS
    for a, b in itertools.product(range(8, 17), repeat=2):
        length = reference.safe_chain(a, b)
        assert length * q_max(a) * q_max(b) <= 2**31 - 1 < (length + 1) * q_max(a) * q_max(b)


@pytest.mark.parametrize("accumulation", ["exact", "spill"])
@pytest.mark.parametrize(("a_bits", "b_bits"), [*((b, b) for b in CHAINS), (16, 8), (14, 16)])
def test_extreme_chains(a_bits, b_bits, accumulation):
    length = chain(a_bits, b_bits)
    for depth in (0, 1, length - 1, length, length + 1, 2 * length, 3 * length + 1):
        for sign in (1, -1):
            qa = np.full((1, depth), sign * q_max(a_bits), np.int16)
            qb = np.full((depth, 2), q_max(b_bits), np.int16)
            largest = sign * q_max(a_bits) * q_max(b_bits)
            chunks = [min(length, depth - k) * largest for k in range(0, depth, length)]
            y = reference.matmul(
                *(qa, 3, qb, -7), a_bits=a_bits, b_bits=b_bits, accumulation=accumulation
            )
            assert bits_of(y) == [product(chunks, -4, accumulation)] * 2


def test_sums_beyond_the_reach_of_doubles():
    # Just above the middle of two float32 numbers; as a double it would be the middle.
    total = 2**53 + 2**29 + 1
    count, rest = divmod(total, 32767**2)
    qa = np.full((1, count + 2), 32767, np.int16)
    qb = np.full((count + 2, 1), 32767, np.int16)
    qa[0, -2:], qb[-1, 0] = divmod(rest, 32767), 1
    y = reference.matmul(qa, 0, qb, 0, a_bits=16, b_bits=16)
    assert bits_of(y) == [rn32(fractions.Fraction(total))]
    assert y != np.float32(float(total))


# ---------------------------------------------------------------------------------------------
# Matrix product
# ---------------------------------------------------------------------------------------------


@check
@given(
    st.lists(st.integers(0, 2), max_size=2),
    st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 3)),
    st.sampled_from(BITS),
    st.sampled_from(BITS),
    st.sampled_from(["random", "signs", "extreme"]),
    st.integers(-120, 90),
    st.sampled_from(["exact", "spill"]),
    st.integers(0, 2**32),
)
def test_matmul(batch, sizes, a_bits, b_bits, kind, e, accumulation, seed):
    rows, depth, columns = sizes
    rng = np.random.default_rng(seed)
    qa = mantissas(rng, (*batch, rows, depth), a_bits, kind)
    qb = mantissas(rng, (*batch, depth, columns), b_bits, kind)
    length = chain(a_bits, b_bits)
    expected = []
    for *n, i, j in itertools.product(*map(range, batch), range(rows), range(columns)):
        terms = [int(qa[(*n, i, k)]) * int(qb[(*n, k, j)]) for k in range(depth)]
        chunks = [sum(terms[k : k + length]) for k in range(0, depth, length)]
        expected.append(product(chunks, e - 5, accumulation))
    y = reference.matmul(*(qa, e, qb, -5), a_bits=a_bits, b_bits=b_bits, accumulation=accumulation)
    assert y.dtype == np.float32
    assert y.shape == (*batch, rows, columns)
    assert bits_of(y) == expected


EXPONENTS = st.one_of(st.integers(-20, 20), st.integers(-300, 90), st.just(NAN_EXPONENT))


@check
@given(st.data())
def test_matmul_of_groups(data):
    """Rows, columns or products of either factor have exponents of their own."""
    draw = data.draw
    batch = draw(st.lists(st.integers(0, 2), max_size=2))
    rows, depth, columns = (draw(st.integers(1, n)) for n in (3, 9, 3))
    a_bits, b_bits = draw(st.sampled_from(BITS)), draw(st.sampled_from(BITS))
    accumulation = draw(st.sampled_from(["exact", "spill"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    qa = mantissas(rng, (*batch, rows, depth), a_bits, draw(st.sampled_from(["random", "signs"])))
    qb = mantissas(rng, (*batch, depth, columns), b_bits)
    exponents = []
    for shape in (qa.shape, qb.shape):
        axis = draw(st.sampled_from([-2, -1]))
        shape = (
            *shape[:-2],
            *(n if i == axis else 1 for i, n in zip((-2, -1), shape[-2:], strict=True)),
        )
        shape = draw(st.sampled_from([shape, (*shape[:-2], 1, 1), ()]))
        size = math.prod(shape)
        drawn = draw(st.lists(EXPONENTS, min_size=size, max_size=size))
        exponents.append(np.array(drawn, np.int32).reshape(shape))
    ea, eb = (np.broadcast_to(e, q.shape) for e, q in zip(exponents, (qa, qb), strict=True))
    sums = []
    for *n, i, j in itertools.product(*map(range, batch), range(rows), range(columns)):
        a, b = (*n, i), (*n, slice(None), j)
        terms = list(zip(qa[a].tolist(), qb[b].tolist(), strict=True))
        ek = [added(*pair) for pair in zip(ea[a].tolist(), eb[b].tolist(), strict=True)]
        sums.append((terms, ek))
    more = more_bits([ek for _, ek in sums], b_bits)
    length = chain(a_bits, b_bits + more)
    expected = [sum_of_groups(terms, ek, 0, more, length, accumulation) for terms, ek in sums]
    y = reference.matmul(
        *(qa, exponents[0], qb, exponents[1]),
        a_bits=a_bits,
        b_bits=b_bits,
        accumulation=accumulation,
    )
    assert y.shape == (*batch, rows, columns)
    assert bits_of(y) == expected


def test_alignment_rounds_to_nearest_even_and_to_nothing():
    # b stands for 2**-e of what is summed: each shift alone, beside a zero with the exponent 0.
    for shift in range(41):
        for b in (1, 2, 3, 5, 6, 7, 8191, 8190, 2 ** min(shift, 13) - 1, 3 * 2 ** min(shift, 12)):
            for sign in (1, -1):
                qa, qb = np.array([[1, 1]], np.int16), np.array([[sign * b], [0]], np.int16)
                y = reference.matmul(qa, np.array([[-shift, 0]]), qb, 0, b_bits=16)
                assert y == round(sign * b / power(shift))
                # With room for it, nothing is rounded but beyond one bit more.
                y = reference.matmul(qa, np.array([[-shift, 0]]), qb, 0, b_bits=15)
                assert y == round(2 * sign * b / power(shift)) / 2


def test_spilling_adds_chunks_in_order():
    # At 16 bits a chunk is two products; beside 2**31, a float32 sum loses the 1.
    large, one = [32767, 32767], [1, 0]
    for signs, expected in (((1, 0, -1), 0.0), ((1, -1, 0), 1.0), ((0, 1, -1), 0.0)):
        qa = np.array(
            [[v for s in signs for v in ([s * w for w in large] if s else one)]], np.int16
        )
        qb = np.array([[v] for s in signs for v in (large if s else one)], np.int16)
        options = {"a_bits": 16, "b_bits": 16}
        assert reference.matmul(qa, 0, qb, 0, accumulation="spill", **options) == expected
        assert reference.matmul(qa, 0, qb, 0, accumulation="exact", **options) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qa": np.zeros((2, 3))}, "`a` must be int16"),
        ({"qb": np.zeros((3, 2), np.int32)}, "`b` must be int16"),
        ({"qa": np.zeros(3, np.int16)}, "rank"),
        ({"qa": np.zeros((1, 2, 3), np.int16)}, "rank"),
        ({"qa": np.zeros((2, 4), np.int16)}, "last dimension"),
        (
            {"qa": np.zeros((2, 2, 3), np.int16), "qb": np.zeros((1, 3, 2), np.int16)},
            "batch dimensions",
        ),
        ({"qa": np.full((2, 3), 8192, np.int16)}, "from -8191 to 8191"),
        ({"qa": np.full((2, 3), -32768, np.int16), "a_bits": 16}, "from -32767 to 32767"),
        ({"ea": 2**31}, "int32"),
        ({"ea": np.zeros((2, 3), np.int32)}, "`ea` must broadcast .* along one of the last two"),
        ({"ea": np.zeros((3, 1), np.int32)}, r"\(2, 3\) .* received shape \(3, 1\)"),
        ({"eb": np.zeros((2, 1), np.int32)}, r"`eb` .* \(3, 2\) .* received shape \(2, 1\)"),
        ({"eb": np.zeros((1, 1, 1), np.int32)}, "`eb` must broadcast"),
        ({"a_bits": 17}, "8 to 16"),
        ({"accumulation": "double"}, "accumulation"),
    ],
)
def test_matmul_refuses(arguments, message):
    zeros = {"qa": np.zeros((2, 3), np.int16), "qb": np.zeros((3, 2), np.int16), "ea": 0, "eb": 0}
    with pytest.raises(ValueError, match=message):
        reference.matmul(**{**zeros, **arguments})


# ---------------------------------------------------------------------------------------------
# Convolutions
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depthwise", [False, True], ids=["conv", "depthwise"])
@pytest.mark.parametrize("which", ["forward", "input", "weight"])
def test_convolutions(which, depthwise):
    one_or_more = st.one_of(st.integers(-90, 60), st.lists(EXPONENTS, min_size=1, max_size=3))

    @settings(check, max_examples=200)
    @given(
        cases(depthwise),
        st.integers(0, 2**32),
        st.sampled_from(BITS),
        st.sampled_from(BITS),
        st.sampled_from(["random", "signs", "extreme"]),
        st.tuples(one_or_more, one_or_more if which == "weight" else st.integers(-90, 60)),
        st.sampled_from(["exact", "spill"]),
    )
    def run(case, seed, bits_a, bits_b, kind, exponents, accumulation):
        compare(case, which, seed, bits_a, bits_b, kind, exponents, accumulation)

    run()


# Each has several chunks per kernel position, kernel row or output pixel, and neither a symmetric
# kernel nor symmetric padding: no other order gives these bits.
SPILLED = {
    "conv": Case(2, (5, 4), (3, 2), (1, 1), (1, 1), ((2, 0), (0, 1)), 10, 9, 1, False),
    "grouped": Case(1, (6, 5), (2, 3), (2, 1), (1, 2), "same", 10, 10, 2, False),
    "1d": Case(2, (9,), (4,), (2,), (1,), ((3, 0),), 7, 5, 1, False),
    "depthwise": Case(2, (6, 5), (3, 3), (1, 2), (1, 1), "same", 3, 9, 3, True),
}


@pytest.mark.parametrize("which", ["forward", "input", "weight"])
@pytest.mark.parametrize(
    "name", [pytest.param("conv", marks=pytest.mark.slow), "grouped", "1d", "depthwise"]
)
def test_spilled_convolutions(name, which):
    case = SPILLED[name]
    compare(case, which, 3, 16, 16, "random", (0, 0), "spill")
    compare(case, which, 4, 16, 15, "random", (-3, 5), "spill")
    compare(case, which, 5, 15, 15, "signs", (0, 0), "spill")
    compare(
        case, which, 6, 16, 16, "random", ([-3, 2], [1, -1] if which == "weight" else 0), "spill"
    )
    # What makes the above a test: exact sums differ.
    shape_a, shape_b = operands(case, which)
    rng = np.random.default_rng(3)
    q = mantissas(rng, shape_a, 16), mantissas(rng, shape_b, 16)
    exact, spill = (
        bits_of(computed(case, which, q[0], 0, q[1], 0, 16, 16, accumulation))
        for accumulation in ("exact", "spill")
    )
    assert exact != spill


def test_an_input_gradient_visits_kernel_positions_unflipped():
    # Of three equal dy, the middle input gets dy * (w[0] + w[1] + w[2]), added in this order.
    dy = np.array([[[32767]] * 3], np.int16)
    for w, expected in (([32767, -32767, 1], 32767.0), ([1, 32767, -32767], 32768.0)):
        w = np.array(w, np.int16).reshape(3, 1, 1)
        options = {"padding": "same", "dy_bits": 16, "w_bits": 16, "accumulation": "spill"}
        dx = reference.conv_input_gradient(dy, 0, w, 0, (1, 3, 1), **options)
        assert dx[0, 1, 0] == expected


@settings(check, max_examples=60)
@given(st.one_of(cases(), cases(True)), st.integers(0, 2**32))
def test_gradients_are_adjoint(case, seed):
    """<conv(x, w), dy> = <x, input gradient> = <w, weight gradient>, in integers."""
    rng = np.random.default_rng(seed)
    x_shape, w_shape, y_shape, _ = shapes(case)
    # At 8 bits every sum here is below 2**24, so the float32 results are these very integers.
    x, w, dy = (mantissas(rng, shape, 8) for shape in (x_shape, w_shape, y_shape))
    y = computed(case, "forward", x, 0, w, 0, 8, 8, "exact")
    dx = computed(case, "input", dy, 0, w, 0, 8, 8, "exact")
    dw = computed(case, "weight", x, 0, dy, 0, 8, 8, "exact")

    def inner(a, b):
        return sum(int(u) * int(v) for u, v in zip(a.ravel(), b.ravel(), strict=True))

    assert inner(y, dy) == inner(x, dx) == inner(w, dw)


@pytest.mark.parametrize("accumulation", ["exact", "spill"])
def test_depthwise_is_grouped(accumulation):
    """With one group per channel, `conv` says the same; at this size spilling loses nothing."""
    rng = np.random.default_rng(5)
    x = mantissas(rng, (2, 7, 6, 3), 8)
    w = mantissas(rng, (3, 2, 3, 2), 8)
    options = {"strides": (2, 1), "padding": "same", "accumulation": accumulation}
    depthwise = reference.depthwise_conv(x, -1, w, -2, **options)
    grouped = reference.conv(x, -1, w.reshape(3, 2, 1, 6), -2, **options)
    assert bits_of(depthwise) == bits_of(grouped)


def test_integers_mean_every_dimension_and_defaults_are_valid_and_dense():
    rng = np.random.default_rng(6)
    x, w = mantissas(rng, (1, 7, 7, 2), 14), mantissas(rng, (3, 3, 2, 2), 14)
    one = reference.conv(x, 0, w, 0, strides=2, padding="valid", dilations=2)
    each = reference.conv(x, 0, w, 0, strides=(2, 2), padding=[(0, 0)] * 2, dilations=[2, 2])
    assert bits_of(one) == bits_of(each)
    plain = reference.conv(x, 0, w, 0, strides=(1, 1), dilations=(1, 1))
    assert bits_of(reference.conv(x, 0, w, 0)) == bits_of(plain)


@pytest.mark.parametrize("accumulation", ["exact", "spill"])
def test_nothing_in_gives_nothing_or_zeros(accumulation):
    def q(*shape):
        return np.zeros(shape, np.int16)

    options = {"accumulation": accumulation}
    assert reference.conv(q(0, 5, 2), 0, q(3, 2, 4), 0, **options).shape == (0, 3, 4)
    assert reference.conv(q(2, 2, 2), 0, q(3, 2, 4), 0, **options).shape == (2, 0, 4)
    assert reference.conv(q(2, 0, 2), 0, q(3, 2, 4), 0, padding="same").shape == (2, 0, 4)
    assert reference.conv(q(2, 5, 2), 0, q(3, 2, 0), 0, **options).shape == (2, 3, 0)
    empty_sum = reference.conv(q(1, 5, 0), 0, q(3, 0, 2), 0, **options)
    assert bits_of(empty_sum) == [0] * 6
    dx = reference.conv_input_gradient(q(2, 0, 4), 0, q(3, 2, 4), 0, (2, 2, 2), **options)
    assert bits_of(dx) == [0] * 8
    dw = reference.conv_weight_gradient(q(0, 5, 2), 0, q(0, 3, 4), 0, (3, 2, 4), **options)
    assert bits_of(dw) == [0] * 24
    dw = reference.depthwise_conv_weight_gradient(
        q(2, 2, 2), 0, q(2, 0, 4), 0, (3, 2, 2), **options
    )
    assert bits_of(dw) == [0] * 12
    assert reference.depthwise_conv(q(2, 5, 0), 0, q(3, 0, 2), 0, **options).shape == (2, 3, 0)
    assert bits_of(reference.matmul(q(1, 0), 5, q(0, 1), 5, **options)) == [0]


@pytest.mark.parametrize("accumulation", ["exact", "spill"])
def test_one_nan_exponent_makes_every_element_nan(accumulation):
    case = Case(1, (3, 3), (2, 2), (3, 3), (1, 1), "valid", 2, 2, 1, False)
    for exponents in ((NAN_EXPONENT, 0), (3, NAN_EXPONENT), (NAN_EXPONENT, NAN_EXPONENT)):
        for which, one in itertools.product(
            ("forward", "input", "weight"),
            (case, case._replace(groups=2, depthwise=True)),
        ):
            a, b = (np.zeros(shape, np.int16) for shape in operands(one, which))
            y = computed(one, which, a, exponents[0], b, exponents[1], 14, 14, accumulation)
            assert set(bits_of(y)) == {NAN_BITS}
        a = np.zeros((2, 2), np.int16)
        y = reference.matmul(a, exponents[0], a, exponents[1], accumulation=accumulation)
        assert set(bits_of(y)) == {NAN_BITS}


@pytest.mark.parametrize("depthwise", [False, True], ids=["conv", "depthwise"])
@pytest.mark.parametrize("which", ["forward", "input"])
def test_an_image_is_computed_as_it_is_alone(which, depthwise):
    case = Case(3, (5, 4), (3, 2), (2, 1), (1, 1), "same", 2, 4, 2, depthwise)
    rng = np.random.default_rng(0)
    a, b = (mantissas(rng, shape, 14) for shape in operands(case, which))
    ea = np.array([-3, NAN_EXPONENT, -160])
    together = computed(case, which, a, ea, b, -7, 14, 14, "exact")
    for n in range(3):
        one = case._replace(batch=1)
        alone = computed(one, which, a[n : n + 1], int(ea[n]), b, -7, 14, 14, "exact")
        assert bits_of(together[n : n + 1]) == bits_of(alone)


@pytest.mark.parametrize("depthwise", [False, True], ids=["conv", "depthwise"])
def test_one_nan_of_an_image_makes_the_weight_gradient_nan(depthwise):
    case = Case(2, (3,), (2,), (1,), (1,), "valid", 2, 2, 2, depthwise)
    a, b = (np.zeros(shape, np.int16) for shape in operands(case, "weight"))
    for ea, eb in (([0, NAN_EXPONENT], 3), (3, [NAN_EXPONENT, 0]), ([NAN_EXPONENT, 0], [0, 1])):
        dw = computed(case, "weight", a, np.array(ea), b, np.array(eb), 14, 14, "exact")
        assert set(bits_of(dw)) == {NAN_BITS}


def zeros(*shape):
    return np.zeros(shape, np.int16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qx": np.zeros((1, 5, 5, 4))}, "`x` must be int16"),
        ({"qw": np.zeros((3, 3, 4, 2), np.int8)}, "`w` must be int16"),
        ({"qx": zeros(1, 5, 4)}, "rank"),
        ({"qx": zeros(1, 4), "qw": zeros(4, 2)}, "rank"),
        ({"qx": zeros(1, 2, 2, 2, 2, 4), "qw": zeros(1, 1, 1, 1, 4, 2)}, "rank"),
        ({"qx": zeros(1, 5, 5, 6)}, "channels"),
        ({"qx": zeros(1, 5, 5, 0)}, "channels"),
        ({"qw": zeros(3, 3, 0, 2)}, "channels"),
        ({"qw": zeros(3, 3, 2, 3)}, "filters"),
        ({"qw": zeros(0, 3, 4, 2)}, "empty"),
        ({"strides": 0}, "strides"),
        ({"strides": (1, 0)}, "strides"),
        ({"strides": (1, 1, 1)}, "strides"),
        ({"strides": 1.5}, "strides"),
        ({"strides": None}, "strides"),
        ({"dilations": (0, 1)}, "dilations"),
        ({"dilations": -1}, "dilations"),
        ({"padding": "full"}, "padding"),
        ({"padding": [(1, 1)]}, "padding"),
        ({"padding": [(1, 1), (-1, 0)]}, "padding"),
        ({"padding": [(1, 1), (0.5, 0)]}, "padding"),
        ({"qx": np.full((1, 5, 5, 4), -8192, np.int16)}, "from -8191 to 8191"),
        ({"w_bits": 0}, "8 to 16"),
        ({"ew": -(2**31) - 1}, "int32"),
        ({"ex": np.zeros(2, np.int32)}, r"`ex` must have the shape of leading axes .* \(2,\)"),
        ({"accumulation": ""}, "accumulation"),
    ],
)
def test_conv_refuses(arguments, message):
    good = {"qx": zeros(1, 5, 5, 4), "ex": 0, "qw": zeros(3, 3, 4, 2), "ew": 0}
    with pytest.raises(ValueError, match=message):
        reference.conv(**{**good, **arguments})


def test_other_convolutions_refuse():
    with pytest.raises(ValueError, match="channels"):
        reference.depthwise_conv(zeros(1, 5, 4), 0, zeros(3, 2, 2), 0)
    with pytest.raises(ValueError, match="`dy` must have shape"):
        reference.conv_input_gradient(zeros(1, 4, 2), 0, zeros(3, 4, 2), 0, (1, 5, 4))
    with pytest.raises(ValueError, match="`dy` must have shape"):
        reference.conv_weight_gradient(zeros(1, 5, 4), 0, zeros(2, 3, 2), 0, (3, 4, 2))
    with pytest.raises(ValueError, match="`dy` must have shape"):
        reference.depthwise_conv_input_gradient(zeros(1, 3, 4), 0, zeros(3, 4, 2), 0, (1, 5, 4))
    with pytest.raises(ValueError, match="`dy` must have shape"):
        reference.depthwise_conv_weight_gradient(zeros(1, 5, 4), 0, zeros(1, 3, 4), 0, (3, 4, 2))
    pair = np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="`edy` must have the shape of leading axes"):
        reference.conv_input_gradient(zeros(1, 3, 2), pair, zeros(3, 4, 2), 0, (1, 5, 4))
    with pytest.raises(ValueError, match="`edy` must have the shape of leading axes"):
        reference.conv_weight_gradient(zeros(1, 5, 4), 0, zeros(1, 3, 2), pair, (3, 4, 2))
    with pytest.raises(ValueError, match="`ex` must have the shape of leading axes"):
        reference.depthwise_conv_weight_gradient(zeros(1, 5, 4), pair, zeros(1, 3, 4), 0, (3, 4, 1))
    with pytest.raises(ValueError, match="input_shape"):
        reference.conv_input_gradient(zeros(1, 3, 2), 0, zeros(3, 4, 2), 0, (1, -5, 4))
    with pytest.raises(ValueError, match="kernel_shape"):
        reference.conv_weight_gradient(zeros(1, 5, 4), 0, zeros(1, 3, 2), 0, (3, 4))


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("strides", "dilations"), [(1, 1), (2, 1), (3, 1), (1, 2), (1, 3)])
def test_tensorflow_agrees_on_geometry(padding, strides, dilations):
    tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(8)
    x, w, v = (
        rng.integers(-9, 10, s).astype(np.int16)
        for s in ((2, 10, 9, 3), (4, 3, 3, 5), (4, 3, 3, 2))
    )
    fx, fw, fv = (tf.constant(q, tf.float32) for q in (x, w, v))
    options = {"strides": strides, "padding": padding, "dilations": dilations}
    with tf.GradientTape() as tape:
        tape.watch((fx, fw))
        y = tf.nn.conv2d(fx, fw, strides, padding.upper(), dilations=dilations)
        loss = tf.reduce_sum(y * y)
    assert np.array_equal(reference.conv(x, 0, w, 0, **options), y)
    depthwise = tf.nn.depthwise_conv2d(
        fx, fv, [1, strides, strides, 1], padding.upper(), dilations=(dilations,) * 2
    )
    assert np.array_equal(reference.depthwise_conv(x, 0, v, 0, **options), depthwise)
    if dilations == 1:
        dx, dw = tape.gradient(loss, (fx, fw))
        dy = (2 * y.numpy()).astype(np.int16)
        options["dy_bits"] = 16
        assert np.array_equal(reference.conv_input_gradient(dy, 0, w, 0, x.shape, **options), dx)
        assert np.array_equal(reference.conv_weight_gradient(x, 0, dy, 0, w.shape, **options), dw)


# ---------------------------------------------------------------------------------------------
# Batch norm
# ---------------------------------------------------------------------------------------------


def far_apart(rng, *shape):
    """Magnitudes so far apart that every order of adding has its own result."""
    x = np.ldexp(rng.standard_normal(shape), rng.integers(-140, 60, shape)).astype(np.float32)
    # Arithmetic of float32 on the unit itself, which the reference avoids, sees these as well.
    x[rng.random(shape) < 0.1] = np.float32(-0.0)
    return x


def added_in_order(values):
    """Adds Python floats `[images, pixels]` of one channel."""
    total = 0.0
    for image in values:
        for first in range(0, len(image), 128):
            partial = 0.0
            for value in image[first : first + 128]:
                partial += value
            total += partial
    return total


SHAPES_OF_ROWS = [(4, 2), (300, 1), (2, 3, 4, 3), (3, 129, 2), (2, 17, 16, 1), (2, 2, 3, 4, 1)]


@pytest.mark.parametrize("shape", SHAPES_OF_ROWS)
def test_moments_and_sums(shape):
    rng = np.random.default_rng(9)
    x, dy = far_apart(rng, *shape), far_apart(rng, *shape)
    mean, variance = reference.moments(x)
    given = far_apart(rng, 2, shape[-1])
    given[1] = abs(given[1])
    doffset, dscale, sums = reference.normalize_sums(dy, x, *given, epsilon=1e-3)
    images = 1 if len(shape) == 2 else shape[0]
    n = x.size // shape[-1]
    for c in range(shape[-1]):
        values, gradients = (
            t[..., c].reshape(images, -1).astype(np.float64).tolist() for t in (x, dy)
        )
        m = added_in_order(values) / n
        v = added_in_order([[a * a for a in image] for image in values]) / n - m * m
        assert mean[c] == np.float32(m)
        assert variance[c] == np.float32(max(v, 0.0))
        centred = (x[..., c] - given[0, c]).reshape(images, -1).astype(np.float64).tolist()
        products = [
            [a * b for a, b in zip(*pair, strict=True)]
            for pair in zip(gradients, centred, strict=True)
        ]
        total, product = added_in_order(gradients), added_in_order(products)
        deviation = math.sqrt(float(given[1, c]) + float(np.float32(1e-3)))
        assert sums[:, c].tolist() == [total, product]
        assert doffset[c] == np.float32(total)
        assert dscale[c] == np.float32(product * (1 / deviation))
    assert [t.dtype for t in (mean, variance, doffset, dscale)] == [np.float32] * 4
    assert sums.dtype == np.float64
    alone, *none = reference.normalize_sums(dy)
    assert bits_of(alone) == bits_of(doffset)
    assert none == [None, None]


def test_moments_of_special_values():
    inf, nan = np.inf, np.nan
    x = np.array([[[0.0, -0.0, inf, 1.0, -inf], [-0.0, -0.0, 1.0, nan, inf]]], np.float32)
    mean, variance = reference.moments(x)
    np.testing.assert_array_equal(mean, [0, 0, inf, nan, nan])
    np.testing.assert_array_equal(variance, [0, 0, nan, nan, nan])
    assert not np.signbit(mean[:2]).any()
    assert not np.signbit(variance[:2]).any()
    # Rounding may leave less than nothing.
    x = np.full((1, 7, 1), 0.1, np.float32)
    assert reference.moments(x)[1] >= 0
    for shape in ((0, 3, 1), (2, 0, 1), (0, 1)):
        assert np.isnan(reference.moments(np.zeros(shape, np.float32))).all()
        doffset, _, _ = reference.normalize_sums(np.zeros(shape, np.float32))
        assert bits_of(doffset) == [0]


@pytest.mark.parametrize("shape", SHAPES_OF_ROWS)
def test_normalize_is_float32_arithmetic(shape):
    rng = np.random.default_rng(8)
    x, residual, dy = (far_apart(rng, *shape) for _ in range(3))
    mean, offset, scale, variance = far_apart(rng, 4, shape[-1])
    variance = abs(variance)
    epsilon = np.float32(1e-3)
    r = 1 / np.sqrt(variance.astype(np.float64) + np.float64(epsilon))
    s = scale * r
    with np.errstate(all="ignore"):
        y = (x - mean) * s.astype(np.float32) + offset
        six = np.where(y + residual > 6, np.float32(6), np.maximum(y + residual, np.float32(0)))
        sums = np.array([offset, mean], np.float64)
        n = x.size // shape[-1]
        b, c = (-s * r * r * (sums[1] / n)).astype(np.float32), (-s * (sums[0] / n))
        given = s.astype(np.float32) * dy
        dx = given + (b * (x - mean) + c.astype(np.float32))
    four = offset, mean, variance, scale, 1e-3
    norm = x, mean, variance, scale, 1e-3
    pairs = [
        (reference.normalize(x), x),
        (reference.normalize(x, residual=residual), x + residual),
        (reference.normalize(x, offset), x + offset),
        (reference.normalize(x, *four), y),
        (reference.normalize(x, *four, residual), y + residual),
        (reference.normalize_gradient(dy, *norm), given),
        (reference.normalize_gradient(dy, *norm, sums), dx),
    ]
    for received, expected in pairs:
        assert expected.dtype == np.float32
        assert bits_of(received) == bits_of(expected)
    # Zeros of either sign are what they were.
    np.testing.assert_array_equal(reference.normalize(x, *four, residual, "relu6"), six)
    assert bits_of(reference.normalize(x, activation="relu")) == bits_of(np.where(x < 0, 0, x))


def test_clipping_and_masks():
    inf, nan = np.inf, np.nan
    y = np.array([[-inf, -1, -0.0, 0, 1e-45, 1, 6, 7, inf, nan]], np.float32)
    clipped = {
        "relu": [0, 0, -0.0, 0, 1e-45, 1, 6, 7, inf, nan],
        "relu6": [0, 0, -0.0, 0, 1e-45, 1, 6, 6, 6, nan],
    }
    kept = {"relu": [0, 0, 0, 0, 1, 1, 1, 1, 1, 0], "relu6": [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]}
    for clip in clipped:
        z = reference.normalize(y, activation=clip)
        assert bits_of(z[:, :-1]) == bits_of(np.float32(clipped[clip][:-1]))
        assert np.isnan(z[0, -1])
        for dy in (3.0, -1e-45):
            dy = np.full_like(y, dy)
            expected = dy * np.float32(kept[clip])
            assert bits_of(reference.mask(dy, y, clip)) == bits_of(expected)
            assert bits_of(reference.mask(dy, z, clip)) == bits_of(expected)
        infinite = reference.mask(np.full_like(y, inf), y, clip)[0]
        np.testing.assert_array_equal(infinite, np.where(kept[clip], inf, nan))


def test_silu():
    """Within 3 units of the last place, its derivative within 2**-21 of what is added in it."""
    v = np.concatenate([np.linspace(-87, 87, 4001), np.logspace(-40, 1.9, 999), [0.0]])
    v = np.stack([v, -v, v[::-1], np.zeros_like(v)], 1).astype(np.float32)
    wide = v.astype(np.float64)
    s, rest = 1 / (1 + np.exp(-wide)), 1 / (1 + np.exp(wide))
    y = reference.normalize(v, activation="silu")
    assert y.dtype == np.float32
    assert np.all(np.abs(y - wide * s) <= 3 * np.spacing(np.abs(wide * s).astype(np.float32)))
    slope = reference.silu_gradient(np.ones_like(v), v)
    assert np.all(np.abs(slope - s * (1 + wide * rest)) <= 2**-21 * s * (1 + np.abs(wide) * rest))
    dy = np.float32(np.random.default_rng(1).standard_normal(v.shape))
    assert bits_of(reference.silu_gradient(dy, v)) == bits_of(dy * slope)


def test_extremes_of_silu():
    inf, nan = np.inf, np.nan
    x = np.array([[-inf, -3e38, -88, -0.0, 0, 1e-45, 88, 3e38, inf, nan]], np.float32)
    y = np.array([[nan, -0.0, -0.0, -0.0, 0, 0, 88, 3e38, inf, nan]], np.float32)
    slope = np.array([[nan, -0.0, -0.0, 0.5, 0.5, 0.5, 1, 1, nan, nan]], np.float32)
    assert_same_numbers(reference.normalize(x, activation="silu"), y)
    assert_same_numbers(reference.silu_gradient(np.ones_like(x), x), slope)


def assert_same_numbers(received, expected):
    """Bit for bit, but any NaN is one."""
    np.testing.assert_array_equal(np.isnan(received), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert bits_of(received[numbers]) == bits_of(expected[numbers])


def test_arguments_of_batch_norm():
    x, c = np.zeros((2, 3), np.float32), np.zeros(3, np.float32)
    for call in (reference.moments, reference.normalize, reference.normalize_sums):
        with pytest.raises(ValueError, match="must be float32 of rank 2 or more, received float64"):
            call(np.zeros((2, 3)))
        with pytest.raises(ValueError, match=r"rank 2 or more, received float32 of shape \(3,\)"):
            call(c)
    wrong = [
        (lambda: reference.normalize(x, activation="gelu"), "normalize: `activation` must be one"),
        (lambda: reference.normalize(x, c, c), "offset alone or none, received .'offset', 'mean'"),
        (lambda: reference.normalize(x, c[:2]), "normalize: `offset` must be float32 of shape .3,"),
        (lambda: reference.normalize(x, residual=x.T), "`residual` must be float32 of shape .2, 3"),
        (lambda: reference.mask(x, x, "none"), "mask: `clip` must be one of"),
        (lambda: reference.silu_gradient(x, x.T), "silu_gradient: `x` must be float32 of shape"),
        (lambda: reference.mask(x, x.T, "relu"), "mask: `y` must be float32 of shape .2, 3"),
        (lambda: reference.normalize_sums(x, x), "`x`, `mean` and `variance` must be given togeth"),
        (lambda: reference.normalize_sums(x, x, c, c[:1]), "normalize_sums: `variance` must be fl"),
        (lambda: reference.normalize_gradient(x, x, c, c, x), "normalize_gradient: `scale` must"),
        (lambda: reference.normalize_gradient(x, x, c, c, c, 0, x), "`sums` must be float64 of sh"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
