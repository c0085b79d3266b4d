"""From float32 to int16 and an exponent, against the speed of the memory.

The first of its two passes reads the tensor for its largest value, the second reads it again and
writes the mantissas: 4 + 4 + 2 bytes an element.
"""

from __future__ import annotations

from collections.abc import Iterator

import tensorflow as tf

from keras_dfp import native
from keras_dfp.benchmarks.machine import medians

ELEMENTS = tuple(4**i for i in range(8, 14))  # 64 Ki to 64 Mi


def measure(settings: dict) -> Iterator[dict | str]:
    """Yields a row per number of elements and rounding; settings: elements, repeats."""
    for n in settings["elements"]:
        x = tf.random.normal([n])
        yield f"{n} elements"

        def quantise(x, rounding):
            step = [tf.constant(1, tf.int64)] if rounding == "stochastic" else []
            return lambda: native.lib.dfp_quantize(x=x, exponent=[], step=step, rounding=rounding)

        roundings = ("nearest", "truncate", "stochastic")
        taken = medians({name: quantise(x, name) for name in roundings}, settings["repeats"])
        for name in roundings:
            yield {"elements": n, "rounding": name, "bytes": 10 * n, "dfp_ms": taken[name]}
