"""The machine as far as figures depend on it, and how to time on it."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

import keras_dfp
from keras_dfp import native

COPIED_BYTES = 1 << 28  # more than caches hold


def facts() -> dict:
    """Returns what the figures depend on: processor, instruction sets, threads and versions."""
    info = keras_dfp.info()
    names = ("cpu", "isa", "threads", "keras_dfp", "keras", "tensorflow", "python", "compiler")
    held = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return {**{name: info[name] for name in names}, "onednn_max_cpu_isa": held}


def roofs(threads: int) -> dict:
    """Returns what no kernel can exceed, as measured now.

    Returns:
        `peak_gmacs`, 10**9 products per second of cores that do nothing but multiply-accumulate in
        registers; `copy_gbs`, 10**9 bytes per second of a copy in memory, read and written bytes
        added up. Both for this number of threads.
    """
    return {
        "peak_gmacs": native.extension.peak() * threads / 1e9,
        "copy_gbs": copy_bandwidth(threads) / 1e9,
    }


def copy_bandwidth(threads: int, size: int = COPIED_BYTES) -> float:
    """Returns the bytes read and written per second by the C library's copy: the best of ten.

    Args:
        threads: How many threads share the copy.
        size: Bytes to copy.
    """
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    edges = [size * i // threads for i in range(threads + 1)]

    # ctypes lets go of Python's lock during the call.
    def copy(i: int):
        start, stop = edges[i], edges[i + 1]
        ctypes.memmove(target.ctypes.data + start, source.ctypes.data + start, stop - start)

    seconds = []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(10):
            start = time.perf_counter()
            list(pool.map(copy, range(threads)))
            seconds.append(time.perf_counter() - start)
    return 2 * size / min(seconds)


def milliseconds(function: Callable) -> float:
    """Returns how long a call takes."""
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def medians(functions: Mapping[str, Callable], repeats: int) -> dict[str, float]:
    """Returns the median milliseconds of each function.

    They run in turns, so that all meet the same machine; a first round warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            times[name].append(milliseconds(function))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median between the two values between which half of the values are."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, method="inclusive")
    return low, middle, high
