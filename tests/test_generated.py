"""One list of generated products: every instruction set, 1 to 4 threads, exact and spill.

The list is the same everywhere: case i is drawn from a generator seeded with i.
"""

import itertools
import math

import numpy as np
import oracle
import pytest
from kernels import (
    ISAS,
    THREADS,
    TOKEN,
    Case,
    Passes,
    assert_same_bits,
    exponents_of_rows,
    guarded,
    mantissas,
    one_exponent_each,
    running,
)

from keras_dfp import reference
from keras_dfp.native import lib

# Odd and prime channels, and those of real networks.
WIDTHS = [*range(1, 10), 13, 16, 17, 31, 32, 37, 61, 64, 67, 97, 128]
PLENTY = 33_026  # one more than an INT32 accumulator of byte products holds


def choose(rng, *weighted):
    """Chooses from pairs (value, weight)."""
    values, weights = zip(*weighted, strict=True)
    return values[rng.choice(len(values), p=np.array(weights) / sum(weights))]


def integer(rng, low, high):
    return int(rng.integers(low, high, endpoint=True))


def random_conv(rng):
    """A convolution of a few pixels, of any geometry."""
    rank = choose(rng, (1, 1), (2, 3), (3, 1))
    wide = rng.random() < 0.3
    depthwise = rng.random() < 0.25
    groups = 1 if depthwise else choose(rng, (1, 6), (2, 1), (3, 1), (5, 1))
    padding = choose(rng, ("valid", 1), ("same", 1), ("explicit", 1))
    strides, dilations, kernel, image, pads = [], [], [], [], []
    for _ in range(rank):
        strides.append(choose(rng, (1, 5), (2, 3), (3, 1), (4, 1)))
        dilations.append(choose(rng, (1, 6), (2, 2), (3, 1)))
        kernel.append(choose(rng, (1, 3), (2, 1), (3, 4), (4, 1), (5, 1), (7, 0.5)))
        pads.append((integer(rng, 0, 4), integer(rng, 0, 4)))
        reach = (kernel[-1] - 1) * dilations[-1] + 1
        least = {"same": 1, "valid": reach, "explicit": max(1, reach - sum(pads[-1]))}[padding]
        more = 0 if rng.random() < 0.2 else integer(rng, 0, 4 if rank == 3 or wide else 8)
        image.append(least + more)
    channels, filters = (int(rng.choice(WIDTHS)) if wide else integer(rng, 1, 9) for _ in "ab")
    return Case(
        image=tuple(image),
        kernel=tuple(kernel),
        channels=groups * channels,
        filters=integer(rng, 1, 3) if depthwise else groups * filters,
        strides=tuple(strides),
        dilations=tuple(dilations),
        padding=tuple(pads) if padding == "explicit" else padding,
        groups=groups,
        depthwise=depthwise,
        batch=integer(rng, 1, 3),
    )


def long_conv(rng):
    """A convolution that sums more than an INT32 accumulator of byte products holds."""
    kernel = integer(rng, 1, 3)
    long = PLENTY + integer(rng, 0, 700)
    few = integer(rng, 1, 3)
    which = integer(rng, 0, 2)
    if which == 2:  # the weight gradient sums pixels
        return Case((long, 1), (kernel, 1), few, integer(rng, 1, 4), padding="same", batch=1)
    many = -(-long // kernel)
    channels, filters = (many, few) if which else (few, many)
    return Case((kernel, 1), (kernel, 1), channels, filters, padding="valid", batch=few)


def shape_of_matmul(rng):
    """A batch of matrices: (batch, m, k, n)."""
    batch = choose(rng, ((), 4), ((2,), 1), ((2, 3), 1))
    m, n = (integer(rng, 1, 70) for _ in "mn")
    k = choose(rng, (integer(rng, 1, 70), 6), (integer(rng, 71, 1500), 2))
    if rng.random() < 0.05:
        batch, m, k, n = (), integer(rng, 1, 5), PLENTY + integer(rng, 0, 9000), integer(rng, 1, 5)
    return batch, m, k, n


def setting(rng):
    """Formats of three tensors, how extreme they are, and their exponents."""
    bits = [choose(rng, (14, 5), (8, 1), (9, 1), (12, 1), (13, 1), (15, 1), (16, 2)) for _ in "xwd"]
    if rng.random() < 0.6:
        bits = [bits[0]] * 3
    kind = choose(rng, ("random", 4), ("extreme", 1), ("signs", 1))
    ends = [(-5, -7, 2), (-90, -60, -70), (-100, -49, -40), (121, 100, 90), (50, 60, 55)]
    return bits, kind, choose(rng, *zip(ends, (8, 1, 1, 1, 1), strict=True))


def apart(rng):
    """How far exponents of groups are from each other."""
    return choose(rng, ("near", 4), ("apart", 3), ("same", 1), ("low", 1), ("high", 1), ("nan", 1))


def runs(i):
    """How to run case i: every instruction set, exact and spill; threads take turns."""
    for turn, (accumulation, isa) in enumerate(itertools.product(("exact", "spill"), ISAS)):
        yield accumulation, isa, THREADS[(i + turn) % len(THREADS)]


def check_conv(i, case, rng, against_reference=False):
    bits, kind, exponents = setting(rng)
    ex, ew, ed = exponents
    if rng.random() < 0.6:
        ex, ed = (
            one_exponent_each(rng, case.batch, apart(rng)) if rng.random() < 0.8 else e
            for e in (ex, ed)
        )
        exponents = ex, ew, ed
    shapes = case.input_shape, case.kernel_shape, oracle.output_shape(case)
    x, w, dy = (mantissas(rng, s, b, kind) for s, b in zip(shapes, bits, strict=True))
    passes = Passes(case, (x, w, dy), exponents, bits)
    expected = {
        mode: oracle.conv_passes(case, x, w, dy, exponents, bits, mode)
        for mode in ("exact", "spill")
    }
    if against_reference:
        for mode, values in expected.items():
            slow = reference_passes(case, x, w, dy, exponents, bits, mode)
            for name, value, truth in zip(Passes.names, values, slow, strict=True):
                assert_same_bits(value, truth, f"oracle, case {i}, {name}, {mode}: {case}")
    for accumulation, isa, threads in runs(i):
        with running(isa, threads, small=0):
            results = passes(accumulation)
        for name, result, truth in zip(Passes.names, results, expected[accumulation], strict=True):
            where = f"{name}, {accumulation}, {isa}, {threads} threads"
            assert_same_bits(result, truth, f"case {i}, {where}: {case} {bits} {kind} {exponents}")


def reference_passes(case, x, w, dy, exponents, bits, accumulation):
    ex, ew, ed = exponents
    x_bits, w_bits, dy_bits = bits
    prefix = "depthwise_conv" if case.depthwise else "conv"
    forward, back, across = (
        getattr(reference, prefix + suffix)
        for suffix in ("", "_input_gradient", "_weight_gradient")
    )
    options = dict(case.options, accumulation=accumulation)
    return (
        forward(x, ex, w, ew, x_bits=x_bits, w_bits=w_bits, **options),
        back(dy, ed, w, ew, x.shape, dy_bits=dy_bits, w_bits=w_bits, **options),
        across(x, ex, dy, ed, w.shape, x_bits=x_bits, dy_bits=dy_bits, **options),
    )


def check_matmul(i, rng, against_reference=False):
    batch, m, k, n = shape_of_matmul(rng)
    bits, kind, (ea, eb, _) = setting(rng)
    a = mantissas(rng, (*batch, m, k), bits[0], kind)
    b = mantissas(rng, (*batch, k, n), bits[1], kind)
    ta, tb = (bool(rng.integers(2)) for _ in "ab")
    options = dict(a_bits=bits[0], b_bits=bits[1])
    operands, stated, those = {}, [], []
    for name, q, t, e in (("a", a, ta, ea), ("b", b, tb, eb)):
        q = np.swapaxes(q, -1, -2) if t else q
        which = choose(rng, (e, 2), ("row", 2), ("matrix", 1))
        e, of_rows = exponents_of_rows(rng, q.shape, which, apart(rng))
        operands |= {name: guarded(q), f"{name}_exponent": e, f"{name}_token": TOKEN}
        stated.append(np.swapaxes(of_rows, -1, -2) if t else of_rows)
        those.append((which, e.min(), e.max()))
    what = f"{batch} {m} {k} {n}, transposed {ta} {tb}, {bits} {kind} {those}"
    expected = {mode: oracle.matmul(a, b, stated, bits[:2], mode) for mode in ("exact", "spill")}
    if against_reference:
        for mode, value in expected.items():
            truth = reference.matmul(a, stated[0], b, stated[1], **options, accumulation=mode)
            assert_same_bits(value, truth, f"oracle, case {i}, {mode}: {what}")
    for accumulation, isa, threads in runs(i):
        with running(isa, threads, small=0):
            result = lib.dfp_matmul(
                **operands, transpose_a=ta, transpose_b=tb, accumulation=accumulation, **options
            )
        where = f"{accumulation}, {isa}, {threads} threads"
        assert_same_bits(result, expected[accumulation], f"case {i}, {where}: {what}")


def check(i, against_reference=False):
    """Checks case i of the list."""
    rng = np.random.default_rng([2018, i])
    kind = rng.random()
    if kind < 0.1:
        check_matmul(i, rng, against_reference)
    else:
        case = long_conv(rng) if kind < 0.11 else random_conv(rng)
        check_conv(i, case, rng, against_reference)


BLOCK = 1000


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(100, 400, 100))]
)
def test_first_cases_also_against_the_reference(first):
    for i in range(first, first + 100):
        check(i, against_reference=True)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(36))
def test_36_000_cases(block):
    for i in range(block * BLOCK, (block + 1) * BLOCK):
        check(i)


def test_the_list_has_what_it_promises():
    cases = [random_conv(np.random.default_rng([0, i])) for i in range(2000)]
    convolutions = [c for c in cases if not c.depthwise]
    for promise in (
        lambda c: max(c.strides) > 1 and max(c.dilations) > 1,
        lambda c: c.groups > 1,
        lambda c: not isinstance(c.padding, str) and any(a != b for a, b in c.padding),
        lambda c: c.channels in (13, 17, 31, 37, 61, 67, 97),
        lambda c: 1 in c.image and math.prod(c.image) > 1,
    ):
        assert sum(map(promise, convolutions)) > 50
