"""The numeric contract of keras-dfp, in NumPy: slow, obvious and bit-exact.

Every native result equals the result of the function of the same name here, bit for bit, on every
CPU, instruction set and number of threads. The method is that of Das et al., *Mixed Precision
Training of Convolutional Neural Networks using Integer Operations*, ICLR 2018, arXiv 1802.00930.

**Numbers.** A dynamic fixed point (DFP) tensor is `(q: int16[...], e: int32[...])`. The shape of e
is that of some of the leading axes of q, or of none: the elements that share an index of those axes
are a group and share an exponent, and stand for `q * 2**e`. With B mantissa bits (8 to 16),
`|q| <= Q = 2**(B-1) - 1`. The exponent `NAN_EXPONENT = -2**31` marks a group that held a NaN or an
infinity: its q is 0, and every sum that it has a part in is NaN (the quiet NaN with bits
0x7fc00000).

**Quantize.** With `E = floor(log2(max|x|))` of a group, subnormals included, and -149 if it is all
zeros or empty:

    e = E - (B - 2)                    or given by the caller
    q = clamp(round(x * 2**-e), -Q, Q)

where x * 2**-e is exact and `round` is to nearest with ties to even ("nearest"), toward zero
("truncate") or `floor(x * 2**-e + u)` ("stochastic"), u in [0, 1) being 24 bits of Philox4x32-10:

    key     = (seed, tensor_id)                                 the low 32 bits of each
    counter = (i // 4 low, i // 4 high, step low, step high)    i: flat index of the element
    u       = (word[i % 4] >> 8) * 2**-24

**Product, accumulation "exact".** With RN32 the rounding to the nearest float32, ties to even,

    y = RN32(2**(ea + eb) * sum_k qa[k] * qb[k])

The sum is an integer without any error; it is rounded once. A zero sum is +0, overflow is infinite,
subnormal results are kept, and a nonzero sum that rounds to zero keeps its sign.

**Alignment.** `ea` and `eb` are those of the groups that the sum runs through. Where it runs
through several groups of an operand (a weight gradient sums over samples), the mantissas of b are
aligned first. With e[k] the sum of both exponents at k, E its maximum over k, and d = 1 (0 if b has
16 bits):

    y = RN32(2**(E - d) * sum_k qa[k] * RN(qb[k] * 2**(e[k] - E + d)))    RN: nearest, ties to even

So b has d bits more in this product, of which spilled chains take note; if in no sum of the product
the e[k] differ, nothing is aligned, and d = 0. One NaN group makes such a sum NaN.

**Product, accumulation "spill"**, the method of the paper. The terms, in a canonical order, are cut
into chunks of `L = floor((2**31 - 1) / (Qa * Qb))`, which cannot overflow INT32:

    y = RN32(2**(ea + eb) * (RN32(chunk_0) + RN32(chunk_1) + ...))        each + rounds to float32

from left to right. Terms that fall on padding are zero. The order, and what a chunk may hold:

    matmul                            k in chunks of L
    conv                              kernel positions; in each, the group's channels in chunks of L
    conv_input_gradient               kernel positions; in each, the group's filters in chunks of L
    conv_weight_gradient              output pixels (batch, row, column) in chunks of L
    depthwise_conv                    kernel positions in chunks of L
    depthwise_conv_input_gradient     (kernel position, multiplier) pairs in chunks of L
    depthwise_conv_weight_gradient    output pixels (batch, row, column) in chunks of L

Kernel positions go in row-major order of the forward kernel, never flipped.

**Batch norm**, biases, residual sums and ReLU are float32 arithmetic over rows of channels
`[.., C]`: every + - * rounds to float32, unless it is said to be in float64. A sum over pixels is
in float64, in a fixed order. The first axis counts images (of a matrix, all rows are one image);
the pixels of an image, in row-major order, are added in blocks of 128, each from +0, and then the
sums of the blocks, in order, image by image, from +0. With n the number of all pixels, in float64,

    m = sum(x) / n        v = sum(x * x) / n - m * m        r = 1 / sqrt(variance + epsilon)

a layer and its gradient are

    mean     = RN32(m)        variance = RN32(max(v, 0))
    y        = (x - mean) * RN32(scale * r) + offset        x + offset for a bias
             + residual, then clipped to 0 and more ("relu"), or to 0 to 6 ("relu6"), or as y * s
             ("silu"), see below
    dy       times 1 where y > 0 (of "relu6", and y < 6), else times 0; times s * (1 + y * r)
             of "silu", y being what it is of
    doffset  = RN32(S),  dscale = RN32(T * r)               S = sum(dy), T = sum(dy * (x - mean))
    dx       = a * dy + (b * (x - mean) + c)                a * dy if mean and variance are given
               with s = scale * r and a = RN32(s),
                    b = RN32(-s * r * r * (T / n)),  c = RN32(-s * (S / n))

where scale * r, T * r, b and c are computed in float64, from left to right, and so are the terms of
T from the float32 x - mean. All NaN are one.

**SiLU**, and its derivative, are float32 arithmetic too, with c6 to c2 as in `_EXP`. For a = |v|,

    n = the integer nearest to a * 1.442695        x = (n * 0.693359375 - a) + n * -0.000212194442
    p = (((c6 * x + c5) * x + c4) * x + c3) * x + c2           t = (p * x * x + x + 1) * 2**-n
    large = 1 / (1 + t)        small = t * large               t = 0 where a > 87
    s = large, r = small where v >= 0;  s = small, r = large where v < 0

so that t is exp(-a), s the logistic function, and r = 1 - s.

**Optimizers.** A step for weights w, gradient g, rate and the numbered step t = 1, 2, .. is float32
arithmetic element by element, each operation rounded, from left to right as written. All constants
are rounded to float32 first. With decay, w becomes w - w * decay * rate before. Then

    SGD      w - g * rate
    momentum m = m * momentum - g * rate       w + m, nesterov: w + (m * momentum - g * rate)
    Adam     m = m + (g - m) * renewal_1       renewal = 1 - beta in float64
             v = v + (g * g - v) * renewal_2
             h = max(h, v) with amsgrad, else v
             w - m * alpha / (sqrt(h) + epsilon)
             alpha = RN32(rate * sqrt(1 - beta_2**t) / (1 - beta_1**t)) in float64

beta**t is in float64, by squaring: from the lowest bit of t on, p = p * beta where it is set, and
beta = beta * beta. m, v and h may be kept in dynamic fixed point with 16 bits, each 64 elements of
the flat tensor a group, rounded stochastically with the number of the variable as seed, of the slot
(m: 0, v: 1, h: 2) as tensor_id, and of the step. Of v and h, RN32(sqrt) is kept, with the mantissa
1 where it is above zero and its mantissa would be 0; what is read is its square, RN32.

**Gradients of several workers.** N > 1 shares x_r of a gradient, exchanged in dynamic fixed
point, have B = min(14, 16 - ceil(log2(N))) bits and the exponent e = max(e_r), e_r being that of
x_r alone:

    sum = RN32(2**e * sum_r clamp(round(x_r * 2**-e), -Q, Q))        NaN if any e_r is NAN_EXPONENT

**Floating point units.** Some threads flush subnormals to zero. Nothing here depends on it:
float32 values are taken apart and put together as integers, and their arithmetic is that of
float64, rounded to float32. (Rounding twice changes no sum, difference or product.)
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

NAN_EXPONENT = -(2**31)

_FLOAT32_FRACTION_BITS = 23
_FLOAT32_LEAST_EXPONENT = -149  # of the lowest bit of a subnormal
_FLOAT32_INFINITY = 0x7F800000
_ROUNDINGS = ("nearest", "truncate", "stochastic")
_ACCUMULATIONS = ("exact", "spill")
_CLIPS = ("relu", "relu6")
_ACTIVATIONS = ("none", *_CLIPS, "silu")
_SUMMED_PIXELS = 128  # of a partial sum
_SLOT_BLOCK = 64  # elements of a slot that share an exponent

Padding = str | Sequence[tuple[int, int]]
Exponents = int | np.ndarray


# ---------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------


def qmax(mantissa_bits: int) -> int:
    """Return Q, the largest mantissa of a format.

    Args:
        mantissa_bits: B, 8 to 16.

    Returns:
        `2**(B-1) - 1`.

    Raises:
        ValueError: if `mantissa_bits` is not an integer from 8 to 16.
    """
    if not isinstance(mantissa_bits, (int, np.integer)) or not 8 <= mantissa_bits <= 16:
        raise ValueError(
            f"mantissa bits must be an integer from 8 to 16, received {mantissa_bits!r}"
        )
    return 2 ** (int(mantissa_bits) - 1) - 1


def safe_chain(bits_a: int, bits_b: int) -> int:
    """Return L, how many products of two mantissas always fit into an INT32 sum.

    Args:
        bits_a: mantissa bits of one operand.
        bits_b: mantissa bits of the other.

    Returns:
        `floor((2**31 - 1) / (Qa * Qb))`.
    """
    return (2**31 - 1) // (qmax(bits_a) * qmax(bits_b))


def quantize(
    x: np.ndarray,
    mantissa_bits: int = 14,
    rounding: str = "nearest",
    exponent: Exponents | None = None,
    seed: int = 0,
    tensor_id: int = 0,
    step: int = 0,
    group_axes: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a float32 tensor to dynamic fixed point.

    Args:
        x: float32 array of any shape.
        mantissa_bits: B, 8 to 16.
        rounding: `"nearest"`, `"truncate"` or `"stochastic"`.
        exponent: the exponents to use, or `None` to take them from the largest magnitudes in `x`.
            Mantissas that do not fit are clamped.
        seed: first half of the key of stochastic rounding; its low 32 bits count.
        tensor_id: second half of that key; its low 32 bits count.
        step: upper half of the counter of stochastic rounding, `0 <= step < 2**63`.
        group_axes: how many leading axes of `x` have an exponent for each of their indices; with
            0 the tensor has one.

    Returns:
        `(q, e)`: int16 mantissas of the shape of `x`, and int32 exponents of the shape of its
        leading axes. With a NaN or an infinity in a group, or `NAN_EXPONENT` given, all of its
        mantissas are 0 and its exponent is `NAN_EXPONENT`.

    Raises:
        ValueError: if an argument is not as described.
    """
    x = np.asarray(x)
    limit = qmax(mantissa_bits)
    if x.dtype != np.float32:
        raise ValueError(f"quantize: `x` must be float32, received {x.dtype}")
    if rounding not in _ROUNDINGS:
        raise ValueError(f"quantize: `rounding` must be one of {_ROUNDINGS}, received {rounding!r}")
    if not 0 <= step < 2**63:
        raise ValueError(f"quantize: `step` must be from 0 to 2**63 - 1, received {step}")
    if not 0 <= group_axes <= x.ndim:
        raise ValueError(
            f"quantize: `group_axes` must be from 0 to the rank of `x`, {x.ndim}; received "
            f"{group_axes}"
        )
    inner = tuple(range(group_axes, x.ndim))
    amax_bits = np.max(_bits(x) & 0x7FFFFFFF, axis=inner, initial=0)
    significand, lowest = _significand_and_exponent(np.maximum(amax_bits, 1))
    e = _bit_length(significand.astype(np.uint64)) - 1 + lowest - (mantissa_bits - 2)
    if exponent is not None:
        e = _checked_exponent("quantize", "exponent", exponent)
        if e.shape != amax_bits.shape:
            raise ValueError(
                f"quantize: `exponent` must have shape {amax_bits.shape}, received {e.shape}"
            )
    e = np.where(amax_bits >= _FLOAT32_INFINITY, NAN_EXPONENT, e)
    exponents = e.astype(np.int32)
    e = e[(..., *[np.newaxis] * len(inner))]

    # |x| * 2**-e = magnitude / 2**right. The two bounds change no result: a nonzero significand
    # shifted left by 16 is clamped, and one shifted right by 50 is below the least nonzero u.
    significand, lowest = _significand_and_exponent(_bits(x) & 0x7FFFFFFF)
    magnitude = significand << np.clip(lowest - e, 0, 16)
    right = np.clip(e - lowest, 0, 50)
    negative = _bits(x) >> 31 == 1
    if rounding == "nearest":
        q = _shift_right_to_nearest_even(magnitude.astype(np.uint64), right).astype(np.int64)
        q = np.where(negative, -q, q)
    elif rounding == "truncate":
        q = magnitude >> right
        q = np.where(negative, -q, q)
    else:
        numerator = np.where(negative, -magnitude, magnitude)
        q = numerator >> right  # the floor, also of negative numbers
        fraction = numerator - (q << right)
        noise = _noise(x.size, seed, tensor_id, step).reshape(x.shape)
        one = np.maximum(right, 24)  # the common denominator of fraction and noise is 2**one
        q = q + (((fraction << (one - right)) + (noise << (one - 24))) >> one)
    q = np.where(e == NAN_EXPONENT, 0, np.clip(q, -limit, limit))
    return np.asarray(q.astype(np.int16)), exponents


def dequantize(q: np.ndarray, e: Exponents) -> np.ndarray:
    """Return the float32 values of a DFP tensor.

    Args:
        q: int16 mantissas.
        e: exponents, of the shape of leading axes of `q`.

    Returns:
        `RN32(q * 2**e)`, float32, of the shape of `q`; NaN in groups with `NAN_EXPONENT`.

    Raises:
        ValueError: if `q` is not int16, or `e` no int32 exponents of its leading axes.
    """
    q = np.asarray(q)
    if q.dtype != np.int16:
        raise ValueError(f"dequantize: `q` must be int16, received {q.dtype}")
    e = _leading("dequantize", "e", _checked_exponent("dequantize", "e", e), q.shape)
    return _scaled(q.astype(np.int64), e)


def exchange(shares: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sum of the shares that workers have of a gradient, as they exchange it in dfp16.

    A single share is the sum. With N shares, mantissas have `B = min(14, 16 - ceil(log2(N)))` bits,
    and all shares the largest of their exponents; so the sum of mantissas fits into 16 bits, and
    has no order.

    Args:
        shares: float32 arrays of one shape, at most 256.

    Returns:
        `RN32(2**e * sum of the mantissas)`, float32; NaN everywhere if a share has one anywhere, or
        an infinity.

    Raises:
        ValueError: if there are none, or too many.
    """
    if not 1 <= len(shares) <= 256:
        raise ValueError(f"exchange: there must be 1 to 256 shares, received {len(shares)}")
    if len(shares) == 1:
        return np.array(shares[0])
    bits = min(14, 16 - (len(shares) - 1).bit_length())
    own = [int(quantize(share, bits)[1]) for share in shares]
    e = NAN_EXPONENT if NAN_EXPONENT in own else max(own)
    mantissas = [quantize(share, bits, exponent=e)[0].astype(np.int64) for share in shares]
    return dequantize(np.sum(mantissas, axis=0).astype(np.int16), e)


def align(q: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return `RN(q * 2**-shift)`: mantissas that a larger exponent than their own stands for.

    Args:
        q: integer mantissas.
        shift: integers, none negative, that broadcast with `q`.

    Returns:
        int64 array, rounded to nearest with ties to even.
    """
    q = np.asarray(q).astype(np.int64)
    magnitude = np.abs(q).astype(np.uint64)
    aligned = _shift_right_to_nearest_even(magnitude, np.minimum(shift, 63)).astype(np.int64)
    return np.where(q < 0, -aligned, aligned)


def philox4x32(counter: np.ndarray, key: Sequence[int]) -> np.ndarray:
    """Return the random words of Philox4x32-10 (Salmon et al., SC 2011).

    Args:
        counter: integers `[..., 4]`, each from 0 to 2**32 - 1.
        key: two integers from 0 to 2**32 - 1.

    Returns:
        uint32 array of the shape of `counter`.
    """
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter).astype(np.uint64), -1, 0)
    k0, k1 = (int(half) for half in key)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * c0
        product1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product1 >> half) ^ c1 ^ np.uint64(k0),
            product1 & low,
            (product0 >> half) ^ c3 ^ np.uint64(k1),
            product0 & low,
        )
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def round_scaled(sums: np.ndarray, e: Exponents) -> np.ndarray:
    """Return `RN32(2**e * sums)`, rounded once.

    Args:
        sums: int64 array.
        e: exponents, any integers that broadcast with `sums`.

    Returns:
        float32 array of the shape of `sums`: to nearest with ties to even, subnormals kept,
        overflow infinite, zero +0; a nonzero value that rounds to zero keeps its sign.

    Raises:
        ValueError: if `sums` is not int64.
    """
    sums = np.asarray(sums)
    if sums.dtype != np.int64:
        raise ValueError(f"round_scaled: `sums` must be int64, received {sums.dtype}")
    # Beyond these bounds every nonzero int64 overflows or rounds to zero, as it does on them.
    e = np.clip(np.asarray(e).astype(np.int64), -400, 400)
    negative = sums < 0
    magnitude = np.abs(sums).astype(np.uint64)  # abs leaves -2**63 as it is; here it becomes 2**63
    leading = _bit_length(magnitude) - 1 + e
    # The value of the result's lowest bit is 2**lowest.
    lowest = np.maximum(leading - _FLOAT32_FRACTION_BITS, _FLOAT32_LEAST_EXPONENT)
    left = np.maximum(e - lowest, 0).astype(np.uint64)
    right = np.clip(lowest - e, 0, 63)
    significand = _shift_right_to_nearest_even(magnitude << left, right).astype(np.int64)
    significand = np.where(lowest - e > 63, 0, significand)  # at most half of the lowest bit
    # The significand's leading one adds 1 to the exponent field, a carry out of it one more, and a
    # subnormal has none: the sum is right in all three cases.
    bits = ((lowest - _FLOAT32_LEAST_EXPONENT) << _FLOAT32_FRACTION_BITS) + significand
    bits = np.where(magnitude == 0, 0, np.minimum(bits, _FLOAT32_INFINITY))
    bits = np.where(negative, bits | 0x80000000, bits)
    return np.asarray(bits.astype(np.uint32)).view(np.float32)


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint32).astype(np.int64)


def _significand_and_exponent(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take finite float32 magnitudes apart: value = significand * 2**exponent, both int64."""
    field = bits >> _FLOAT32_FRACTION_BITS
    fraction = bits & 0x7FFFFF
    significand = np.where(field > 0, fraction | 0x800000, fraction)
    return significand, np.maximum(field, 1) - 1 + _FLOAT32_LEAST_EXPONENT


def _shift_right_to_nearest_even(magnitude: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return uint64 magnitude / 2**shift to nearest, ties to even; shift from 0 to 63."""
    shift = shift.astype(np.uint64)
    quotient = magnitude >> shift
    below = magnitude - (quotient << shift)
    above = (np.uint64(1) << shift) - below
    odd = quotient & np.uint64(1) == 1
    return quotient + ((below > above) | ((below == above) & odd))


def _bit_length(magnitude: np.ndarray) -> np.ndarray:
    length = np.zeros(magnitude.shape, np.int64)
    for shift in (32, 16, 8, 4, 2, 1):
        high = magnitude >> np.uint64(shift)
        length += np.where(high > 0, shift, 0)
        magnitude = np.where(high > 0, high, magnitude)
    return length + (magnitude > 0)


def _noise(count: int, seed: int, tensor_id: int, step: int) -> np.ndarray:
    """Return 2**24 * u for each of `count` elements, int64."""
    block = np.arange(-(-count // 4), dtype=np.int64)
    counter = np.stack(
        [
            block & 0xFFFFFFFF,
            block >> 32,
            np.full_like(block, step & 0xFFFFFFFF),
            np.full_like(block, step >> 32),
        ],
        axis=-1,
    )
    words = philox4x32(counter, (seed & 0xFFFFFFFF, tensor_id & 0xFFFFFFFF))
    return words.reshape(-1)[:count].astype(np.int64) >> 8


# ---------------------------------------------------------------------------------------------
# Accumulation
# ---------------------------------------------------------------------------------------------


def _accumulate(
    chunks: Iterable[np.ndarray], shape: tuple[int, ...], accumulation: str
) -> np.ndarray:
    """Add int64 chunk sums in order: exactly, or as float32 in spill mode. Return int64."""
    if accumulation == "exact":
        total = np.zeros(shape, np.int64)
        for chunk in chunks:
            total += chunk
        return total
    total = np.zeros(shape, np.float32)
    for chunk in chunks:
        total += chunk.astype(np.int32).astype(np.float32)
    return total.astype(np.int64)  # exact: a float32 sum of integers is an integer


def _scaled(total: np.ndarray, *exponents: np.ndarray) -> np.ndarray:
    """Return RN32(2**(sum of exponents) * total), NaN where one of them marks a NaN."""
    nan = functools.reduce(np.logical_or, [e == NAN_EXPONENT for e in exponents])
    return np.where(nan, np.float32(np.nan), round_scaled(total, sum(exponents)))


def _aligned(
    qb: np.ndarray, ek: np.ndarray, axis: int, bits: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Align b, whose products have the exponents `ek` along the axis that is summed over.

    Args:
        qb: int64 mantissas.
        ek: int64 exponents that broadcast with `qb`.
        axis: the axis of both that the product sums over.
        bits: mantissa bits of b.

    Returns:
        The mantissas, the exponent of each sum (the axis is kept with a size of 1), and the bits
        that the mantissas have now.
    """
    nan = np.any(ek == NAN_EXPONENT, axis, keepdims=True)
    most = np.max(ek, axis, keepdims=True, initial=2 * NAN_EXPONENT)
    more = int(bits < 16 and np.any((ek != most) & ~nan))
    aligned = align(qb << more, np.where(nan, 0, most - ek))
    return aligned, np.where(nan, NAN_EXPONENT, most - more), bits + more


def _added(*exponents: np.ndarray) -> np.ndarray:
    """Return the sum of exponents, NaN where one of them marks a NaN."""
    nan = functools.reduce(np.logical_or, [e == NAN_EXPONENT for e in exponents])
    return np.where(nan, NAN_EXPONENT, sum(exponents))


def _chain(accumulation: str, bits_a: int, bits_b: int, length: int) -> int:
    """Return how many of `length` terms make a chunk; one chunk does for exact sums."""
    return safe_chain(bits_a, bits_b) if accumulation == "spill" else max(length, 1)


def _cuts(length: int, chain: int) -> Iterator[slice]:
    return (slice(start, start + chain) for start in range(0, length, chain))


# ---------------------------------------------------------------------------------------------
# Matrix product
# ---------------------------------------------------------------------------------------------


def matmul(
    qa: np.ndarray,
    ea: Exponents,
    qb: np.ndarray,
    eb: Exponents,
    *,
    a_bits: int = 14,
    b_bits: int = 14,
    accumulation: str = "exact",
) -> np.ndarray:
    """Return the matrix product of two DFP tensors.

    Args:
        qa: int16 mantissas `[..., M, K]`.
        ea: exponents of `a`: one, or an array that broadcasts to `[..., M, 1]` or `[..., 1, K]`.
            (The leading axes of a tensor are rows or, where its transpose is multiplied, what is
            summed over.)
        qb: int16 mantissas `[..., K, N]`, with the batch dimensions of `qa`.
        eb: exponents of `b`: one, or an array that broadcasts to `[..., 1, N]` or `[..., K, 1]`.
        a_bits: mantissa bits of `a`.
        b_bits: mantissa bits of `b`.
        accumulation: `"exact"` or `"spill"`.

    Returns:
        float32 array `[..., M, N]`.

    Raises:
        ValueError: if an argument is not as described.
    """
    op = "matmul"
    _check_accumulation(op, accumulation)
    qa, ea = _checked_operand(op, "a", qa, ea, a_bits)
    qb, eb = _checked_operand(op, "b", qb, eb, b_bits)
    if qa.ndim < 2 or qb.ndim != qa.ndim or qa.shape[:-2] != qb.shape[:-2]:
        raise ValueError(
            f"{op}: `a` and `b` must have the same rank of at least 2 and the same batch "
            f"dimensions, received shapes {qa.shape} and {qb.shape}"
        )
    depth = qa.shape[-1]
    if qb.shape[-2] != depth:
        raise ValueError(
            f"{op}: the last dimension of `a` must equal the last but one of `b`, received shapes "
            f"{qa.shape} and {qb.shape}"
        )
    rows, along_a = _along(op, "ea", ea, qa.shape, -1)
    columns, along_b = _along(op, "eb", eb, qb.shape, -2)
    ek = _added(np.swapaxes(along_a, -1, -2), along_b)
    if ek.shape[-2] != 1:
        qb, ek, b_bits = _aligned(qb, ek, -2, b_bits)
    chunks = (
        qa[..., cut] @ qb[..., cut, :]
        for cut in _cuts(depth, _chain(accumulation, a_bits, b_bits, depth))
    )
    total = _accumulate(chunks, (*qa.shape[:-1], qb.shape[-1]), accumulation)
    return _scaled(total, rows, columns, ek)


def _along(
    op: str, name: str, e: np.ndarray, shape: tuple[int, ...], summed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split exponents in those that vary along the summed axis and those that do not."""
    e = e.reshape((1,) * (len(shape) - e.ndim) + e.shape)
    fits = all(n in (1, size) for n, size in zip(e.shape, shape, strict=False))
    if e.ndim > len(shape) or not fits or 1 not in e.shape[-2:]:
        raise ValueError(
            f"{op}: `{name}` must broadcast to the mantissas' shape {shape} and may vary along one "
            f"of the last two axes, received shape {e.shape}"
        )
    none = np.zeros((1, 1), np.int64)
    return (none, e) if e.shape[summed] != 1 else (e, none)


# ---------------------------------------------------------------------------------------------
# Geometry of convolutions
# ---------------------------------------------------------------------------------------------


class _Geometry(NamedTuple):
    """Where the taps of a convolution fall.

    Attributes:
        padding: `(before, after)` for each spatial dimension.
        padded: spatial shape of the input with its padding.
        output: spatial shape of the output.
        taps: for each kernel position, in row-major order, its index and the slices of the padded
            input that it meets: one element for each output pixel.
    """

    padding: tuple[tuple[int, int], ...]
    padded: tuple[int, ...]
    output: tuple[int, ...]
    taps: list[tuple[tuple[int, ...], tuple[slice, ...]]]


def _geometry(
    op: str,
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: int | Sequence[int],
    dilations: int | Sequence[int],
    padding: Padding,
) -> _Geometry:
    rank = len(size)
    strides = _per_dimension(op, "strides", strides, rank)
    dilations = _per_dimension(op, "dilations", dilations, rank)
    if min(kernel) < 1:
        raise ValueError(
            f"{op}: the kernel must have no empty spatial dimension, received {kernel}"
        )
    span = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if isinstance(padding, str) and padding == "valid":
        padding = ((0, 0),) * rank
    elif isinstance(padding, str) and padding == "same":
        # TensorFlow's rule: ceil(size / stride) outputs, the odd element of padding goes after.
        missing = [
            max((-(-n // s) - 1) * s + width - n, 0)
            for n, s, width in zip(size, strides, span, strict=True)
        ]
        padding = tuple((m // 2, m - m // 2) for m in missing)
    else:
        padding = _checked_padding(op, padding, rank)
    padded = tuple(n + before + after for n, (before, after) in zip(size, padding, strict=True))
    output = tuple(max((n - w) // s + 1, 0) for n, w, s in zip(padded, span, strides, strict=True))
    taps = []
    for position in itertools.product(*map(range, kernel)):
        starts = [k * d for k, d in zip(position, dilations, strict=True)]
        slices = tuple(
            slice(start, start + n * s, s)
            for start, n, s in zip(starts, output, strides, strict=True)
        )
        taps.append((position, slices))
    return _Geometry(padding, padded, output, taps)


def _padded(x: np.ndarray, geometry: _Geometry) -> np.ndarray:
    return np.pad(x, ((0, 0), *geometry.padding, (0, 0)))


def _cropped(x: np.ndarray, geometry: _Geometry) -> np.ndarray:
    inner = [slice(b, n - a) for (b, a), n in zip(geometry.padding, geometry.padded, strict=True)]
    return x[(slice(None), *inner)]


# ---------------------------------------------------------------------------------------------
# Convolution
# ---------------------------------------------------------------------------------------------


def conv(
    qx: np.ndarray,
    ex: Exponents,
    qw: np.ndarray,
    ew: Exponents,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "valid",
    dilations: int | Sequence[int] = 1,
    x_bits: int = 14,
    w_bits: int = 14,
    accumulation: str = "exact",
) -> np.ndarray:
    """Return the convolution of a DFP tensor with a DFP kernel, in one to three dimensions.

    Args:
        qx: int16 mantissas `[N, spatial.., C]`.
        ex: exponent of `x`, or one for each of its N images.
        qw: int16 mantissas `[spatial.., C / groups, F]`; the groups follow from the shapes.
        ew: exponent of `w`.
        strides: a positive integer, or one for each spatial dimension.
        padding: `"valid"`, `"same"` (TensorFlow's rule) or `(before, after)` for each spatial
            dimension.
        dilations: a positive integer, or one for each spatial dimension.
        x_bits: mantissa bits of `x`.
        w_bits: mantissa bits of `w`.
        accumulation: `"exact"` or `"spill"`.

    Returns:
        float32 array `[N, spatial.., F]`; a spatial dimension shorter than the kernel gives an
        empty one.

    Raises:
        ValueError: if an argument is not as described.
    """
    op = "conv"
    _check_accumulation(op, accumulation)
    qx, ex = _checked_operand(op, "x", qx, ex, x_bits)
    qw, ew = _checked_operand(op, "w", qw, ew, w_bits)
    groups = _checked_groups(op, qx.shape, qw.shape)
    geometry = _geometry(op, qx.shape[1:-1], qw.shape[:-2], strides, dilations, padding)
    channels = qw.shape[-2]
    cuts = list(_cuts(channels, _chain(accumulation, x_bits, w_bits, channels)))
    x = _padded(qx, geometry)

    def chunks() -> Iterator[np.ndarray]:
        for position, slices in geometry.taps:
            patch = _grouped(x[(slice(None), *slices)], groups)
            weights = _grouped(qw[position], groups)
            for cut in cuts:
                yield _ungrouped(patch[:, :, cut] @ weights[:, cut], shape)

    shape = (qx.shape[0], *geometry.output, qw.shape[-1])
    return _scaled(_accumulate(chunks(), shape, accumulation), _leading(op, "ex", ex, shape), ew)


def conv_input_gradient(
    qdy: np.ndarray,
    edy: Exponents,
    qw: np.ndarray,
    ew: Exponents,
    input_shape: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "valid",
    dilations: int | Sequence[int] = 1,
    dy_bits: int = 14,
    w_bits: int = 14,
    accumulation: str = "exact",
) -> np.ndarray:
    """Return the gradient of `conv` with respect to its input.

    Args:
        qdy: int16 mantissas of the output's gradient, `[N, spatial.., F]`.
        edy: exponent of `dy`, or one for each of its N images.
        qw: int16 mantissas of the kernel, as in `conv`.
        ew: exponent of `w`.
        input_shape: shape of `x`.
        strides: as in `conv`.
        padding: as in `conv`.
        dilations: as in `conv`.
        dy_bits: mantissa bits of `dy`.
        w_bits: mantissa bits of `w`.
        accumulation: `"exact"` or `"spill"`.

    Returns:
        float32 array of `input_shape`.

    Raises:
        ValueError: if an argument is not as described.
    """
    op = "conv_input_gradient"
    _check_accumulation(op, accumulation)
    qdy, edy = _checked_operand(op, "dy", qdy, edy, dy_bits)
    qw, ew = _checked_operand(op, "w", qw, ew, w_bits)
    input_shape = _checked_shape(op, "input_shape", input_shape)
    batch, *size, channels = input_shape
    groups = _checked_groups(op, input_shape, qw.shape)
    geometry = _geometry(op, tuple(size), qw.shape[:-2], strides, dilations, padding)
    _check_output(op, qdy.shape, (batch, *geometry.output, qw.shape[-1]))
    filters = qw.shape[-1] // groups
    cuts = list(_cuts(filters, _chain(accumulation, dy_bits, w_bits, filters)))
    dy = _grouped(qdy, groups)

    def chunks() -> Iterator[np.ndarray]:
        for position, slices in geometry.taps:
            weights = _grouped(qw[position], groups).swapaxes(1, 2)
            for cut in cuts:
                chunk = np.zeros(shape, np.int64)
                product = dy[:, :, cut] @ weights[:, cut]
                chunk[(slice(None), *slices)] = _ungrouped(
                    product, (batch, *geometry.output, channels)
                )
                yield chunk

    shape = (batch, *geometry.padded, channels)
    total = _accumulate(chunks(), shape, accumulation)
    return _scaled(_cropped(total, geometry), _leading(op, "edy", edy, shape), ew)


def conv_weight_gradient(
    qx: np.ndarray,
    ex: Exponents,
    qdy: np.ndarray,
    edy: Exponents,
    kernel_shape: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "valid",
    dilations: int | Sequence[int] = 1,
    x_bits: int = 14,
    dy_bits: int = 14,
    accumulation: str = "exact",
) -> np.ndarray:
    """Return the gradient of `conv` with respect to its kernel.

    Args:
        qx: int16 mantissas of the input, as in `conv`.
        ex: exponent of `x`, or one for each of its N images.
        qdy: int16 mantissas of the output's gradient, `[N, spatial.., F]`.
        edy: exponent of `dy`, or one for each of its N images.
        kernel_shape: shape of `w`.
        strides: as in `conv`.
        padding: as in `conv`.
        dilations: as in `conv`.
        x_bits: mantissa bits of `x`.
        dy_bits: mantissa bits of `dy`.
        accumulation: `"exact"` or `"spill"`.

    Returns:
        float32 array of `kernel_shape`.

    Raises:
        ValueError: if an argument is not as described.
    """
    op = "conv_weight_gradient"
    _check_accumulation(op, accumulation)
    qx, ex = _checked_operand(op, "x", qx, ex, x_bits)
    qdy, edy = _checked_operand(op, "dy", qdy, edy, dy_bits)
    kernel_shape = _checked_shape(op, "kernel_shape", kernel_shape)
    groups = _checked_groups(op, qx.shape, kernel_shape)
    geometry = _geometry(op, qx.shape[1:-1], kernel_shape[:-2], strides, dilations, padding)
    _check_output(op, qdy.shape, (qx.shape[0], *geometry.output, kernel_shape[-1]))
    qdy, e, dy_bits = _aligned_images(op, qx.shape, ex, qdy, edy, dy_bits)
    x = _padded(qx, geometry)
    dy = _grouped(qdy, groups)
    pixels = dy.shape[1]
    cuts = list(_cuts(pixels, _chain(accumulation, x_bits, dy_bits, pixels)))

    total = np.zeros(kernel_shape, np.int64)
    for position, slices in geometry.taps:
        patch = _grouped(x[(slice(None), *slices)], groups).swapaxes(1, 2)
        chunks = (_ungrouped(patch[:, :, cut] @ dy[:, cut], kernel_shape[-2:]) for cut in cuts)
        total[position] = _accumulate(chunks, kernel_shape[-2:], accumulation)
    return _scaled(total, e)


def _aligned_images(
    op: str,
    x_shape: tuple[int, ...],
    ex: np.ndarray,
    qdy: np.ndarray,
    edy: np.ndarray,
    dy_bits: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Align `dy` for a sum over the images of a batch.

    Returns:
        It, the exponent of the sum, and the bits that `dy` has now.
    """
    e = _added(_leading(op, "ex", ex, x_shape), _leading(op, "edy", edy, qdy.shape))
    if ex.ndim or edy.ndim:
        qdy, e, dy_bits = _aligned(qdy, e, 0, dy_bits)
    return qdy, e.reshape(()), dy_bits


def _grouped(x: np.ndarray, groups: int) -> np.ndarray:
    """Lay out `[rows.., groups * channels]` as `[groups, rows, channels]`, for `@`."""
    rows = int(np.prod(x.shape[:-1]))
    return x.reshape(rows, groups, x.shape[-1] // groups).swapaxes(0, 1)


def _ungrouped(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Lay out `[groups, rows, channels]` as `shape`, which is `[rows.., groups * channels]`."""
    return x.swapaxes(0, 1).reshape(shape)


# ---------------------------------------------------------------------------------------------
# Depthwise convolution
# ---------------------------------------------------------------------------------------------


def depthwise_conv(
    qx: np.ndarray,
    ex: Exponents,
    qw: np.ndarray,
    ew: Exponents,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "valid",
    dilations: int | Sequence[int] = 1,
    x_bits: int = 14,
    w_bits: int = 14,
    accumulation: str = "exact",
) -> np.ndarray:
    """Return the depthwise convolution of a DFP tensor with a DFP kernel.

    Args:
        qx: int16 mantissas `[N, spatial.., C]`.
        ex: exponent of `x`, or one for each of its N images.
        qw: int16 mantissas `[spatial.., C, multiplier]`.
        ew: exponent of `w`.
        strides: as in `conv`.
        padding: as in `conv`.
        dilations: as in `conv`.
        x_bits: mantissa bits of `x`.
        w_bits: mantissa bits of `w`.
        accumulation: `"exact"` or `"spill"`.

    Returns:
        float32 array `[N, spatial.., C * multiplier]`; output channel `c * multiplier + m` is input
        channel `c` under `w[.., c, m]`.

    Raises:
        ValueError: if an argument is not as described.
    """
    op = "depthwise_conv"
    _check_accumulation(op, accumulation)
    qx, ex = _checked_operand(op, "x", qx, ex, x_bits)
    qw, ew = _checked_operand(op, "w", qw, ew, w_bits)
    _check_depthwise(op, qx.shape, qw.shape)
    geometry = _geometry(op, qx.shape[1:-1], qw.shape[:-2], strides, dilations, padding)
    taps = geometry.taps
    x = _padded(qx, geometry)[..., np.newaxis]
    shape = (qx.shape[0], *geometry.output, *qw.shape[-2:])

    def chunks() -> Iterator[np.ndarray]:
        for cut in _cuts(len(taps), _chain(accumulation, x_bits, w_bits, len(taps))):
            chunk = np.zeros(shape, np.int64)
            for position, slices in taps[cut]:
                chunk += x[(slice(None), *slices)] * qw[position]
            yield chunk

    total = _accumulate(chunks(), shape, accumulation)
    return _scaled(_merged_multiplier(total), _leading(op, "ex", ex, total.shape[:-1]), ew)


def depthwise_conv_input_gradient(
    qdy: np.ndarray,
    edy: Exponents,
    qw: np.ndarray,
    ew: Exponents,
    input_shape: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "valid",
    dilations: int | Sequence[int] = 1,
    dy_bits: int = 14,
    w_bits: int = 14,
    accumulation: str = "exact",
) -> np.ndarray:
    """Return the gradient of `depthwise_conv` with respect to its input.

    Args:
        qdy: int16 mantissas of the output's gradient, `[N, spatial.., C * multiplier]`.
        edy: exponent of `dy`, or one for each of its N images.
        qw: int16 mantissas of the kernel, as in `depthwise_conv`.
        ew: exponent of `w`.
        input_shape: shape of `x`.
        strides: as in `conv`.
        padding: as in `conv`.
        dilations: as in `conv`.
        dy_bits: mantissa bits of `dy`.
        w_bits: mantissa bits of `w`.
        accumulation: `"exact"` or `"spill"`.

    Returns:
        float32 array of `input_shape`.

    Raises:
        ValueError: if an argument is not as described.
    """
    op = "depthwise_conv_input_gradient"
    _check_accumulation(op, accumulation)
    qdy, edy = _checked_operand(op, "dy", qdy, edy, dy_bits)
    qw, ew = _checked_operand(op, "w", qw, ew, w_bits)
    input_shape = _checked_shape(op, "input_shape", input_shape)
    batch, *size, channels = input_shape
    _check_depthwise(op, input_shape, qw.shape)
    geometry = _geometry(op, tuple(size), qw.shape[:-2], strides, dilations, padding)
    multiplier = qw.shape[-1]
    _check_output(op, qdy.shape, (batch, *geometry.output, channels * multiplier))
    dy = qdy.reshape((batch, *geometry.output, channels, multiplier))
    terms = list(itertools.product(geometry.taps, range(multiplier)))
    shape = (batch, *geometry.padded, channels)

    def chunks() -> Iterator[np.ndarray]:
        for cut in _cuts(len(terms), _chain(accumulation, dy_bits, w_bits, len(terms))):
            chunk = np.zeros(shape, np.int64)
            for (position, slices), m in terms[cut]:
                chunk[(slice(None), *slices)] += dy[..., m] * qw[position][:, m]
            yield chunk

    total = _accumulate(chunks(), shape, accumulation)
    return _scaled(_cropped(total, geometry), _leading(op, "edy", edy, shape), ew)


def depthwise_conv_weight_gradient(
    qx: np.ndarray,
    ex: Exponents,
    qdy: np.ndarray,
    edy: Exponents,
    kernel_shape: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "valid",
    dilations: int | Sequence[int] = 1,
    x_bits: int = 14,
    dy_bits: int = 14,
    accumulation: str = "exact",
) -> np.ndarray:
    """Return the gradient of `depthwise_conv` with respect to its kernel.

    Args:
        qx: int16 mantissas of the input, as in `depthwise_conv`.
        ex: exponent of `x`, or one for each of its N images.
        qdy: int16 mantissas of the output's gradient, `[N, spatial.., C * multiplier]`.
        edy: exponent of `dy`, or one for each of its N images.
        kernel_shape: shape of `w`.
        strides: as in `conv`.
        padding: as in `conv`.
        dilations: as in `conv`.
        x_bits: mantissa bits of `x`.
        dy_bits: mantissa bits of `dy`.
        accumulation: `"exact"` or `"spill"`.

    Returns:
        float32 array of `kernel_shape`.

    Raises:
        ValueError: if an argument is not as described.
    """
    op = "depthwise_conv_weight_gradient"
    _check_accumulation(op, accumulation)
    qx, ex = _checked_operand(op, "x", qx, ex, x_bits)
    qdy, edy = _checked_operand(op, "dy", qdy, edy, dy_bits)
    kernel_shape = _checked_shape(op, "kernel_shape", kernel_shape)
    _check_depthwise(op, qx.shape, kernel_shape)
    geometry = _geometry(op, qx.shape[1:-1], kernel_shape[:-2], strides, dilations, padding)
    batch, channels, multiplier = qx.shape[0], *kernel_shape[-2:]
    _check_output(op, qdy.shape, (batch, *geometry.output, channels * multiplier))
    qdy, e, dy_bits = _aligned_images(op, qx.shape, ex, qdy, edy, dy_bits)
    x = _padded(qx, geometry)
    pixels = batch * int(np.prod(geometry.output))
    dy = qdy.reshape((pixels, channels, multiplier))
    cuts = list(_cuts(pixels, _chain(accumulation, x_bits, dy_bits, pixels)))

    total = np.zeros(kernel_shape, np.int64)
    for position, slices in geometry.taps:
        patch = x[(slice(None), *slices)].reshape((pixels, channels))
        chunks = (np.einsum("pc,pcm->cm", patch[cut], dy[cut]) for cut in cuts)
        total[position] = _accumulate(chunks, kernel_shape[-2:], accumulation)
    return _scaled(total, e)


def _merged_multiplier(x: np.ndarray) -> np.ndarray:
    return x.reshape((*x.shape[:-2], x.shape[-2] * x.shape[-1]))


# ---------------------------------------------------------------------------------------------
# Batch norm
# ---------------------------------------------------------------------------------------------


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the biased variance of each channel.

    Args:
        x: float32 array `[.., C]`, of rank 2 or more.

    Returns:
        `(mean, variance)`: float32 arrays `[C]`; NaN where there are no pixels.

    Raises:
        ValueError: if an argument is not as described.
    """
    op = "moments"
    x = _checked_rows(op, "x", x)
    wide, n = _float64(x), _pixels(x.shape)
    with np.errstate(all="ignore"):
        m = _sum_of_pixels(wide) / n
        v = _sum_of_pixels(wide * wide) / n - m * m
    return _float32(m), _float32(np.where(v < 0, 0.0, v))


def normalize(
    x: np.ndarray,
    offset: np.ndarray | None = None,
    mean: np.ndarray | None = None,
    variance: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    epsilon: float = 0.0,
    residual: np.ndarray | None = None,
    activation: str = "none",
) -> np.ndarray:
    """Return a batch norm or a bias, a residual sum and an activation, or some of these steps.

    Args:
        x: float32 array `[.., C]`, of rank 2 or more.
        offset: float32 array `[C]`; without the next three it is a bias.
        mean: float32 array `[C]`.
        variance: float32 array `[C]`.
        scale: float32 array `[C]`.
        epsilon: what is added to the variance, as a float32.
        residual: float32 array of the shape of `x`, which is added.
        activation: `"none"`, `"relu"`, `"relu6"` or `"silu"`.

    Returns:
        float32 array of the shape of `x`. NaN is not clipped, nor is -0.

    Raises:
        ValueError: if an argument is not as described.
    """
    op = "normalize"
    y = _float64(_checked_rows(op, "x", x))
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"{op}: `activation` must be one of {_ACTIVATIONS}, received {activation!r}"
        )
    parameters = {"offset": offset, "mean": mean, "variance": variance, "scale": scale}
    given = {
        name: _checked_channels(op, name, value, y.shape)
        for name, value in parameters.items()
        if value is not None
    }
    if list(given) not in ([], ["offset"], list(parameters)):
        raise ValueError(
            f"{op}: parameters must be all of {tuple(parameters)}, offset alone or none, received "
            f"{tuple(given)}"
        )
    with np.errstate(all="ignore"):
        if scale is not None:
            factor = _float64(given["scale"]) * _inverse_deviation(given["variance"], epsilon)
            y = _single(y - _float64(given["mean"]))
            y = _single(y * _single(factor))
        if offset is not None:
            y = _single(y + _float64(given["offset"]))
        if residual is not None:
            y = _single(y + _float64(_checked_alike(op, "residual", residual, y.shape)))
        if activation in _CLIPS:
            y = np.where(y < 0, 0.0, y)
        if activation == "relu6":
            y = np.where(y > 6, 6.0, y)
        if activation == "silu":
            y = y * _logistic(y)[0]
    return _float32(y)


def mask(dy: np.ndarray, y: np.ndarray, clip: str) -> np.ndarray:
    """Return the gradient of a ReLU with respect to its input.

    Args:
        dy: float32 array `[.., C]`, of rank 2 or more.
        y: float32 array of its shape: the ReLU's result, or its input.
        clip: `"relu"` or `"relu6"`.

    Returns:
        float32 array of the shape of `dy`: `dy * 1` where `0 < y`, and `y < 6` for a ReLU6, else
        `dy * 0`, which may be -0 or NaN.

    Raises:
        ValueError: if an argument is not as described.
    """
    op = "mask"
    dy = _checked_rows(op, "dy", dy)
    y = _float64(_checked_alike(op, "y", y, dy.shape))
    if clip not in _CLIPS:
        raise ValueError(f"{op}: `clip` must be one of {_CLIPS}, received {clip!r}")
    with np.errstate(all="ignore"):
        kept = (y > 0) & (y < 6) if clip == "relu6" else y > 0
        return _float32(_float64(dy) * kept)


def silu_gradient(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the gradient of a SiLU with respect to its input.

    Args:
        dy: float32 array `[.., C]`, of rank 2 or more.
        x: float32 array of its shape: the input of the SiLU.

    Returns:
        float32 array of the shape of `dy`.

    Raises:
        ValueError: if an argument is not as described.
    """
    op = "silu_gradient"
    dy = _checked_rows(op, "dy", dy)
    x = _float64(_checked_alike(op, "x", x, dy.shape))
    with np.errstate(all="ignore"):
        s, rest = _logistic(x)
        slope = _single(s * _single(1.0 + _single(x * rest)))
        return _float32(_float64(dy) * slope)


# exp(x) = 1 + x + x**2 * (c2 + x * (c3 + ..)) within 2**-28 where |x| <= ln(2) / 2.
_EXP = [
    np.float64(np.float32(c))
    for c in (0.00138144672, 0.00836878084, 0.0416683927, 0.166665196, 0.49999994)
]
_LOG2_E, _LN_2, _LN_2_REST = (
    np.float64(np.float32(c)) for c in (1.44269502, 0.693359375, -2.12194442e-4)
)


def _logistic(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return `1 / (1 + exp(-v))` and one less that, of float32 values kept in float64."""
    a = np.abs(v)
    n = np.rint(_single(a * _LOG2_E))
    x = _single(_single(_single(n * _LN_2) - a) + _single(n * _LN_2_REST))
    p = np.asarray(_EXP[0])
    for c in _EXP[1:]:
        p = _single(_single(p * x) + c)
    p = _single(_single(_single(_single(p * x) * x) + x) + 1.0)
    t = np.where(a > 87, 0.0, _single(np.ldexp(p, -np.where(a <= 87, n, 0).astype(int))))
    large = _single(1.0 / _single(1.0 + t))
    small = _single(t * large)
    return np.where(v < 0, small, large), np.where(v < 0, large, small)


def normalize_sums(
    dy: np.ndarray,
    x: np.ndarray | None = None,
    mean: np.ndarray | None = None,
    variance: np.ndarray | None = None,
    epsilon: float = 0.0,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Return the gradients of `normalize` with respect to its offset and its scale.

    Args:
        dy: float32 array `[.., C]`, of rank 2 or more: the gradient of the result.
        x: float32 array of its shape, of `normalize`. Without it, the offset is a bias.
        mean: float32 array `[C]`, given if `x` is.
        variance: float32 array `[C]`, given if `x` is.
        epsilon: what was added to the variance.

    Returns:
        `(doffset, dscale, sums)`: float32 arrays `[C]`, and the float64 array `[2, C]` of the sums
        of `dy` and of `dy * (x - mean)`. The last two are None without `x`.

    Raises:
        ValueError: if an argument is not as described.
    """
    op = "normalize_sums"
    dy = _checked_rows(op, "dy", dy)
    if len({x is None, mean is None, variance is None}) > 1:
        raise ValueError(f"{op}: `x`, `mean` and `variance` must be given together")
    with np.errstate(all="ignore"):
        total = _sum_of_pixels(_float64(dy))
        if x is None or mean is None or variance is None:
            return _float32(total), None, None
        centred = _centred(op, x, mean, dy.shape)
        products = _sum_of_pixels(_float64(dy) * centred)
        variance = _checked_channels(op, "variance", variance, dy.shape)
        dscale = _float32(products * _inverse_deviation(variance, epsilon))
    return _float32(total), dscale, np.stack([total, products])


def normalize_gradient(
    dy: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    scale: np.ndarray,
    epsilon: float = 0.0,
    sums: np.ndarray | None = None,
) -> np.ndarray:
    """Return the gradient of a batch norm with respect to its input.

    Args:
        dy: float32 array `[.., C]`, of rank 2 or more: the gradient of the result.
        x: float32 array of its shape.
        mean: float32 array `[C]`.
        variance: float32 array `[C]`.
        scale: float32 array `[C]`.
        epsilon: what was added to the variance.
        sums: float64 array `[2, C]` as of `normalize_sums`, if mean and variance are the moments of
            `x` and change with it; None if they are constants.

    Returns:
        float32 array of the shape of `dy`.

    Raises:
        ValueError: if an argument is not as described.
    """
    op = "normalize_gradient"
    dy = _checked_rows(op, "dy", dy)
    variance = _checked_channels(op, "variance", variance, dy.shape)
    scale = _checked_channels(op, "scale", scale, dy.shape)
    with np.errstate(all="ignore"):
        centred = _centred(op, x, mean, dy.shape)
        r = _inverse_deviation(variance, epsilon)
        s = _float64(scale) * r
        dx = _single(_single(s) * _float64(dy))
        if sums is None:
            return _float32(dx)
        sums, n = np.asarray(sums), _pixels(dy.shape)
        if sums.dtype != np.float64 or sums.shape != (2, dy.shape[-1]):
            raise ValueError(
                f"{op}: `sums` must be float64 of shape {(2, dy.shape[-1])}, received {sums.dtype} "
                f"of shape {sums.shape}"
            )
        b = _single(-s * r * r * (sums[1] / n))
        c = _single(-s * (sums[0] / n))
        return _float32(dx + _single(_single(b * centred) + c))


def local_response(
    x: np.ndarray, *, radius: int, bias: float, alpha: float, quarters: int
) -> np.ndarray:
    """Normalise each value by its neighbours in other channels.

        s = bias + alpha * (x[c - radius]**2 + .. + x[c + radius]**2)
        y[c] = x[c] / s**(quarters / 4)

    in float32, each operation rounded by itself; squares are added from the lowest channel up. The
    power is made of square roots: `r = sqrt(s)`, then `sqrt(r)`, `r`, `r * sqrt(r)` or `s`.

    Args:
        x: float32 of shape `(batch, .., channels)`.
        radius: how many channels on either side count.
        bias: what is added to the sum.
        alpha: what the sum is multiplied by.
        quarters: four times the power, 1 to 4.

    Returns:
        A float32 array of the shape of `x`.

    Raises:
        ValueError: if an argument is not as described.
    """
    x = _float64(_checked_rows("local_response", "x", x))
    with np.errstate(all="ignore"):
        _, root = _response(x, radius, bias, alpha, quarters)
        return _float32(x / root)


def local_response_gradient(
    x: np.ndarray, dy: np.ndarray, *, radius: int, bias: float, alpha: float, quarters: int
) -> np.ndarray:
    """Return the gradient of `local_response` with respect to its `x`.

        d = dy / s**(quarters / 4)
        t = (d * x) / s
        dx[c] = d[c] - ((2 * alpha * quarters / 4) * x[c]) * (t[c - radius] + .. + t[c + radius])

    Args:
        x: what was normalised.
        dy: float32 gradient of the result, of the shape of `x`.
        radius: as in `local_response`.
        bias: as in `local_response`.
        alpha: as in `local_response`.
        quarters: as in `local_response`.

    Returns:
        A float32 array of the shape of `x`.

    Raises:
        ValueError: if an argument is not as described.
    """
    op = "local_response_gradient"
    x = _checked_rows(op, "x", x)
    dy, x = _float64(_checked_alike(op, "dy", dy, x.shape)), _float64(x)
    slope = _single(np.float64(np.float32(alpha)) * quarters / 2)
    with np.errstate(all="ignore"):
        s, root = _response(x, radius, bias, alpha, quarters)
        d = _single(dy / root)
        t = _window(_single(_single(d * x) / s), radius)
        return _float32(d - _single(_single(slope * x) * t))


def _response(x, radius: int, bias: float, alpha: float, quarters: int):
    """Return `s`, and its power."""
    if radius < 0 or quarters not in (1, 2, 3, 4):
        raise ValueError(
            "local_response: `radius` must not be negative and `quarters` must be 1 to 4, received "
            f"{radius} and {quarters}"
        )
    energy = _window(_single(x * x), radius)
    s = _single(_single(np.float64(bias)) + _single(_single(np.float64(alpha)) * energy))
    half = _single(np.sqrt(s))
    quarter = _single(np.sqrt(half))
    return s, {1: quarter, 2: half, 3: _single(half * quarter), 4: s}[quarters]


def _window(x: np.ndarray, radius: int) -> np.ndarray:
    """Add the channels at most `radius` away, in order; beyond the ends there are zeros."""
    n = x.shape[-1]
    radius = min(radius, max(n - 1, 0))
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(radius, radius)])
    total = padded[..., :n]
    for k in range(1, 2 * radius + 1):
        total = _single(total + padded[..., k : k + n])
    return total


def _pixels(shape: tuple[int, ...]) -> np.float64:
    """Return how many pixels there are; what is divided by zero of them is NaN or infinite."""
    return np.float64(int(np.prod(shape[:-1])))


def _sum_of_pixels(x: np.ndarray) -> np.ndarray:
    """Add float64 pixels `[.., C]` in order, in blocks."""
    channels = x.shape[-1]
    images = x.shape[0] if x.ndim > 2 else 1
    pixels = int(np.prod(x.shape[1:-1] if x.ndim > 2 else x.shape[:1]))
    x = x.reshape((images, pixels, channels))
    total = np.zeros(channels)
    for image in x:
        for cut in _cuts(pixels, _SUMMED_PIXELS):
            # `accumulate` adds one after the other, where `sum` is free to do otherwise.
            total += np.add.accumulate(image[cut])[-1]
    return total


def _inverse_deviation(variance: np.ndarray, epsilon: float) -> np.ndarray:
    return 1.0 / np.sqrt(_float64(variance) + _single(np.float64(epsilon)))


def _centred(op: str, x: np.ndarray, mean: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    x, mean = _checked_alike(op, "x", x, shape), _checked_channels(op, "mean", mean, shape)
    return _single(_float64(x) - _float64(mean))


def _single(x: np.ndarray | np.float64) -> np.ndarray:
    """Round float64 to the nearest float32, as a float64."""
    return _float64(_float32(x))


def _float32(x: np.ndarray | np.float64) -> np.ndarray:
    """Convert float64 to float32 on any floating point unit, subnormals too."""
    x = np.asarray(x)
    small = np.abs(x) < 2.0**-126
    lowest = np.rint(np.ldexp(np.where(small, np.abs(x), 0.0), -_FLOAT32_LEAST_EXPONENT))
    bits = lowest.astype(np.uint32) | np.signbit(x).astype(np.uint32) << np.uint32(31)
    with np.errstate(all="ignore"):
        return np.where(small, bits.view(np.float32), x.astype(np.float32))


def _float64(x: np.ndarray) -> np.ndarray:
    """Convert float32 to float64 on any floating point unit, subnormals too."""
    bits = _bits(x)
    significand, exponent = _significand_and_exponent(bits & 0x7FFFFFFF)
    finite = np.ldexp(significand.astype(np.float64), exponent)
    finite = np.where(bits >> 31 == 1, -finite, finite)
    return np.where(bits & 0x7FFFFFFF < _FLOAT32_INFINITY, finite, x)


# ---------------------------------------------------------------------------------------------
# Optimizers
# ---------------------------------------------------------------------------------------------


def sgd(
    w: np.ndarray,
    g: np.ndarray,
    m: np.ndarray | None = None,
    *,
    rate: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    decay: float = 0.0,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the weights and the momentum after a step of SGD.

    Args:
        w: float32 weights.
        g: float32 gradient of their shape.
        m: float32 momentum of their shape, or `None` for SGD without.
        rate: the learning rate.
        momentum: what `m` is multiplied by.
        nesterov: whether weights follow the momentum one step ahead.
        decay: weight decay, decoupled; 0 for none.

    Returns:
        `(w, m)`: float32 arrays; `m` is `None` if it was.

    Raises:
        ValueError: if an argument is not as described.
    """
    w, g = _checked_weights("sgd", w, g)
    single_rate, single_momentum, single_decay = (
        _single(np.float64(c)) for c in (rate, momentum, decay)
    )
    with np.errstate(all="ignore"):
        w = _decayed(w, single_rate, single_decay)
        step = _single(g * single_rate)
        if m is None:
            return _float32(w - step), None
        m = _float64(_checked_alike("sgd", "m", m, w.shape))
        m = _single(_single(m * single_momentum) - step)
        ahead = _single(_single(m * single_momentum) - step) if nesterov else m
        return _float32(w + ahead), _float32(m)


def adam(
    w: np.ndarray,
    g: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    h: np.ndarray | None = None,
    *,
    rate: float,
    step: int,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    decay: float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the weights and the moments after a step of Adam.

    Args:
        w: float32 weights.
        g: float32 gradient of their shape.
        m: float32 first moment of their shape.
        v: float32 second moment.
        h: the largest second moment so far, or `None` for Adam without amsgrad.
        rate: the learning rate.
        step: the number of this step, from 1.
        beta_1: what is left of `m` after a step.
        beta_2: what is left of `v`.
        epsilon: added to the root of the second moment.
        decay: weight decay, decoupled; 0 for none.

    Returns:
        `(w, m, v, h)`: float32 arrays; `h` is `None` if it was.

    Raises:
        ValueError: if an argument is not as described.
    """
    w, g = _checked_weights("adam", w, g)
    m, v = (_float64(_checked_alike("adam", "m or v", x, w.shape)) for x in (m, v))
    constants = rate, beta_1, beta_2, 1 - beta_1, 1 - beta_2, epsilon, decay
    single_rate, kept_1, kept_2, renewal_1, renewal_2, single_epsilon, single_decay = (
        _single(np.float64(c)) for c in constants
    )
    with np.errstate(all="ignore"):
        young = np.sqrt(1 - _power(kept_2, step))
        alpha = _single(single_rate * young / (1 - _power(kept_1, step)))
        w = _decayed(w, single_rate, single_decay)
        m = _single(m + _single(_single(g - m) * renewal_1))
        v = _single(v + _single(_single(_single(g * g) - v) * renewal_2))
        used = v
        if h is not None:
            h = used = np.maximum(_float64(_checked_alike("adam", "h", h, w.shape)), v)
        change = _single(_single(m * alpha) / _single(_single(np.sqrt(used)) + single_epsilon))
        return _float32(w - change), _float32(m), _float32(v), None if h is None else _float32(h)


def pack_slot(x: np.ndarray, seed: int, slot: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a slot of an optimizer in dynamic fixed point.

    Args:
        x: float32 array, not negative in slots other than 0.
        seed: the number of the variable.
        slot: 0 for `m`; 1 for `v` and 2 for `h`, of which roots are kept.
        step: the number of the step.

    Returns:
        `(q, e)`: int16 mantissas of the shape of `x`, and int32 exponents, one for each 64.
    """
    if slot:
        with np.errstate(all="ignore"):
            x = _float32(np.sqrt(_float64(x)))
    blocks = -(-x.size // _SLOT_BLOCK)
    padded = np.zeros(blocks * _SLOT_BLOCK, np.float32)
    padded[: x.size] = x.ravel()
    q, e = quantize(
        padded.reshape(blocks, _SLOT_BLOCK), 16, "stochastic", None, seed, slot, step, group_axes=1
    )
    q = np.where(
        slot
        and (q == 0) & (e[:, np.newaxis] != NAN_EXPONENT) & (_bits(padded).reshape(q.shape) > 0),
        1,
        q,
    )
    return q.ravel()[: x.size].reshape(x.shape).astype(np.int16), e


def unpack_slot(q: np.ndarray, e: np.ndarray, slot: int) -> np.ndarray:
    """Return the float32 values of a slot that `pack_slot` packed."""
    x = _scaled(q.ravel().astype(np.int64), np.repeat(e, _SLOT_BLOCK)[: q.size]).reshape(q.shape)
    return _float32(_float64(x) ** 2) if slot else x


def _decayed(w: np.ndarray, rate: np.ndarray, decay: np.ndarray) -> np.ndarray:
    return _single(w - _single(_single(w * decay) * rate)) if decay else w


def _power(base: np.ndarray, exponent: int) -> np.ndarray:
    power = np.ones_like(base)
    while exponent:
        if exponent % 2:
            power = power * base
        base, exponent = base * base, exponent // 2
    return power


def _checked_weights(op: str, w: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 weights and gradient as float64."""
    w = np.asarray(w)
    if w.dtype != np.float32:
        raise ValueError(f"{op}: `w` must be float32, received {w.dtype}")
    return _float64(w), _float64(_checked_alike(op, "g", g, w.shape))


# ---------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------


def _checked_operand(
    op: str, name: str, q: np.ndarray, e: Exponents, mantissa_bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Check an operand and return its mantissas and its exponents as int64."""
    q = np.asarray(q)
    limit = qmax(mantissa_bits)
    if q.dtype != np.int16:
        raise ValueError(f"{op}: `{name}` must be int16, received {q.dtype}")
    if q.size and not -limit <= q.min() <= q.max() <= limit:
        raise ValueError(
            f"{op}: mantissas of `{name}` must be from {-limit} to {limit} (at {mantissa_bits} "
            f"bits), received values from {q.min()} to {q.max()}"
        )
    return q.astype(np.int64), _checked_exponent(op, f"exponent of {name}", e)


def _checked_exponent(op: str, name: str, e: Exponents) -> np.ndarray:
    e = np.asarray(e)
    if e.dtype.kind not in "iu" or np.any(e < -(2**31)) or np.any(e >= 2**31):
        raise ValueError(f"{op}: `{name}` must be of int32, received {e}")
    return e.astype(np.int64)


def _leading(op: str, name: str, e: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return exponents of the leading axes of `shape` so that they broadcast to all of it."""
    if e.shape != shape[: e.ndim]:
        raise ValueError(
            f"{op}: `{name}` must have the shape of leading axes of {shape}, received {e.shape}"
        )
    return e.reshape(e.shape + (1,) * (len(shape) - e.ndim))


def _checked_shape(op: str, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(int(n) for n in shape)
    if not 3 <= len(shape) <= 5 or min(shape) < 0:
        raise ValueError(f"{op}: `{name}` must be 3 to 5 integers, none negative, received {shape}")
    return shape


def _checked_rows(op: str, name: str, x: np.ndarray) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype != np.float32 or x.ndim < 2:
        raise ValueError(
            f"{op}: `{name}` must be float32 of rank 2 or more, received {x.dtype} of shape "
            f"{x.shape}"
        )
    return x


def _checked_alike(op: str, name: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype != np.float32 or x.shape != shape:
        raise ValueError(
            f"{op}: `{name}` must be float32 of shape {shape}, received {x.dtype} of shape "
            f"{x.shape}"
        )
    return x


def _checked_channels(op: str, name: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return _checked_alike(op, name, x, shape[-1:])


def _check_accumulation(op: str, accumulation: str) -> None:
    if accumulation not in _ACCUMULATIONS:
        raise ValueError(
            f"{op}: `accumulation` must be one of {_ACCUMULATIONS}, received {accumulation!r}"
        )


def _check_ranks(op: str, x: tuple[int, ...], w: tuple[int, ...]) -> None:
    if not 3 <= len(x) <= 5 or len(w) != len(x):
        raise ValueError(
            f"{op}: input and kernel must have the same rank of 3, 4 or 5, received shapes {x} "
            f"and {w}"
        )


def _checked_groups(op: str, x: tuple[int, ...], w: tuple[int, ...]) -> int:
    """Return the number of groups that an input and a kernel of these shapes have."""
    _check_ranks(op, x, w)
    channels, (per_group, filters) = x[-1], w[-2:]
    groups = channels // per_group if per_group else 1
    if groups < 1 or groups * per_group != channels or filters % groups:
        raise ValueError(
            f"{op}: the input's channels must be a multiple of the kernel's last dimension but "
            f"one, and the filters a multiple of their ratio, received shapes {x} and {w}"
        )
    return groups


def _check_depthwise(op: str, x: tuple[int, ...], w: tuple[int, ...]) -> None:
    _check_ranks(op, x, w)
    if w[-2] != x[-1]:
        raise ValueError(
            f"{op}: the kernel's last dimension but one must equal the input's channels, received "
            f"shapes {x} and {w}"
        )


def _check_output(op: str, received: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if received != expected:
        raise ValueError(f"{op}: `dy` must have shape {expected}, received {received}")


def _per_dimension(op: str, name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    values = np.broadcast_to(value, rank) if np.ndim(value) == 0 else np.asarray(value)
    if values.shape != (rank,) or values.dtype.kind not in "iu" or values.min() < 1:
        raise ValueError(
            f"{op}: `{name}` must be a positive integer or {rank} of them, received {value}"
        )
    return tuple(int(v) for v in values)


def _checked_padding(op: str, padding: Padding, rank: int) -> tuple[tuple[int, int], ...]:
    pairs: np.ndarray = np.empty(0) if isinstance(padding, str) else np.asarray(padding)
    if pairs.shape != (rank, 2) or pairs.dtype.kind not in "iu" or pairs.min() < 0:
        raise ValueError(
            f'{op}: `padding` must be "valid", "same" or {rank} pairs (before, after) of integers, '
            f"none negative, received {padding!r}"
        )
    return tuple((int(before), int(after)) for before, after in pairs)
