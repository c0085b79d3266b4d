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

MB = 2**20


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


def test_statistics():
    x, w = np.zeros((3, 50, 60, 4), np.int16), np.zeros((1, 1, 4, 100), np.int16)
    operands = dict(x=x, x_exponent=np.int32(0), x_token=TOKEN)
    operands |= dict(w=w, w_exponent=np.int32(0), w_token=TOKEN)
    extension.most_scratch()
    lib.dfp_conv(**operands, strides=[1, 1], dilations=[1, 1], n_statistics=4)
    threads = extension.threads()
    product = bound_of_product(1, 4, 100, 1, threads, (14, 14), "exact")
    assert 0 < extension.most_scratch() <= max(product, 24 * 3 * 50 * 100 + 64)
