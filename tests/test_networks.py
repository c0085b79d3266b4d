"""All products of the five networks: every instruction set, 1 to 4 threads, exact and spill."""

import keras
import networks
import numpy as np
import oracle
import pytest
from kernels import (
    ISAS,
    THREADS,
    TOKEN,
    Passes,
    assert_same_bits,
    mantissas,
    one_exponent_each,
    running,
)

from keras_dfp import zoo
from keras_dfp.native import lib

MODES = ("exact", "spill")
BITS = (14, 14, 14)
LINES = sorted({line for lines in networks.NETWORKS.values() for line in lines.splitlines()})
CONVOLUTIONS = [line for line in LINES if not line.startswith("dense")]
DENSE = [line for line in LINES if line.startswith("dense")]


def check(case, runs, seed):
    """Compares the three passes with the oracle, which computes each once for all runs."""
    rng = np.random.default_rng(seed)
    shapes = case.input_shape, case.kernel_shape, oracle.output_shape(case)
    tensors = [mantissas(rng, shape, bits) for shape, bits in zip(shapes, BITS, strict=True)]
    ex, ed = (one_exponent_each(rng, case.batch, "near") for _ in "xd")
    exponents = ex, -7, ed
    passes = Passes(case, tensors, exponents, BITS)
    expected = {mode: oracle.conv_passes(case, *tensors, exponents, BITS, mode) for mode in MODES}
    for mode, isa, threads in runs:
        with running(isa, threads, small=0):
            results = passes(mode)
        for name, result, truth in zip(Passes.names, results, expected[mode], strict=True):
            assert_same_bits(result, truth, f"{name}, {mode}, {isa}, {threads} threads: {case}")


@pytest.mark.parametrize("i", range(len(CONVOLUTIONS)))
def test_convolutions_in_small(i):
    """Tiny images, one or two; threads take turns."""
    runs = [
        (mode, isa, THREADS[(i + turn) % len(THREADS)])
        for turn, (mode, isa) in enumerate((mode, isa) for mode in MODES for isa in ISAS)
    ]
    check(networks.case(CONVOLUTIONS[i], batch=1 + i % 2, most=4), runs, seed=i)


@pytest.mark.slow
@pytest.mark.parametrize("line", CONVOLUTIONS)
def test_convolutions(line):
    """Two images large enough for blocks of pixels, parts of blocks and long sums over pixels."""
    runs = [(mode, isa, threads) for mode in MODES for isa in ISAS for threads in THREADS]
    check(networks.case(line, most=24), runs, seed=len(line))


def check_dense(line, runs, batch, most=None):
    inputs, units = networks.dense(line)
    units = min(units, most or units)
    rng = np.random.default_rng(inputs)
    x, w, dy = (mantissas(rng, s, 14) for s in [(batch, inputs), (inputs, units), (batch, units)])
    ex, ed = (one_exponent_each(rng, batch, "near") for _ in "xd")
    x, w, dy = (x, ex), (w, np.int32(-5)), (dy, ed)
    # y = x w, dx = dy w^T, dw = x^T dy
    for (a, ea), (b, eb), ta, tb in [
        (x, w, False, False),
        (dy, w, False, True),
        (x, dy, True, False),
    ]:
        left, right = a.T if ta else a, b.T if tb else b
        exponents = (
            ea[np.newaxis] if ta else ea[:, np.newaxis],
            eb[:, np.newaxis] if eb.ndim else eb,
        )
        for mode in MODES:
            truth = oracle.matmul(left, right, exponents, (14, 14), mode)
            for isa, threads in [(isa, t) for m, isa, t in runs if m == mode]:
                with running(isa, threads, small=0):
                    result = lib.dfp_matmul(
                        a=a, a_exponent=ea, a_token=TOKEN, b=b, b_exponent=eb, b_token=TOKEN,
                        transpose_a=ta, transpose_b=tb, accumulation=mode,
                    )  # fmt: skip
                assert_same_bits(result, truth, f"{line}, {mode}, {isa}, {threads} threads")


@pytest.mark.parametrize("line", DENSE)
def test_dense_in_small(line):
    """As many inputs as in the network; the slow test has all units."""
    check_dense(line, [(m, isa, 2) for m in MODES for isa in ISAS], batch=3, most=70)


@pytest.mark.slow
@pytest.mark.parametrize("line", DENSE)
def test_dense(line):
    check_dense(line, [(m, isa, t) for m in MODES for isa in ISAS for t in THREADS], batch=5)


MODELS = {
    "ResNet-50": lambda: keras.applications.ResNet50(weights=None),
    "VGG-16": lambda: keras.applications.VGG16(weights=None),
    "MobileNetV2": lambda: keras.applications.MobileNetV2(weights=None),
    "GoogLeNet-v1": lambda: zoo.load("googlenet_v1", auxiliary=True),
    "AlexNet": lambda: zoo.load("alexnet"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_list_is_that_of_the_model(name):
    assert networks.lines(MODELS[name]()) == networks.NETWORKS[name].splitlines()
