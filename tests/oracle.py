"""The contract of `keras_dfp.reference` computed fast, in float64: for large cases, or many.

A float64 holds every integer up to 2**53, so a matrix product of mantissas in float64 is exact in
whatever order BLAS sums it, and its product with a power of two rounds once when it is converted to
float32. `test_generated.py` compares this file with the reference.

Exponents are a number or an array, as in the reference: `matmul`'s broadcast with the mantissas,
those of a convolution are one or one for each image.
"""

import functools
import itertools
import math

import numpy as np

from keras_dfp import reference


def matmul(a, b, exponents, bits, accumulation):
    """Returns the product of mantissas [.., M, K] and [.., K, N].

    Args:
        a: The mantissas of one factor.
        b: Those of the other.
        exponents: Those of a and b.
        bits: Likewise.
        accumulation: "exact" or "spill".
    """
    depth = a.shape[-1]
    ea, eb = (np.asarray(e, np.int64) for e in exponents)
    ea, eb = (e if e.ndim > 1 else e.reshape(1, -1) for e in (ea, eb))
    # Those along K, as of the products' second factor, and the others.
    along, scales = [], []
    for e, varies in ((ea, ea.shape[-1] > 1), (eb, eb.shape[-2] > 1)):
        (along if varies else scales).append(e)
    if along:
        along = _added(*(np.swapaxes(e, -1, -2) if e is ea else e for e in along))
        b, most, bits = _aligned(b, along, -2, bits)
        scales.append(most)
    total, chain = _start((*a.shape[:-1], b.shape[-1]), depth, bits, accumulation)
    a, b = a.astype(np.float64), b.astype(np.float64)
    for cut in _cuts(depth, chain):
        total += (a[..., cut] @ b[..., cut, :]).astype(total.dtype)
    return _scaled(total, _added(*scales))


def conv_passes(case, x, w, dy, exponents, bits, accumulation):
    """Returns y, dx and dw of a convolution.

    Args:
        case: A `kernels.Case`.
        x: Mantissas of the input.
        w: Mantissas of the kernel.
        dy: Mantissas of the output's gradient.
        exponents: Those of x, w and dy.
        bits: Likewise.
        accumulation: "exact" or "spill".
    """
    window = _Window(case)
    passes = _depthwise if case.depthwise else _grouped
    # One for each image, but of w.
    ex, ew, ed = (
        np.reshape(np.asarray(e, np.int64), (-1,) + (1,) * (x.ndim - 1)) for e in exponents
    )
    aligned, most, across = _aligned(dy, _added(ex, ed), 0, (bits[0], bits[2]))
    tensors = (q.astype(np.float64) for q in (x, w, dy, aligned))
    sums = passes(case, window, *tensors, bits, across, accumulation)
    scales = _added(ex, ew), _added(ed, ew), most.reshape(())
    return [_scaled(*pair) for pair in zip(sums, scales, strict=True)]


def output_shape(case):
    """Returns the shape of a convolution's output."""
    filters = case.filters * (case.channels if case.depthwise else 1)
    return (case.batch, *_Window(case).output, filters)


class _Window:
    """Where the taps of a case fall, in an input with one pixel of zeros at the end of each axis.

    All padding is there, however wide it is.
    """

    def __init__(self, case):
        options = case.options
        strides, dilations, padding = (options[k] for k in ("strides", "dilations", "padding"))
        reach = [(k - 1) * d + 1 for k, d in zip(case.kernel, dilations, strict=True)]
        if padding == "valid":
            padding = [(0, 0)] * len(reach)
        elif padding == "same":
            padding = []
            for n, s, r in zip(case.image, strides, reach, strict=True):
                missing = max(0, (-(-n // s) - 1) * s + r - n)
                padding.append((missing // 2, missing - missing // 2))
        self.pad = [(0, 0), *[(0, 1)] * len(reach), (0, 0)]
        self.output = [
            max(0, (n + sum(p) - r) // s + 1)
            for n, p, r, s in zip(case.image, padding, reach, strides, strict=True)
        ]
        self._axes = list(zip(case.image, padding, strides, dilations, strict=True))
        self._kernel = case.kernel
        self.shape = (case.batch, *(n + 1 for n in case.image), case.channels)

    @functools.cached_property
    def taps(self):
        """The indices of what each kernel position meets."""

        def met(axis, k):
            n, (before, _), stride, dilation = self._axes[axis]
            i = np.arange(self.output[axis]) * stride + k * dilation - before
            return np.where((i >= 0) & (i < n), i, n)

        return [
            (slice(None), *np.ix_(*(met(axis, k) for axis, k in enumerate(position))))
            for position in itertools.product(*map(range, self._kernel))
        ]

    def inner(self, total):
        """Cuts the padding off."""
        return total[(slice(None), *[slice(-1)] * len(self.output))]


def _grouped(case, window, x, w, dy, aligned, bits, across_bits, accumulation):
    groups, pixels = case.groups, math.prod(window.output) * case.batch
    channels, filters = case.channels // groups, case.filters // groups
    x_bits, w_bits, dy_bits = bits
    x = np.pad(x, window.pad)
    # [taps, group, channel, filter] and [group, pixel, filter]
    w = w.reshape(len(window.taps), channels, groups, filters).transpose(0, 2, 1, 3)
    dy, aligned = (q.reshape(pixels, groups, filters).swapaxes(0, 1) for q in (dy, aligned))
    y, forward = _start((groups, pixels, filters), channels, (x_bits, w_bits), accumulation)
    dx, back = _start(window.shape, filters, (dy_bits, w_bits), accumulation)
    dw, across = _start(w.shape, pixels, across_bits, accumulation)
    for tap, where in enumerate(window.taps):
        patch = x[where].reshape(pixels, groups, channels).swapaxes(0, 1)
        for cut in _cuts(channels, forward):
            y += (patch[:, :, cut] @ w[tap][:, cut]).astype(y.dtype)
        for cut in _cuts(filters, back):
            product = dy[:, :, cut] @ w[tap][:, :, cut].swapaxes(1, 2)
            dx[where] += product.astype(dx.dtype).swapaxes(0, 1).reshape(dx[where].shape)
        for cut in _cuts(pixels, across):
            dw[tap] += (patch[:, cut].swapaxes(1, 2) @ aligned[:, cut]).astype(dw.dtype)
    return (
        y.swapaxes(0, 1).reshape(output_shape(case)),
        window.inner(dx),
        dw.transpose(0, 2, 1, 3).reshape(*case.kernel, channels, case.filters),
    )


def _depthwise(case, window, x, w, dy, aligned, bits, across_bits, accumulation):
    taps, channels, multiplier = len(window.taps), case.channels, case.filters
    pixels = math.prod(window.output) * case.batch
    x_bits, w_bits, dy_bits = bits
    x = np.pad(x, window.pad)
    patches = [x[where].reshape(pixels, channels, 1) for where in window.taps]
    w = w.reshape(taps, channels, multiplier)
    dy, aligned = (q.reshape(pixels, channels, multiplier) for q in (dy, aligned))
    terms = list(itertools.product(range(taps), range(multiplier)))
    y, forward = _start(dy.shape, taps, (x_bits, w_bits), accumulation)
    dx, back = _start(window.shape, len(terms), (dy_bits, w_bits), accumulation)
    dw, across = _start(w.shape, pixels, across_bits, accumulation)
    for cut in _cuts(taps, forward):
        y += sum(patches[t] * w[t] for t in range(taps)[cut]).astype(y.dtype)
    for cut in _cuts(len(terms), back):
        chunk = np.zeros(window.shape)
        for t, m in terms[cut]:
            chunk[window.taps[t]] += (dy[:, :, m] * w[t][:, m]).reshape(chunk[window.taps[t]].shape)
        dx += chunk.astype(dx.dtype)
    for tap, patch in enumerate(patches):
        for cut in _cuts(pixels, across):
            dw[tap] += (patch[cut] * aligned[cut]).sum(axis=0).astype(dw.dtype)
    shape = (*case.kernel, channels, multiplier)
    return y.reshape(output_shape(case)), window.inner(dx), dw.reshape(shape)


def _start(shape, terms, bits, accumulation):
    """Returns an empty sum and the length of its chunks: float64 adds integers as they are."""
    if accumulation == "exact":
        return np.zeros(shape), max(terms, 1)
    return np.zeros(shape, np.float32), reference.safe_chain(*bits)


def _cuts(length, chain):
    return (slice(start, min(start + chain, length)) for start in range(0, length, chain))


def _added(*exponents):
    """Returns the sum of exponents: a NaN's, where one of them is."""
    marked = [e == reference.NAN_EXPONENT for e in exponents]
    return np.where(sum(marked), reference.NAN_EXPONENT, sum(exponents))


def _aligned(q, e, axis, bits):
    """Aligns the mantissas whose products have exponents e, for a sum along an axis.

    Returns them, the exponent of the sum, and the bits of both factors."""
    if not e.shape[axis]:
        return q, np.zeros((1,) * e.ndim, np.int64), bits
    nan = (e == reference.NAN_EXPONENT).any(axis, keepdims=True)
    most = e.max(axis, keepdims=True)
    # Whatever is shifted by more than 17 bits is nothing. `rint` rounds ties to even.
    more = int(bits[1] < 16 and ((e < most) & ~nan).any())
    shifted = np.rint(np.ldexp(q.astype(np.float64), more - np.minimum(most - e, 99)))
    return shifted, np.where(nan, reference.NAN_EXPONENT, most - more), (bits[0], bits[1] + more)


def _scaled(total, e):
    assert np.abs(total).max(initial=0) < 2**53
    # A sum of products with zeros may be -0; a sum of integers has no sign there. Beyond +-900 all
    # results overflow or are zeros.
    exact = np.ldexp(total.astype(np.float64), np.clip(e, -900, 900)) + 0.0
    with np.errstate(over="ignore"):
        return np.where(e == reference.NAN_EXPONENT, np.float32(np.nan), exact.astype(np.float32))
