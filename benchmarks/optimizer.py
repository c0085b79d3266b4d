"""What an optimizer takes of a training step: Keras's against ours, on all weights of a network.

    python -m keras_dfp.benchmarks.worker optimizer '{"network": "vgg16", "threads": null,
                                                      "repeats": 7, "steps": 3}'

`update_ms` is the time of a graph that makes gradients and applies them, less that of one that only
makes them. Where `steps` says how many to time, `step_ms` is a whole training step under dfp16,
`in_step_ms` what the optimizer's ops take in it, by TensorFlow's profiler, and `in_step_share`
their share of the time of all ops. `"optimizers": ["SGD", "DFPSGD"]` measures these alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_dfp import native
from keras_dfp.benchmarks.machine import medians
from keras_dfp.benchmarks.networks import NETWORKS, build, data
from keras_dfp.benchmarks.run import Doing
from keras_dfp.benchmarks.step import profile, training_step
from keras_dfp.optimizers import DFPSGD, DFPAdam

OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(1e-4, momentum=0.9),
    "DFPSGD": lambda: DFPSGD(1e-4, momentum=0.9),
    "DFPSGD, dfp16": lambda: DFPSGD(1e-4, momentum=0.9, slots="dfp16"),
    "Adam": lambda: keras.optimizers.Adam(1e-4),
    "DFPAdam": lambda: DFPAdam(1e-4),
    "DFPAdam, dfp16": lambda: DFPAdam(1e-4, slots="dfp16"),
}


def measure(settings: dict) -> Iterator[Doing | dict]:
    """Yields a row per optimizer, and one for quantizing all kernels; settings: network, repeats,
    steps, and optimizers, if not all."""
    network = NETWORKS[settings["network"]]
    model = build(settings["network"], network.image_size, "dfp16")
    weights = model.trainable_variables
    batch = data(model, network.batch)
    names = settings.get("optimizers", OPTIMIZERS)
    for done, name in enumerate(names):
        make = OPTIMIZERS[name]
        yield Doing(f"{settings['network']} {name}", done / len(names))
        optimizer = make()
        optimizer.build(weights)
        ways = {"update": _updating(weights, optimizer), "make": _updating(weights, None)}
        taken = medians(ways, settings["repeats"])
        row = {"optimizer": name, "update_ms": taken["update"] - taken["make"]}
        row["slots_mb"] = sum(v.value.numpy().nbytes for v in optimizer.variables) / 1e6
        if settings["steps"]:
            step, graph = training_step(model, make(), *batch)
            row["step_ms"] = medians({"step": step}, settings["steps"])["step"]
            shares = []
            for _ in range(settings["steps"]):
                kinds = {kind["kind"]: kind["ms"] for kind in profile(step, graph, model)}
                shares.append((kinds["optimizer"] / sum(kinds.values()), kinds["optimizer"]))
            row["in_step_share"], row["in_step_ms"] = statistics.median_high(shares)
        yield row
    kernels = [tf.convert_to_tensor(w.value) for w in weights if w.shape.rank > 1]
    quantize = medians({"all": lambda: [_quantized(k) for k in kernels]}, settings["repeats"])
    yield {"quantizing_kernels_ms": quantize["all"]}


def _updating(weights, optimizer):
    @tf.function(autograph=False)
    def run():
        gradients = [tf.raw_ops.Mul(x=w.value, y=tf.constant(1e-3)) for w in weights]
        if optimizer is not None:
            optimizer.apply(gradients, weights)
        return [tf.reshape(g, [-1])[0] for g in gradients] if optimizer is None else []

    return run


def _quantized(kernel):
    return native.quantize(kernel, 14, "nearest", 1)[0]
