"""Ops in graphs, and whole training runs, have one result: any kernels, any threads, any run."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from kernels import ISAS, NATIVE, assert_same_bits, running

from keras_dfp import ops
from keras_dfp.number import DFPFormat

HERE = Path(__file__).parent

# Every op, on shapes whose passes run on several threads.
OPS = {
    "conv": (lambda x, w: ops.conv(x, w, 1, "same"), (4, 14, 14, 16), (3, 3, 16, 24)),
    "conv strided": (lambda x, w: ops.conv(x, w, 2, "same"), (4, 15, 15, 17), (3, 3, 17, 24)),
    "conv dilated": (
        lambda x, w: ops.conv(x, w, dilation_rate=2),
        (4, 14, 14, 16),
        (3, 3, 16, 24),
    ),
    "conv grouped": (lambda x, w: ops.conv(x, w), (4, 14, 14, 32), (3, 3, 8, 40)),
    "conv 1d": (lambda x, w: ops.conv(x, w), (4, 500, 16), (5, 16, 24)),
    "conv 3d": (lambda x, w: ops.conv(x, w), (2, 7, 8, 9, 8), (3, 3, 3, 8, 16)),
    "conv channels first": (
        lambda x, w: ops.conv(x, w, data_format="channels_first"),
        (4, 16, 14, 14),
        (3, 3, 16, 24),
    ),
    "conv_transpose": (lambda x, w: ops.conv_transpose(x, w, 2), (4, 10, 10, 24), (3, 3, 16, 24)),
    "depthwise_conv": (ops.depthwise_conv, (8, 20, 20, 40), (3, 3, 40, 1)),
    "depthwise_conv multiplied": (ops.depthwise_conv, (8, 20, 20, 20), (3, 3, 20, 2)),
    "separable_conv": (
        lambda x, w: ops.separable_conv(x, w, tf.ones((1, 1, 40, 24))),
        (8, 20, 20, 40),
        (3, 3, 40, 1),
    ),
    "matmul": (ops.matmul, (200, 300), (300, 70)),
    "matmul batched": (ops.matmul, (3, 4, 50, 60), (4, 60, 70)),
    "matmul of long rows": (ops.matmul, (10, 40_000), (40_000, 6)),
    "dot": (ops.dot, (3, 50, 60), (60, 70)),
    "tensordot": (lambda a, b: ops.tensordot(a, b, 2), (60, 30, 20), (30, 20, 50)),
    "einsum": (lambda a, b: ops.einsum("btd,dnh->btnh", a, b), (4, 50, 60), (60, 4, 16)),
    "dot_product_attention": (
        lambda q, k: ops.dot_product_attention(q, k, k),
        (2, 60, 4, 32),
        (2, 60, 4, 32),
    ),
}


@pytest.mark.parametrize("accumulation", ["exact", "spill"])
@pytest.mark.parametrize("name", OPS)
def test_an_op_in_a_graph(name, accumulation):
    op, *shapes = OPS[name]
    rng = np.random.default_rng(len(name))
    a, b = (tf.constant(rng.standard_normal(shape), tf.float32) for shape in shapes)
    # Samples have exponents of their own, and sums over samples align them.
    scale = np.exp2(rng.integers(-5, 5, len(a))).astype(np.float32)
    a *= scale.reshape(-1, *[1] * (a.shape.rank - 1))

    @tf.function
    def step(a, b):
        with tf.GradientTape() as tape, ops.format_scope(DFPFormat(accumulation=accumulation)):
            tape.watch([a, b])
            y = op(a, b)
        count = tf.range(tf.size(y))
        dy = tf.cast((count % 101 - 50) * 2 ** (count // 1000 % 9), tf.float32)
        return y, *tape.gradient(y, [a, b], output_gradients=tf.reshape(dy, tf.shape(y)))

    expected = None
    for isa in ISAS:
        for threads in (1, 2, 4):
            for run in range(2):
                with running(isa, threads, small=0):
                    results = step(a, b)
                expected = expected or [r.numpy() for r in results]
                for result, truth in zip(results, expected, strict=True):
                    assert_same_bits(result, truth, f"{isa}, {threads} threads, run {run}")


def train(*runs):
    """Returns what train_residual.py prints: (isa, threads, threads of the process, hash)."""
    result = subprocess.run(
        [sys.executable, HERE / "train_residual.py", *(f"{isa}:{n}" for isa, n in runs)],
        cwd=HERE.parent,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert len(rows) == len(runs), result.stdout
    return [(isa, int(threads), int(alive), digest) for isa, threads, alive, digest in rows]


def test_a_training_run_ends_in_the_same_weights():
    rows = train(*((isa, threads) for threads in (1, 2, 4) for isa in NATIVE))
    again = train((NATIVE[0], 2), (NATIVE[-1], 1))
    assert len({digest for *_, digest in rows + again}) == 1, rows + again
    # The runs did go through as many threads: OpenMP has started workers for them. The most of all
    # runs, because a team shrinks again when its last region had little to share out.
    alive = {n: max(tasks for _, threads, tasks, _ in rows if threads == n) for n in (1, 2, 4)}
    assert alive[1] < alive[2] < alive[4], rows


@pytest.mark.slow
def test_a_training_run_on_every_instruction_set():
    """Emulated ones too, which takes minutes."""
    rows = train(*((isa, 2) for isa in ISAS))
    assert len({digest for *_, digest in rows}) == 1, rows
