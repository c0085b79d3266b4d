"""Times ResNet-50's convolutions on integers against stock TensorFlow in float32.

Every distinct convolution of `keras.applications.ResNet50`, in all three passes, on random data:
keras-dfp's ops on tensors that are quantised already, and TensorFlow's float32 ops, in turns, so
that both meet the same machine. The median counts. Quantising the operands is timed as well, and
shown apart; its time belongs to the pass that needs the operand first, because the gradients
reuse what the forward pass quantised, and share the quantised gradient of the output.

The peak is measured: products per second of one core that does nothing but multiply-accumulate
with the instruction set in use, on registers, times threads.
"""

from __future__ import annotations

import collections
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import keras
import tensorflow as tf

import keras_dfp
from keras_dfp import native

PASSES = ("forward", "input gradient", "weight gradient")


class Shape(NamedTuple):
    """A convolution without its batch size."""

    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    filters: int
    strides: tuple[int, int]
    padding: str

    def __str__(self) -> str:
        size = f"{self.height}x{self.width}x{self.channels}"
        kernel = f"{self.kernel[0]}x{self.kernel[1]}"
        return f"{size} {kernel}/{self.strides[0]} -> {self.filters}"


def resnet50_shapes() -> collections.Counter[Shape]:
    """Returns how often each convolution occurs in ResNet-50, in the network's order."""
    model = keras.applications.ResNet50(weights=None)
    return collections.Counter(
        Shape(
            *layer.input.shape[1:],
            layer.kernel_size,
            layer.filters,
            layer.strides,
            layer.padding.upper(),
        )
        for layer in model.layers
        if isinstance(layer, keras.layers.Conv2D)
    )


class Convolution:
    """The three passes of one convolution: operands, and what computes them both ways."""

    def __init__(self, shape: Shape, batch: int):
        x = tf.random.normal([batch, shape.height, shape.width, shape.channels])
        w = tf.random.normal([*shape.kernel, shape.channels, shape.filters])
        geometry = {"strides": shape.strides, "padding": shape.padding}
        dy = tf.random.normal(tf.nn.conv2d(x, w, **geometry).shape)
        self.macs = math.prod(dy.shape) * math.prod(w.shape) // shape.filters

        self._quantize = {
            name: lambda tensor=tensor: native.lib.dfp_quantize(x=tensor, exponent=[], step=[])
            for name, tensor in (("x", x), ("w", w), ("dy", dy))
        }
        # Kernels do not read the tokens; they carry gradients.
        qx, qw, qdy = ((*q(), tf.zeros([0])) for q in self._quantize.values())
        lib, integer = native.lib, {**geometry, "dilations": (1, 1)}
        raw, floating = tf.raw_ops, {**geometry, "strides": (1, *shape.strides, 1)}
        sizes = tuple(x.shape), tuple(w.shape)
        self.integer = {
            "forward": lambda: lib.dfp_conv(*qx, *qw, **integer),
            "input gradient": lambda: lib.dfp_conv_backprop_input(sizes[0], *qw, *qdy, **integer),
            "weight gradient": lambda: lib.dfp_conv_backprop_filter(*qx, sizes[1], *qdy, **integer),
        }
        self.float32 = {
            "forward": lambda: tf.nn.conv2d(x, w, **geometry),
            "input gradient": lambda: raw.Conv2DBackpropInput(
                input_sizes=sizes[0], filter=w, out_backprop=dy, **floating
            ),
            "weight gradient": lambda: raw.Conv2DBackpropFilter(
                input=x, filter_sizes=sizes[1], out_backprop=dy, **floating
            ),
        }

    def quantize(self, *names: str) -> Callable[[], None]:
        """Returns a function that quantises operands: some of x, w and dy."""

        def run():
            for name in names:
                self._quantize[name]()

        return run


def medians(*functions: Callable, repeats: int) -> list[float]:
    """Returns the median seconds of each function; they run in turns."""
    seconds = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, times in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    # The first round warms up.
    return [statistics.median(times[1:]) for times in seconds]


def measure(shape: Shape, count: int, batch: int, repeats: int, first: bool) -> list[dict]:
    """Returns one row per pass; the network's first layer has no input gradient."""
    convolution = Convolution(shape, batch)
    passes = [p for p in PASSES if not (first and p == "input gradient")]
    operands = {passes[0]: ("x", "w"), passes[1]: ("dy",)}
    rows = []
    for name in passes:
        integer, float32, quantize = medians(
            convolution.integer[name],
            convolution.float32[name],
            convolution.quantize(*operands.get(name, ())),
            repeats=repeats,
        )
        rows.append(
            {
                "shape": str(shape),
                "count": count,
                "pass": name,
                "macs": convolution.macs,
                "dfp_ms": 1e3 * integer,
                "float32_ms": 1e3 * float32,
                "quantize_ms": 1e3 * quantize if name in operands else 0.0,
            }
        )
    return rows


def total(rows: list[dict]) -> dict:
    """Returns the sum of rows, each as often as its convolution occurs."""
    keys = ("macs", "dfp_ms", "float32_ms", "quantize_ms")
    return {key: sum(row["count"] * row[key] for row in rows) for key in keys}


HEADER = (
    f"{'convolution':30}{'n':>3}  {'pass':16}{'ms':>9}{'GMAC/s':>8}{'of peak':>8}"
    f"{'FP32 ms':>9}{'ratio':>7}{'quantise ms':>13}{'ratio with':>12}"
)


def line(label: str, count: str, name: str, row: dict, peak: float) -> str:
    """Returns one line of the table."""
    rate = row["macs"] / row["dfp_ms"] * 1e3
    both = row["dfp_ms"] + row["quantize_ms"]
    return (
        f"{label:30}{count:>3}  {name:16}{row['dfp_ms']:9.2f}{rate / 1e9:8.0f}{rate / peak:8.0%}"
        f"{row['float32_ms']:9.2f}{row['float32_ms'] / row['dfp_ms']:7.2f}"
        f"{row['quantize_ms']:13.2f}{row['float32_ms'] / both:12.2f}"
    )


def machine() -> dict:
    """Returns what the figures depend on."""
    facts = keras_dfp.info()
    names = ("cpu", "isa", "threads", "keras_dfp", "keras", "tensorflow")
    peak = native.extension.peak() * facts["threads"]
    return {**{name: facts[name] for name in names}, "peak_gmacs": peak / 1e9}


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="For both sides.  [default: all]")
@click.option("--isa", help="Instruction set, as in `keras-dfp info`.  [default: the best]")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(
    batch: int, repeats: int, threads: int | None, isa: str | None, json_path: Path | None
) -> None:
    if threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        native.extension.set_threads(threads)
    if isa:
        try:
            native.extension.set_isa(isa)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--isa") from error
    facts = machine()
    peak = facts["peak_gmacs"] * 1e9
    click.echo(
        f"ResNet-50, batch {batch}, 224x224, median of {repeats}; {facts['cpu']}, "
        f"{facts['threads']} thread(s), {facts['isa']}: peak {facts['peak_gmacs']:.0f} GMAC/s; "
        f"TensorFlow {facts['tensorflow']}\n"
    )
    click.echo(HEADER)
    rows = []
    for number, (shape, count) in enumerate(resnet50_shapes().items()):
        for row in measure(shape, count, batch, repeats, first=number == 0):
            click.echo(line(row["shape"], str(count), row["pass"], row, peak))
            rows.append(row)
    click.echo()
    for name in PASSES:
        row = total([row for row in rows if row["pass"] == name])
        click.echo(line("total", "", name, row, peak))
    click.echo(line("total", "", "all", total(rows), peak))
    if json_path:
        results = {"machine": facts, "batch": batch, "repeats": repeats, "rows": rows}
        json_path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.conv")
