"""What a call costs where there is next to nothing to compute, eagerly and in a graph.

Eagerly, the time includes Python's way to the op and back, on both sides. In a graph, a hundred
calls run one after the other, and the time of one is a hundredth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import tensorflow as tf

from keras_dfp.benchmarks import products
from keras_dfp.benchmarks.machine import medians
from keras_dfp.benchmarks.run import Doing

CALLS = 100
AGAINST = ("float32",)


def measure(settings: dict) -> Iterator[Doing | dict]:
    """Yields a row per product and mode; settings: repeats."""
    each = list(_products())
    for done, (name, product, operands) in enumerate(each):
        yield Doing(name, done / len(each))
        ways = {
            **product.ways,
            "quantize": lambda operands=operands: [t.quantize() for t in operands],
        }
        for mode, repeated in (("eager", _eager), ("graph", _graph)):
            calls = {way: repeated(function) for way, function in ways.items()}
            taken = medians(calls, settings["repeats"])
            us = {f"{way}_us": 1e3 * ms / CALLS for way, ms in taken.items()}
            yield {"product": name, "mode": mode, "macs": product.macs, **us}


def _products():
    for shape in ((1, 16, 16), (32, 64, 10), (32, 256, 256)):
        passes, (x, w, _) = products.dense(*shape, AGAINST)
        yield f"{shape[0]}x{shape[1]} . {shape[1]}x{shape[2]}", passes["forward"], (x, w)
    for x_shape, w_shape in (((1, 8, 8, 16), (3, 3, 16, 16)), ((1, 14, 14, 64), (1, 1, 64, 64))):
        passes, (x, w, _) = products.convolution(x_shape, w_shape, (1, 1), "SAME", False, AGAINST)
        sizes = ("x".join(map(str, shape)) for shape in (x_shape, w_shape))
        yield " * ".join(sizes), passes["forward"], (x, w)


def _eager(function: Callable) -> Callable:
    def run():
        for _ in range(CALLS):
            function()

    return run


def _graph(function: Callable) -> Callable:
    @tf.function(autograph=False)
    def run():
        results = []
        for _ in range(CALLS):
            # One after the other, and different, so that TensorFlow merges none.
            with tf.control_dependencies(results[-1:]):
                results.append(tf.nest.flatten(function())[0])
        # All of them, so that it drops none.
        return results

    return run
