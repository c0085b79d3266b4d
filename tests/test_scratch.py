"""No kernel takes more scratch than docs/architecture.md says."""

import math

import networks
import numpy as np
import oracle
import pytest
from kernels import ISAS, NATIVE, TOKEN, Case, Passes, running
from test_networks import CONVOLUTIONS

from keras_dfp import reference
from keras_dfp.native import extension, lib

KB, MB = 2**10, 2**20


def up(n, to):
    return -(-n // to) * to


def bound_of_product(taps, channels, n, groups, threads, bits, accumulation):
    """Bytes for sums of taps * channels products in n columns, `groups` times; as the
    documentation says."""
    k = taps * up(channels, 2)
    chain = reference.safe_chain(*bits)
    each = 3 * MB
    if k * reference.qmax(bits[0]) * reference.qmax(bits[1]) >= 2**47:
        each += 2 * MB
    if accumulation == "spill" and chain > 8224:
        each += 128 * min(k, chain)
    element = 2
    if extension.isa() == "amx":
        element, k = 3, taps * up(channels, 64)
    return element * groups * up(min(k, 8192), 64) * up(n, 64) + threads * each


def bounds(case, threads, bits, accumulation):
    """Bytes for y, dx and dw."""
    x_bits, w_bits, dy_bits = bits
    y = oracle.output_shape(case)
    if case.depthwise:
        spread = [math.prod(case.input_shape) * case.filters, math.prod(y)]
        copies = [spread[0], spread[1] + math.prod(case.kernel_shape), spread[0]]
        copies = [2 * (case.filters > 1) * n + threads * 3 * MB + MB for n in copies]
        copies[2] += 2 * math.prod(y)  # dy, aligned
        return copies
    taps, groups = math.prod(case.kernel), case.groups
    channels, filters = case.channels // groups, case.filters // groups
    forward = taps, channels, filters, (x_bits, w_bits)
    back = taps, filters, channels, (dy_bits, w_bits)
    across = 1, math.prod(y[:-1]), filters, (x_bits, dy_bits)
    return [
        bound_of_product(*k, n, groups, threads, pair, accumulation)
        for *k, n, pair in (forward, back, across)
    ]


def check(case, accumulation, threads, bits=(14, 14, 14)):
    shapes = case.input_shape, case.kernel_shape, oracle.output_shape(case)
    # Each image has its own: a weight gradient aligns dy.
    exponents = np.arange(case.batch), 0, np.arange(case.batch)
    passes = Passes(case, [np.zeros(shape, np.int16) for shape in shapes], exponents, bits)
    extension.most_scratch()
    taken = [extension.most_scratch() for _ in passes.one_by_one(accumulation)]
    most = bounds(case, threads, bits, accumulation)
    for name, bytes_taken, bytes_allowed in zip(Passes.names, taken, most, strict=True):
        assert 0 <= bytes_taken <= bytes_allowed, f"{name}, {accumulation}: {case}"
    # 1x1 kernels and others need not pack; something always needs some.
    assert max(taken) > 0


@pytest.mark.parametrize("isa", ISAS)
def test_networks_in_small(isa):
    with running(isa, 8, small=0):
        for line in CONVOLUTIONS:
            check(networks.case(line, batch=1, most=9), "exact", 8)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 64])
@pytest.mark.parametrize("accumulation", ["exact", "spill"])
def test_networks(isa, threads, accumulation):
    with running(isa, threads):
        for line in CONVOLUTIONS:
            check(networks.case(line, batch=1), accumulation, threads)


ODD = {
    "one long sum": Case((90_000, 1), (1, 1), 3, 3, batch=1),
    "many channels": Case((5, 5), (3, 3), 1500, 700, padding="same"),
    "many filters": Case((5, 5), (3, 3), 70, 9000, padding="same"),
    "one filter": Case((40, 40), (3, 3), 300, 1, padding="same"),
    "many groups": Case((30, 30), (3, 3), 256, 256, groups=128, padding="same"),
    "large kernel": Case((40, 40), (31, 31), 8, 9, padding="same", batch=1),
    "wide sums of pixels": Case((400, 400), (1, 1), 7, 70, batch=1),
    "depthwise": Case((60, 60), (7, 7), 300, 1, padding="same", depthwise=True),
    "depthwise multiplied": Case((60, 60), (3, 3), 50, 6, padding="same", depthwise=True),
}


@pytest.mark.parametrize(
    "isa",
    [
        # Emulation takes its time.
        pytest.param(isa, marks=[] if isa in NATIVE else pytest.mark.slow)
        for isa in ISAS
        if isa != "portable"
    ],
)
@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(isa, name):
    for threads in (1, 4):
        for accumulation, bits in [("exact", 14), ("exact", 16), ("spill", 14), ("spill", 8)]:
            with running(isa, threads, small=0):
                check(ODD[name], accumulation, threads, (bits,) * 3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(40, 8192, 300), (40, 200_000, 5), (1000, 50, 1000), (7, 1, 9)])
def test_matmul(isa, shape):
    m, k, n = shape
    a, b = np.zeros((m, k), np.int16), np.zeros((k, n), np.int16)
    for bits in (8, 9, 13, 14, 16):
        for accumulation in ("exact", "spill"):
            for ta, tb in [(False, False), (True, False), (False, True)]:
                rows = np.int32(0), np.arange(k if ta else m, dtype=np.int32) % 40
                with running(isa, 4, small=0):
                    extension.most_scratch()
                    # Aligned along K, scaled by row, or neither.
                    lib.dfp_matmul(
                        a=a.T if ta else a, a_exponent=rows[bits % 2], a_token=TOKEN,
                        b=b.T if tb else b, b_exponent=np.int32(0), b_token=TOKEN,
                        a_bits=bits, b_bits=bits, accumulation=accumulation,
                        transpose_a=ta, transpose_b=tb,
                    )  # fmt: skip
                    taken = extension.most_scratch()
                most = bound_of_product(1, k, n, 1, 4, (bits, bits), accumulation)
                most = max(most, 4 * 64 + k)  # of exponents along K
                assert 0 < taken <= most, (isa, shape, bits, accumulation, ta, tb)


def test_quantize():
    """Only counts of groups that are taken in pieces need any."""
    for shape in ((600_000,), (3, 600_000), (3000, 70), (2, 9)):
        x = np.ones(shape, np.float32)
        for attributes in ({}, dict(n_counts=1), dict(site="a site")):
            extension.most_scratch()
            axes = len(shape) - 1
            lib.dfp_quantize(x=x, exponent=[], step=[], group_axes=axes, **attributes)
            groups = math.prod(shape[:axes]) if attributes else 0
            assert extension.most_scratch() <= 24 * groups


def test_sums_of_channels():
    """A block of 128 pixels has two sums, and a pair of bounds, of each channel."""
    threads = extension.threads()
    for shape in ((3, 50, 60, 100), (2000, 7), (300, 1, 1), (2, 40, 40, 1000), (0, 5)):
        x, ones = np.ones(shape, np.float32), np.ones(shape[-1:], np.float32)
        images, pixels = (1, shape[0]) if len(shape) == 2 else (shape[0], math.prod(shape[1:-1]))
        blocks = images * up(pixels, 128) // 128
        extension.most_scratch()
        lib.dfp_moments(x=x)
        most = 24 * blocks * shape[-1] + 16 * shape[-1] + KB
        assert extension.most_scratch() <= most, shape
        norm = [x, ones, ones]
        lib.dfp_normalize_sums(parts=[x], mask_map=norm[:1], mask_bits=[], norm=norm)
        most = 16 * blocks * shape[-1] + threads * 4 * max(4096, shape[-1]) + KB
        assert extension.most_scratch() <= most, shape


def test_normalize():
    """Parameters are repeated, up to 64 and more channels; a sample of at most 2 MiB is kept."""
    for shape in ((3, 5, 7), (2, 9, 1000), (1, 525, 1000)):
        x, ones = np.ones(shape, np.float32), np.ones(shape[-1:], np.float32)
        n = max(shape[-1], 128)
        kept = 4 * extension.threads() * x.size if x.size <= MB // 2 else 0
        extension.most_scratch()
        lib.dfp_normalize(x=x, parameters=[ones] * 4, residual=[], bounds=[], step=[], want_q=True)
        assert extension.most_scratch() <= 12 * n + kept
        sums = np.ones((2, *ones.shape))
        lib.dfp_normalize_gradient(
            parts=[x], mask_map=[x, *[ones] * 4], mask_bits=[], norm=[x, *[ones] * 3], sums=[sums],
            step=[], want_q=True,
        )  # fmt: skip
        assert extension.most_scratch() <= 16 * n + kept
