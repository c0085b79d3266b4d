"""Threads of all kinds around the kernels: results stay right, and nobody waits by spinning.

Times are CPU times of this process: how busy the machine is does not count, spinning does.
"""

import contextlib
import functools
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import oracle
import pytest
import tensorflow as tf
from kernels import (
    ISAS,
    TOKEN,
    Case,
    Passes,
    assert_same_bits,
    mantissas,
    one_exponent_each,
    running,
)

from keras_dfp.native import extension, lib

CASES = [
    Case((14, 14), (3, 3), 32, 48, padding="same"),
    Case((7, 7), (1, 1), 160, 64, batch=4),
    Case((15, 16), (3, 3), 40, 1, strides=(2, 2), padding="same", depthwise=True),
]
BITS = (14, 14, 14)


@functools.cache
def prepared(i):
    case = CASES[i]
    rng = np.random.default_rng(i)
    shapes = case.input_shape, case.kernel_shape, oracle.output_shape(case)
    tensors = [mantissas(rng, shape, bits) for shape, bits in zip(shapes, BITS, strict=True)]
    ex, ed = (one_exponent_each(rng, case.batch, "near") for _ in "xd")
    exponents = ex, -7, ed
    expected = oracle.conv_passes(case, *tensors, exponents, BITS, "exact")
    return Passes(case, tensors, exponents, BITS), expected


def products():
    """Runs a few convolutions and compares them with the oracle."""
    for i in range(len(CASES)):
        passes, expected = prepared(i)
        for name, result, truth in zip(Passes.names, passes("exact"), expected, strict=True):
            assert_same_bits(result, truth, f"{name} of {CASES[i]}")


def at_once(work, count):
    """Runs work on so many Python threads; what one of them raises, this raises."""
    errors = []

    def run():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def cpu_time(work, repeats=20):
    """Returns the CPU seconds that this process spends on one `work()`, at best."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


@contextlib.contextmanager
def busy_machine():
    """Keeps every core busy with a process of its own."""
    spinning = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in os.sched_getaffinity(0)
    ]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


@pytest.fixture
def one_large():
    """A product worth several threads, as a function."""
    rng = np.random.default_rng(0)
    a, b = (tf.constant(mantissas(rng, (600, 600), 14)) for _ in "ab")
    e = np.int32(-9)
    expected = oracle.matmul(a.numpy(), b.numpy(), (-9, -9), (14, 14), "exact")

    def work():
        y = lib.dfp_matmul(a=a, a_exponent=e, a_token=TOKEN, b=b, b_exponent=e, b_token=TOKEN)
        assert_same_bits(y, expected)

    return work


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_several_python_threads(isa, threads):
    with running(isa, threads, small=0):
        at_once(lambda: [products() for _ in range(5)], count=3)


def test_ops_that_tensorflow_runs_at_once():
    rng = np.random.default_rng(0)
    a = mantissas(rng, (8, 120, 130), 14)
    b = mantissas(rng, (8, 130, 140), 14)
    expected = oracle.matmul(a, b, (-3, -4), (14, 14), "exact")

    @tf.function
    def all_of_them(a, b):
        e = tf.constant(-3), tf.constant(-4)
        token = tf.zeros([0])
        return [lib.dfp_matmul(a[i], e[0], token, b[i], e[1], token) for i in range(8)]

    with running(extension.isa(), 2, small=0):
        for _ in range(20):
            results = all_of_them(tf.constant(a), tf.constant(b))
            for result, truth in zip(results, expected, strict=True):
                assert_same_bits(result, truth)


@pytest.mark.parametrize("threads", [8, 64])
def test_more_threads_than_cores(one_large, threads):
    with running(extension.isa(), 1):
        alone = cpu_time(one_large)
    with running(extension.isa(), threads):
        # To wake a thread takes tens of microseconds, whatever the work; waiting by spinning,
        # milliseconds.
        assert cpu_time(one_large) < 3 * alone + 2e-4 * threads
        products()


def test_two_products_at_once_cost_what_they_cost_in_turn(one_large):
    with running(extension.isa(), 2):
        in_turn = cpu_time(lambda: [one_large() for _ in range(10)])
        together = cpu_time(lambda: at_once(lambda: [one_large() for _ in range(5)], count=2))
    assert together < 3 * in_turn


def test_a_busy_machine(one_large):
    with running(extension.isa(), 1):
        alone = cpu_time(one_large)
    with running(extension.isa(), 2), busy_machine():
        assert cpu_time(one_large) < 3 * alone
        products()


def in_child():
    """Forks; the child runs products and ends."""
    child = os.fork()
    if child == 0:
        try:
            products()
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def forks():
    """Run by the test below in a process of its own: a child that hangs does not hang the tests."""
    extension.set_threads(2, small=0)
    products()  # the team exists now
    in_child()
    with busy_machine():
        in_child()
    products()  # and still works here
    assert extension.threads() == 2


def one_thread():
    assert extension.threads() == 1
    products()
    tasks = len(os.listdir("/proc/self/task"))
    extension.set_threads(4, small=0)
    products()
    assert len(os.listdir("/proc/self/task")) > tasks


@pytest.mark.parametrize(
    ("function", "variables"), [("forks", {}), ("one_thread", {"OMP_NUM_THREADS": "1"})]
)
def test_in_a_process_of_its_own(function, variables):
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", f"import test_threads; test_threads.{function}()"],
        env={**os.environ, "PYTHONPATH": f"{here.parent}:{here}", **variables},
        check=True,
        timeout=120,
    )


def spawned(_):
    products()
    return extension.threads()


def test_a_pool_of_forked_workers():
    """What data loaders do: the workers are forked from a process whose team is at work."""
    with running(extension.isa(), 2, small=0):
        products()
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map_async(spawned, range(4)).get(timeout=120) == [1] * 4
