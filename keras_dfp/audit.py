"""audit(model, x): what integers cost each layer, measured on one batch."""

from __future__ import annotations

import collections
import dataclasses
import glob
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dfp import auditing
from keras_dfp.backend.registry import installed
from keras_dfp.files import written_whole
from keras_dfp.internals import global_seed_generator as global_seed
from keras_dfp.legacy import check_model
from keras_dfp.number import DFPFormat

# Above this an error is worth a word of advice: bfloat16 rounds each factor by up to 0.4 %.
NOTABLE = 0.01
# From here on, two bits more would not help.
LARGE = 0.1
MUCH = 0.5
_COLUMNS = (
    "layer", "product", "output", "(all)", "input grad", "weight grad", "(all)", "lost x", "w",
    "dy", "spread x", "w", "dy", "advice",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Audit:
    """What `audit` found; `print` shows it as a table, the worst layer first.

    Attributes:
        rows: One dict per layer and operation on integers, the worst first:

            - `path`, `layer` (the class), `operation`, `format` (a `DFPFormat`);
            - `output`, `input_gradient`, `weight_gradient`: the relative error (the norm of the
              difference over the norm; of output and input gradient that of each sample, of which
              this is the mean) of what this product gives, against float32 from the same numbers;
              None where there is none;
            - `output_all`, `weight_gradient_all`: the same against a model that runs in float32
              from the first layer to the last, so with what the other layers have added;
            - `lost`: of the operands `"x"`, `"w"` and `"dy"`, the share of nonzero values that
              became zero;
            - `spread`: likewise, in bits, how far the largest and the smallest nonzero magnitude
              that share an exponent are apart, at most;
            - `advice`: what may help, in words; empty if nothing is needed.
        loss: The loss under the policy and in float32, as a pair; None without labels.
    """

    rows: list[dict[str, Any]]
    loss: tuple[float, float] | None = None

    def __str__(self) -> str:
        lines = [_COLUMNS]
        for row in self.rows:
            lines.append(
                (
                    row["path"],
                    row["operation"],
                    *map(
                        _percent,
                        (
                            row["output"],
                            row["output_all"],
                            row["input_gradient"],
                            row["weight_gradient"],
                            row["weight_gradient_all"],
                            *row["lost"].values(),
                        ),
                    ),
                    *("-" if bits is None else str(bits) for bits in row["spread"].values()),
                    row["advice"],
                )
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = (0, 1, len(_COLUMNS) - 1)
        table = [
            "  ".join(
                text.ljust(width) if i in left else text.rjust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        table.insert(1, "  ".join("-" * width for width in widths))
        table.append(
            "Errors are relative to float32: of the product alone, and (all) of all layers."
        )
        if self.loss is not None:
            table.append(f"Loss: {self.loss[0]:.6g}, in float32 {self.loss[1]:.6g}.")
        return "\n".join(table)

    def plot(self, path: str | Path, most: int = 30) -> None:
        """Draws the errors of the worst layers, as a PNG, PDF or SVG.

        Args:
            path: Where to; the suffix says what.
            most: How many rows to show.
        """
        from matplotlib.figure import Figure

        rows = self.rows[:most][::-1]
        figure = Figure(figsize=(10, 1.5 + 0.3 * len(rows)), layout="constrained")
        errors, lost = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
        where = np.arange(len(rows))
        passes = (("output", "o"), ("input_gradient", "s"), ("weight_gradient", "^"))
        for number, (name, marker) in enumerate(passes):
            values = [np.nan if row[name] is None else max(row[name], 1e-8) for row in rows]
            errors.plot(
                values, where, marker, color=f"C{number}", label=name.replace("_", " "), alpha=0.8
            )
        values = [
            np.nan if row["weight_gradient_all"] is None else max(row["weight_gradient_all"], 1e-8)
            for row in rows
        ]
        errors.plot(
            values, where, "^", color="C2", fillstyle="none", label="weight gradient, all layers"
        )
        errors.axvline(NOTABLE, color="0.6", linestyle=":", lw=1)
        errors.set(xscale="log", xlabel="relative error", title="Error against float32")
        errors.set_yticks(where, [f"{row['path']} ({row['operation']})" for row in rows])
        errors.grid(axis="x", alpha=0.3)
        for number, name in enumerate(("x", "w", "dy")):
            shares = [100 * (row["lost"][name] or 0) for row in rows]
            lost.barh(where + 0.27 * (1 - number), shares, 0.25, color=f"C{number + 3}", label=name)
        lost.set(xlabel="% of nonzero values", title="Became zero", xlim=(0, None))
        lost.locator_params(axis="x", nbins=4)
        figure.legend(loc="outside lower center", ncols=4)
        with written_whole(Path(path)) as temporary:
            figure.savefig(temporary, dpi=120, format=Path(path).suffix[1:] or "png")


def audit(model: keras.Model, x: Any, y: Any = None, *, training: bool = True) -> Audit:
    """Measures, on one batch, what integers cost each layer of a model.

    The batch runs forward and backward twice, eagerly, under the model's policy and in float32. For
    each product on integers it is told how far its results are from float32's, how much of its
    operands became zero when they were quantized, and what may help. The model is left as it was.
    It takes the memory of the batch's activations several times over: a small batch will do. Layers
    that are computed again in the backward pass (`keras.remat`) show no errors of gradients.

    Args:
        model: A Keras model with a `DFPPolicy` in some of its layers.
        x: A batch of its inputs, in the structure that the model is called with.
        y: Labels, if the gradients are to be those of the model's loss (it has to be compiled);
            without, they are those of a fixed random projection of the outputs.
        training: Whether to call the model as in training.

    Returns:
        An `Audit`.

    Raises:
        TypeError: If it is no Keras model; one of `tf_keras`, for instance.
        ValueError: If no product runs on integers, or there are labels and the model has no loss.
        RuntimeError: If the plugin is not installed.

    Example:

    >>> print(keras_dfp.audit(model, images[:16], labels[:16]))
    """
    check_model("audit", model)
    if not installed():
        raise RuntimeError("audit: the plugin is not installed; call keras_dfp.backend.install().")
    if y is not None and not getattr(model, "compiled", False):
        raise ValueError(
            "audit: labels need a loss, and the model has none. Compile it, or leave out y."
        )
    x = keras.tree.map_structure(tf.convert_to_tensor, x)
    if not model.built:
        model(x, training=False)  # outside of what is watched
    rounded, rounded_loss, rounded_gradients = _run(model, x, y, training, float32=False)
    exact, exact_loss, exact_gradients = _run(model, x, y, training, float32=True)
    if not rounded:
        raise ValueError(
            f"audit: no product of model '{model.name}' runs on integers. "
            "keras_dfp.describe(model) says why."
        )
    rows: dict[tuple, _Row] = {}
    for call, twin in zip(rounded, exact, strict=True):
        key = id(call.layer), call.operation, call.format
        rows.setdefault(key, _Row(call)).add(call, twin)
    for row in rows.values():
        row.add_weights(rounded_gradients, exact_gradients)
    found = sorted((row.result() for row in rows.values()), key=_badness, reverse=True)
    return Audit(found, None if y is None else (float(rounded_loss), float(exact_loss)))


def _run(model, x, y, training: bool, float32: bool):
    """Returns the products of a step, its loss, and the gradients of variables by their id."""
    # Also what metrics have seen, and the noise that is drawn without a seed.
    kept = [*model.variables, *getattr(model, "metrics_variables", ()), global_seed().state]
    state = [keras.ops.convert_to_numpy(v) for v in kept]
    watch = auditing.Watch(float32)
    eagerly = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        with tf.GradientTape() as tape:
            with watch.forward():
                outputs = model(x, training=training)
            loss = _projection(outputs) if y is None else model.compute_loss(x, y, outputs)
        variables = [v.value for v in model.trainable_variables]
        with watch.backward():
            gradients = tape.gradient(loss, variables)
    finally:
        tf.config.run_functions_eagerly(eagerly)
        for variable, value in zip(kept, state, strict=True):
            variable.assign(value)
    by_id = {
        id(v): None if g is None else tf.convert_to_tensor(g)
        for v, g in zip(variables, gradients, strict=True)
    }
    return watch.calls, loss, by_id


def _projection(outputs) -> tf.Tensor:
    total = 0.0
    for number, output in enumerate(keras.tree.flatten(outputs)):
        direction = tf.random.stateless_normal(tf.shape(output), [number, 2018])
        total += tf.reduce_sum(tf.cast(output, tf.float32) * direction)
    return total


class _Row:
    """What the calls of one operation of a layer add up to."""

    def __init__(self, call: auditing.Call):
        self.call = call
        self.errors: dict[str, auditing.Error] = collections.defaultdict(auditing.Error)
        self.losses = {name: auditing.Losses() for name in ("x", "w", "dy")}
        self.weights: dict[int, Any] = {}

    def add(self, call: auditing.Call, twin: auditing.Call) -> None:
        self.errors["output_all"].add(call.output, twin.output)
        operands = [auditing.value(operand) for operand in call.operands]
        is_weight = [auditing.is_variable(operand) for operand in call.operands]
        with auditing.losses() as lost:
            ours, our_gradients = auditing.gradients(call.ours, operands, call.gradient)
        stock, stock_gradients = auditing.gradients(call.stock, operands, call.gradient)
        self.errors["output"].add(ours, stock)
        for weight, g, truth in zip(is_weight, our_gradients, stock_gradients, strict=True):
            name = "weight_gradient" if weight else "input_gradient"
            self.errors[name].add(g, truth, samples=not weight)
        names = "x", "w", "dy"
        for name, found in zip(names, lost.values(), strict=True):
            self.losses[name].merge(found)
        self.weights |= {
            id(value): value for value, weight in zip(operands, is_weight, strict=True) if weight
        }

    def add_weights(self, ours: dict, truth: dict) -> None:
        for key in self.weights:
            self.errors["weight_gradient_all"].add(ours.get(key), truth.get(key), samples=False)

    def result(self) -> dict[str, Any]:
        layer, fmt = self.call.layer, self.call.format
        row = {
            "path": layer.path or layer.name,
            "layer": type(layer).__name__,
            "operation": self.call.operation,
            "format": fmt,
        }
        for name in (
            "output", "output_all", "input_gradient", "weight_gradient", "weight_gradient_all"
        ):  # fmt: skip
            row[name] = self.errors[name].result()
        row["lost"] = {k: v.share if v.nonzero else None for k, v in self.losses.items()}
        row["spread"] = {k: v.spread if v.nonzero else None for k, v in self.losses.items()}
        lost = max(share or 0.0 for share in row["lost"].values())
        row["advice"] = advice(row["path"], remedy(_badness(row), lost, fmt))
        return row


def _badness(row: dict[str, Any]) -> float:
    return max(row[name] or 0.0 for name in ("output", "input_gradient", "weight_gradient"))


def remedy(error: float, lost: float, fmt: DFPFormat) -> str:
    """Returns the option of `DFPPolicy` that may help a layer; empty if nothing is needed.

    Args:
        error: The largest relative error of what the layer multiplies, or of what comes of it.
        lost: The largest share of nonzero values of an operand that became zero.
        fmt: The layer's format.
    """
    if error < NOTABLE:
        return ""
    if fmt.exponents == "tensor":
        return "exponents"
    if fmt.mantissa_bits < 16 and not (lost >= MUCH and error >= LARGE):
        return "mantissa_bits"
    return "exclude"


def advice(path: str, option: str) -> str:
    """Returns in words what `remedy` says of the layer of a path."""
    match option:
        case "exponents":
            return "exponents='sample': small samples share the exponent of large ones"
        case "mantissa_bits":
            return f"overrides={{{pattern(path)!r}: {{'mantissa_bits': 16}}}}"
        case "exclude":
            return f"exclude=[{pattern(path)!r}]: its values span more than 16 bits hold"
    return ""


def pattern(path: str) -> str:
    """Returns the pattern of a DFPPolicy that matches a path as it is, whatever is in it."""
    return glob.escape(path)


def _percent(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if value >= 0.001 or value == 0 else f"{value:.1e}"
