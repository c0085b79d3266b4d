"""Whole training steps of a network under one policy: throughput, memory, and where time goes.

The policy gets a process of its own, so that the peak of the resident memory is its own too. It
runs a few steps in each round and waits while others run theirs, so all meet the same machine.
Samples are random and in memory: an input pipeline is not part of the figure. Where the time goes
is read off TensorFlow's profiler: the time of every op, less that of ops inside it, by kind.
"""

from __future__ import annotations

import collections
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_dfp.benchmarks.machine import milliseconds
from keras_dfp.benchmarks.networks import build, data
from keras_dfp.benchmarks.run import Doing
from keras_dfp.info import peak_memory

# Milliseconds of steps in a round, or a single step. Machines drift in seconds, not faster.
ROUND_MS = 400
# Kinds of op by their type: the first pattern found decides. TensorFlow prefixes and suffixes types
# of its own, such as _MklNativeConv2D and _FusedConv2D. What XLA runs is seen as
# ExecuteAsyncOnStream: Keras gives it convolutions in groups, and nothing else here.
TYPES = {
    "convolutions and products": r"Conv(?!ert)|Mat[Mm]ul|^Execute\w*OnStream",
    "batch norm, ReLU and quantizing fused": r"^Dfp(Moments|Normalize)",
    "quantization": r"^Dfp(Quantize|Dequantize|Token)",
    "casts": r"Cast$",
    "sums of gradients": r"AddN$",
}
# Kinds of op by the class of the layer they belong to, for all others.
LAYERS = {
    "BatchNormalization": "batch norm",
    "LayerNormalization": "layer norm",
    "Embedding": "embedding",
    "TokenAndPositionEmbedding": "embedding",
    "Activation": "activation",
    "ReLU": "activation",
    "Add": "residual sums",
    "MaxPooling2D": "pooling",
    "AveragePooling2D": "pooling",
    "GlobalAveragePooling1D": "pooling",
    "GlobalAveragePooling2D": "pooling",
    "LocalResponseNormalization": "response normalisation",
    "Conv2D": "bias and ReLU of products",
    "DepthwiseConv2D": "bias and ReLU of products",
    "Dense": "bias and ReLU of products",
}
OTHER = "other"
# The attributes that say which outputs a DfpNormalize or a DfpNormalizeGradient writes.
WANTS = {
    "y": "want_y",
    "q": "want_q",
    "e": "want_q",
    "mask": "want_mask",
    "doffset": "want_doffset",
}


def measure(settings: dict) -> Iterator[Doing | dict | None]:
    """Yields one row, and None where others may run; settings: network, policy, batch, image_size,
    repeats."""
    policy, batch, repeats = (settings[key] for key in ("policy", "batch", "repeats"))
    what = f"{settings['network']} {policy}"
    yield Doing(what, 0)
    keras.utils.set_random_seed(1)
    model = build(settings["network"], settings["image_size"], policy)
    x, y, loss = data(model, batch)
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    run, graph = training_step(model, optimizer, x, y, loss)
    run()
    run()
    before = time.process_time()
    steps = max(1, round(ROUND_MS / milliseconds(run)))
    # For the bar, in time of processors, which has that of starting the process in it. The profile
    # takes about another round.
    warm_up = time.process_time()
    a_round = steps * (warm_up - before)
    whole = warm_up + (repeats + 1) * a_round

    def doing(done: int) -> Doing:
        return Doing(what, (warm_up + done * a_round) / whole)

    rounds: list[float] = []
    for done in range(repeats):
        yield None
        yield doing(done)
        rounds.append(statistics.median(milliseconds(run) for _ in range(steps)))
    peak = peak_memory()
    yield None
    yield doing(repeats)
    step_ms = statistics.median(rounds)
    yield {
        "policy": policy,
        "step_ms": step_ms,
        "rounds_ms": rounds,
        "images_per_s": 1e3 * batch / step_ms,
        "peak_memory_mb": peak / 1e6,
        "parameters": model.count_params(),
        "kinds": profile(run, graph, model),
    }


def training_step(model: keras.Model, optimizer, x, y, loss) -> tuple[Callable, tf.Graph]:
    """Returns a function that trains on a batch, and the graph that it runs."""
    model.compile(optimizer, loss)
    optimizer.build(model.trainable_variables)

    # What `fit` runs for a batch, without its loop.
    @tf.function(autograph=False, jit_compile=False)
    def step(x, y):
        return model.train_step((x, y))["loss"]

    # Reading the loss waits for the step.
    return lambda: float(step(x, y)), step.get_concrete_function(x, y).graph


def profile(run, graph, model: keras.Model) -> list[dict]:
    """Runs a step under TensorFlow's profiler.

    Args:
        run: Runs the step.
        graph: Its graph, in which ops have the names that the profiler reports.
        model: The model it trains.

    Returns:
        One dict per kind of op, the most time first: `kind`; `ms`, their time added up, which is
        more than time passed where ops ran side by side; `calls`; `mb`, what they read and wrote
        by the shapes of the tensors, of those ops that still are as in the graph after TensorFlow
        has optimized it; `ops`, the milliseconds by type.
    """
    options = tf.profiler.experimental.ProfilerOptions(
        host_tracer_level=2, python_tracer_level=0, device_tracer_level=0
    )
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder, options)
        run()
        tf.profiler.experimental.stop()
        (path,) = Path(folder).rglob("*.xplane.pb")
        ops = list(timed_ops(path.read_bytes()))
    classes = {layer.name: type(layer).__name__ for layer in model.layers}
    classes[model.optimizer.name] = "optimizer"
    moved = {op.name: _bytes([*read(op), *written(op)]) for op in operations(graph)}
    kinds: dict[str, dict[str, Any]] = collections.defaultdict(
        lambda: {"ms": 0.0, "calls": 0, "mb": 0.0, "ops": {}}
    )
    for name, op_type, ms in ops:
        kind = kinds[kind_of(name, op_type, classes)]
        kind["ms"] += ms
        kind["calls"] += 1
        # What runs in a loop is called "loop/body/_1/name in the body".
        kind["mb"] += moved.get(re.sub(r".*/body/_\d+/", "", name), 0) / 1e6
        kind["ops"][op_type] = kind["ops"].get(op_type, 0.0) + ms
    rows = [{"kind": name, **kind} for name, kind in kinds.items()]
    for row in rows:
        row["ops"] = dict(sorted(row["ops"].items(), key=lambda item: -item[1]))
    return sorted(rows, key=lambda row: -row["ms"])


def kind_of(name: str, op_type: str, classes: dict[str, str]) -> str:
    """Returns the kind of an op by its type, or by its name and the classes that layers have."""
    for kind, pattern in TYPES.items():
        if re.search(pattern, op_type):
            return kind
    # "model_1/layer_1/op" or "gradient_tape/model_1/layer_1/op", where _1 may be missing.
    for part in name.split("/"):
        layer = classes.get(part) or classes.get(re.sub(r"_\d+$", "", part))
        if layer is not None:
            return LAYERS.get(layer, layer)
    return OTHER


def timed_ops(trace: bytes) -> Iterator[tuple[str, str, float]]:
    """Yields name, type and own milliseconds of every op that ran, from a profiler's trace."""
    # Here and not above: the module is TensorFlow's, but not under its public name.
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    for plane in xplane_pb2.XSpace.FromString(trace).planes:
        names = {key: entry.name for key, entry in plane.event_metadata.items()}
        for line in plane.lines:
            yield from _own_times(
                (names[event.metadata_id], event.offset_ps, event.duration_ps)
                for event in line.events
            )


def _own_times(events: Iterable[tuple[str, int, int]]) -> Iterator[tuple[str, str, float]]:
    """Yields the ops among the events of one thread; inner ops' time is not the outer one's."""
    # An op's event is called "name:Type"; XLA's is CpuExecutable::ExecuteAsyncOnStream.
    ops = sorted(
        (start, -duration, name.rpartition(":")[0], name.rpartition(":")[2])
        for name, start, duration in events
        if re.fullmatch(r"[\w./>-]+:\w+|CpuExecutable::\w+", name)
    )
    own = [-negative for _, negative, _, _ in ops]
    around: list[int] = []
    for i, (start, negative, _, _) in enumerate(ops):
        while around and start >= ops[around[-1]][0] - ops[around[-1]][1]:
            around.pop()
        if around:
            own[around[-1]] += negative
        around.append(i)
    for (_, _, name, op_type), picoseconds in zip(ops, own, strict=True):
        yield name, op_type, picoseconds / 1e9


def operations(graph: tf.Graph) -> Iterator[tf.Operation]:
    """Yields the ops of a graph and those of its loops."""
    for op in graph.get_operations():
        yield op
        if op.type in ("While", "StatelessWhile"):
            yield from operations(graph._get_function(op.get_attr("body").name).graph)


def read(op: tf.Operation) -> list[tf.Tensor]:
    """Returns the inputs that an op reads: tokens are there for the sake of gradients."""
    if op.type == "DfpToken":
        return []
    if not op.type.startswith(("DfpConv", "DfpMatmul")):
        return op.inputs
    arguments = zip(op.op_def.input_arg, op.inputs, strict=True)
    return [tensor for argument, tensor in arguments if not argument.name.endswith("_token")]


def written(op: tf.Operation) -> list[tf.Tensor]:
    """Returns the outputs that an op writes."""
    if op.type == "DfpToken":
        return []
    if op.type not in ("DfpNormalize", "DfpNormalizeGradient"):
        return op.outputs
    # Those that no attribute wants are empty, though their shapes do not say so.
    wants = [op.get_attr(WANTS[output.name]) for output in op.op_def.output_arg]
    return [tensor for tensor, wanted in zip(op.outputs, wants, strict=True) if wanted]


def _bytes(tensors: Iterable[tf.Tensor]) -> int:
    sized = (t for t in tensors if t.shape.is_fully_defined() and t.dtype.size)
    return sum(math.prod(t.shape) * t.dtype.size for t in sized)
