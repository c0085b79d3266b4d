"""From float32 to int16 and exponents, against the speed of the memory.

A group is read for its largest value and read again while its mantissas are written: 4 + 4 + 2
bytes an element, of which the second 4 may come from a cache. `counts` also counts what became zero
and what was clamped; `watch` looks for groups that lost half of themselves, as layers do.
"""

from __future__ import annotations

from collections.abc import Iterator

import tensorflow as tf

from keras_dfp import native
from keras_dfp.benchmarks.machine import medians
from keras_dfp.benchmarks.run import Doing

ELEMENTS = tuple(4**i for i in range(8, 14))  # 64 Ki to 64 Mi
# Elements that share an exponent: a row of classes, 1 KB, 64 KB, 3 MB, and all.
GROUPS = (10, 256, 16384, 786432, None)
WAYS = ("nearest", "truncate", "stochastic", "counts", "watch")


def measure(settings: dict) -> Iterator[Doing | dict]:
    """Yields a row per number of elements, size of a group and way; settings: elements, groups,
    repeats."""
    each = [
        (n, group)
        for n in settings["elements"]
        for group in settings["groups"]
        if group is None or group <= n
    ]
    # Time goes with the elements.
    done, total = 0, sum(n for n, _ in each)
    for n, group in each:
        x = tf.random.normal([n] if group is None else [n // group, group])
        size = len(x) * (group or 1)
        yield Doing(f"{n} elements, groups of {group or 'all'}", done / total)
        done += n
        taken = medians({way: _quantize(x, group, way) for way in WAYS}, settings["repeats"])
        for way in WAYS:
            yield {
                "elements": size,
                "group": group or size,
                "way": way,
                "bytes": 10 * size,
                "dfp_ms": taken[way],
            }


def _quantize(x, group, way):
    stochastic = way == "stochastic"
    options = {
        "exponent": [],
        "step": [tf.constant(1, tf.int64)] if stochastic else [],
        "rounding": way if stochastic or way == "truncate" else "nearest",
        "group_axes": int(group is not None),
        "n_counts": int(way == "counts"),
        "site": "benchmark" if way == "watch" else "",
    }
    return lambda: native.lib.dfp_quantize(x=x, **options)
