"""describe(model): which layers run on integers, and why the others do not."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from typing import Any

import keras
from keras.src import tree

from keras_dfp import native
from keras_dfp.backend import recording
from keras_dfp.backend.calling import Decision
from keras_dfp.backend.inputs import known_inputs, symbolic
from keras_dfp.backend.registry import installed
from keras_dfp.model_policy import first_and_last, layers_in_order, warn_of_unmatched_patterns
from keras_dfp.number import PRODUCTS, DFPFormat

_COLUMNS = ("layer", "class", "products", "runs on", "why")


@dataclasses.dataclass(frozen=True)
class Report:
    """What `describe` found; `print(report)` shows it as a table.

    Attributes:
        rows: One dict per layer that multiplies (two for a layer that does both), in the order of
            the computation: `path`, `layer` (the class), `operations` (a dict from the operation
            to how often the layer runs it, in one step of a loop), `products` (which of
            `"forward"`, `"input_gradient"`, `"weight_gradient"` run on integers), `format` (a
            `DFPFormat`, `None` for FP32) and `reason` (why FP32, or why another format).
        others: How many layers of each class do not multiply.
        kernels: The instruction set that the integer kernels use.
    """

    rows: list[dict[str, Any]]
    others: dict[str, int]
    kernels: str

    def __str__(self) -> str:
        lines = [_COLUMNS]
        for row in self.rows:
            operations = ", ".join(f"{n} {name}" for name, n in row["operations"].items())
            lines.append(
                (row["path"], row["layer"], operations, _runs_on(row["format"]), row["reason"])
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        table.insert(1, "  ".join("-" * width for width in widths))
        integers = len([row for row in self.rows if row["format"] is not None])
        table.append(f"{integers} of {len(self.rows)} run on integers (kernels: {self.kernels}).")
        if self.others:
            others = ", ".join(f"{n} {name}" for name, n in sorted(self.others.items()))
            table.append(f"No products: {others}.")
        return "\n".join(table)


def describe(model: keras.Model, inputs: Any = None, *, input_shape: Any = None) -> Report:
    """Says which layers of a model run on integers, in which format, and why the others do not.

    The model is traced as for a training step, not run; so whatever multiplies is found, also in
    custom layers that call TensorFlow directly (they stay FP32); except inside a `tf.function`
    that needs AutoGraph and was traced before.

    Args:
        model: A Keras model or layer.
        inputs: For a model whose inputs are not known, i.e. a subclassed one that was not called
            yet (otherwise its last call counts): an example batch, or `keras.Input`s, in the
            structure that the model is called with.
        input_shape: Or only the shape of its one float32 input, batch size included (or `None`).

    Returns:
        A `Report`.

    Raises:
        ValueError: If the inputs of the model are not known, or it cannot be called with them.
        RuntimeError: If the plugin is not installed.

    Example:

    >>> print(keras_dfp.describe(model))
    """
    if not installed():
        raise RuntimeError(
            "describe: the plugin is not installed; call keras_dfp.backend.install()."
        )
    inputs = _symbolic_inputs(model, inputs, input_shape)
    products = recording.trace(model, inputs)
    warn_of_unmatched_patterns(model)
    multiplying = {id(product.layer) for product in products}
    others = collections.Counter(
        type(layer).__name__
        for layer in layers_in_order(model)
        if id(layer) not in multiplying and not layer._layers
    )
    others.pop("InputLayer", None)
    return Report(rows=_rows(model, products), others=dict(others), kernels=native.extension.isa())


def _symbolic_inputs(model, inputs, input_shape):
    """Returns the structure of KerasTensors that the model is called with."""
    if inputs is not None:
        return tree.map_structure(symbolic, inputs)
    if input_shape is not None:
        return keras.KerasTensor(input_shape)
    inputs = known_inputs(model)
    if inputs is not None:
        return inputs
    shapes = list((model._build_shapes_dict or {}).values()) if model.built else []
    if len(shapes) != 1:
        raise ValueError(
            f"describe: the inputs of model '{model.name}' are not known. Call the model once, or "
            "pass input_shape=, or inputs=, an example batch or keras.Input()s."
        )
    warnings.warn(
        f"keras_dfp: model '{model.name}' was not called yet; describe takes its inputs to be "
        "float32. If they are not, pass inputs=, an example batch or keras.Input()s.",
        stacklevel=3,
    )
    return tree.map_shape_structure(keras.KerasTensor, shapes[0])


def _rows(model, products) -> list[dict[str, Any]]:
    # A loop's body is traced more than once, each time in a graph of its own.
    counts = collections.Counter((id(p.layer), p.decision, p.operation, p.graph) for p in products)
    exempt = first_and_last(model)
    rows = {}
    for p in products:
        row = rows.setdefault((id(p.layer), p.decision), _row(p.layer, p.decision, exempt))
        count = counts[id(p.layer), p.decision, p.operation, p.graph]
        row["operations"][p.operation] = max(count, row["operations"].get(p.operation, 0))
    return list(rows.values())


def _row(layer, decision: Decision, exempt) -> dict[str, Any]:
    fmt, reason = decision.format, decision.reason
    if layer in exempt and fmt is None and layer.dtype_policy.name == "dfp16_paper":
        reason = f"{exempt[layer]} stays FP32 under dfp16_paper"
    return {
        "path": "" if layer is None else layer.path or layer.name,
        "layer": "" if layer is None else type(layer).__name__,
        "operations": {},
        "products": () if fmt is None else fmt.products,
        "format": fmt,
        "reason": reason,
    }


def _runs_on(fmt: DFPFormat | None) -> str:
    if fmt is None:
        return "FP32"
    text = f"INT16 ({fmt.mantissa_bits} bits, {fmt.rounding}, {fmt.accumulation})"
    return text if fmt.products == PRODUCTS else f"{text}: only {', '.join(fmt.products)}"
