"""Times one convolution among threads of all kinds; prints the table of docs/threads.md.

    python -m benchmarks.threads

The unit is the time it takes on one thread of an otherwise idle machine. What is compared is
measured in turns, and the median counts.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from keras_dfp import native

REPEATS = 40
CORES = len(os.sched_getaffinity(0))


def operands() -> tuple[dict, dict, tf.Tensor, tf.Tensor]:
    """Returns a 3x3 convolution of eight 56x56x64 images to 64 filters, 0.92 G products."""
    rng = np.random.default_rng(0)
    x = tf.constant(rng.standard_normal((8, 56, 56, 64)), tf.float32)
    w = tf.constant(rng.standard_normal((3, 3, 64, 64)), tf.float32)
    sides = []
    for name, tensor in (("x", x), ("w", w)):
        q, e = native.lib.dfp_quantize(x=tensor, exponent=[], step=[])[:2]
        sides.append({name: q, f"{name}_exponent": e, f"{name}_token": tf.zeros([0])})
    return *sides, x, w


X, W, X_FLOAT, W_FLOAT = operands()


def ours():
    native.lib.dfp_conv(**X, **W, strides=[1, 1], dilations=[1, 1], padding="SAME")


def tensorflows():
    tf.nn.conv2d(X_FLOAT, W_FLOAT, 1, "SAME").numpy()


def two_at_once():
    threads = [threading.Thread(target=ours) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def seconds(work: Callable, threads: int) -> tuple[float, float]:
    """Returns the seconds of one `work()`: on the clock, and of all cores together."""
    native.extension.set_threads(threads)
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def medians(works: list[tuple[Callable, int]]) -> list[np.ndarray]:
    """Returns the median seconds of each (work, threads), run in turns."""
    times = [[seconds(*work) for work in works] for _ in range(REPEATS + 3)][3:]
    return list(np.median(times, axis=0))


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Keeps every core busy with another process."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(CORES)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def main():
    everywhere = [(ours, 1), (ours, CORES), (ours, 4 * CORES), (two_at_once, CORES)]
    one, cores, many, pair = medians(everywhere)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        child = pool.apply(medians, ([(ours, CORES)],))[0]
    (stock,) = medians([(tensorflows, 0)])
    with busy():
        busy_one, busy_cores, busy_stock = medians([(ours, 1), (ours, CORES), (tensorflows, 0)])
    native.extension.set_threads(0)
    print(f"{native.extension.isa()}, {CORES} cores; one thread takes {one[0] * 1e3:.1f} ms\n")
    print("| | time | CPU time |\n|---|---|---|")
    for what, value in [
        ("one thread", one),
        (f"{CORES} threads, one a core", cores),
        (f"{4 * CORES} threads", many),
        ("two ops at once, each", pair / 2),
        (f"a forked child, told {CORES} threads", child),
        ("every core busy with another process: one thread", busy_one),
        (f"every core busy with another process: {CORES} threads", busy_cores),
    ]:
        print("| {} | {:.2f} | {:.2f} |".format(what, *(value / one)))
    print(
        f"\nTensorFlow's float32 under a busy process a core: {(busy_stock / stock)[0]:.2f} times"
    )


if __name__ == "__main__":
    main()
