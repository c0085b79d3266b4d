"""describe(model): which layers run on integers, and why the others do not; what is fused."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from typing import Any

import keras

from keras_dfp import native
from keras_dfp.backend import recording
from keras_dfp.backend.calling import Decision
from keras_dfp.backend.inputs import known_inputs, symbolic
from keras_dfp.backend.registry import installed
from keras_dfp.flow import Flow
from keras_dfp.legacy import check_model
from keras_dfp.model_policy import first_and_last, layers_in_order, warn_of_unmatched_patterns
from keras_dfp.number import PRODUCTS, DFPFormat

_COLUMNS = ("layer", "class", "products", "runs on", "input", "why")
_INPUT_WIDTH = 48
_MOST_NAMES = 3


@dataclasses.dataclass(frozen=True)
class Report:
    """What `describe` found; `print(report)` shows it as a table.

    Attributes:
        rows: One dict per layer that multiplies (two for a layer that does both), in the order of
            the computation: `path`, `layer` (the class), `operations` (a dict from the operation
            to how often the layer runs it, in one step of a loop), `products` (which of
            `"forward"`, `"input_gradient"`, `"weight_gradient"` run on integers), `format` (a
            `DFPFormat`, `None` for FP32), `reason` (why FP32, or why another format), `inputs` and
            `bytes`. `inputs` are words, each once, for what the layer's operands on integers come
            from, weights apart: the steps that are computed in one pass with the quantizing
            (`"batch norm, ReLU"`; where they do not follow a product, `"batch norm, ReLU (after
            concatenation)"`), or `"float: "` and what the float comes from or why it is one
            (`"float: max pooling"`, `"float: fused=False"`). `bytes` are those of the mantissas of
            these operands, per sample; what layers share counts for the first of them, `None`
            stands for a size that is not known.
        normalizations: One dict per `BatchNormalization`: `path`, `native` (whether it runs on the
            native op), `reason` (why not; or, if it does, why its statistics are TensorFlow's;
            else empty) and `bytes` (of the input, in float32, that a native one keeps, per
            sample, or `None`).
        kept: What the layers on integers, and the steps between them, keep for the backward pass,
            in bytes per sample: `mantissas` (of operands), `floats` (float32 inputs of native batch
            norm and of ReLU, and results of those ReLUs that have to be kept instead), `masks`
            (bits of the ReLUs that end residual blocks), and `unknown`, how many tensors are not in
            these sums because their size is not known. What other layers keep (pooling, swish,
            layers in FP32) is not counted, and recomputation not accounted for.
        others: How many layers of each class do not multiply.
        kernels: The instruction set that the integer kernels use.
    """

    rows: list[dict[str, Any]]
    normalizations: list[dict[str, Any]]
    kept: dict[str, int]
    others: dict[str, int]
    kernels: str

    def __str__(self) -> str:
        lines = [_COLUMNS]
        for row in self.rows:
            operations = ", ".join(f"{n} {name}" for name, n in row["operations"].items())
            lines.append(
                (
                    row["path"],
                    row["layer"],
                    operations,
                    _runs_on(row["format"]),
                    _shortened(row["inputs"]),
                    row["reason"],
                )
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        table.insert(1, "  ".join("-" * width for width in widths))
        integers = len([row for row in self.rows if row["format"] is not None])
        table.append(f"{integers} of {len(self.rows)} run on integers (kernels: {self.kernels}).")
        if self.others:
            others = ", ".join(f"{n} {name}" for name, n in sorted(self.others.items()))
            table.append(f"No products: {others}.")
        return "\n".join([*table, *self._normalization_lines(), *self._kept_lines()])

    def _normalization_lines(self) -> list[str]:
        rows = self.normalizations
        if not rows:
            return []
        native = len([row for row in rows if row["native"]])
        lines = [f"Batch norm: {native} of {len(rows)} on the native op."]
        groups: dict[tuple[bool, str], list[str]] = {}
        for row in rows:
            if row["reason"]:
                groups.setdefault((row["native"], row["reason"]), []).append(row["path"])
        for (is_native, reason), paths in groups.items():
            names = ", ".join(paths[:_MOST_NAMES])
            if len(paths) > _MOST_NAMES:
                names += f" and {len(paths) - _MOST_NAMES} more"
            what = "TensorFlow's statistics" if is_native else "Keras's own"
            lines.append(f"  {what} ({reason}): {names}")
        return lines

    def _kept_lines(self) -> list[str]:
        kept = self.kept
        sizes = {
            "int16 operands of products": kept["mantissas"],
            "float32 inputs of batch norm and ReLU": kept["floats"],
            "masks of residual ReLUs": kept["masks"],
        }
        parts = ", ".join(f"{_size(n)} of {what}" for what, n in sizes.items() if n)
        if not (parts or kept["unknown"]):
            return []
        line = f"Kept for the backward pass, per sample: {_size(sum(sizes.values()))}"
        if kept["unknown"]:
            plural = "s" if kept["unknown"] > 1 else ""
            line += f" and {kept['unknown']} tensor{plural} of unknown size"
        return [
            f"{line}.",
            *([f"  That is {parts}."] if parts else []),
            "  Not counted: what other layers keep (pooling, swish, layers in FP32).",
        ]


def describe(model: keras.Model, inputs: Any = None, *, input_shape: Any = None) -> Report:
    """Says which layers of a model run on integers, in which format, and why the others do not.

    Also what their inputs come from: which steps before them are fused with quantizing, and what
    stays float; and how much is kept for the backward pass.

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
        TypeError: If it is no Keras model; one of `tf_keras`, for instance.
        ValueError: If the inputs of the model are not known, or it cannot be called with them.
        RuntimeError: If the plugin is not installed.

    Example:

    >>> print(keras_dfp.describe(model))
    """
    check_model("describe", model)
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
    flow = Flow(products)
    rows, mantissas = _rows(model, products, flow)
    return Report(
        rows=rows,
        normalizations=_normalizations(products, flow),
        kept=_kept(mantissas, flow),
        others=dict(others),
        kernels=native.extension.isa(),
    )


def _symbolic_inputs(model, inputs, input_shape):
    """Returns the structure of KerasTensors that the model is called with."""
    if inputs is not None:
        return keras.tree.map_structure(symbolic, inputs)
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
    return keras.tree.map_shape_structure(keras.KerasTensor, shapes[0])


def _rows(model, products, flow) -> tuple[list[dict[str, Any]], list[int | None]]:
    """Returns the rows, and the bytes of each operand, None for an unknown size."""
    # A loop's body is traced more than once, each time in a graph of its own.
    counts = collections.Counter((id(p.layer), p.decision, p.operation, p.graph) for p in products)
    exempt = first_and_last(model)
    rows: dict[tuple, dict[str, Any]] = {}
    by_row: dict[tuple, list[recording.TracedProduct]] = {}
    for p in products:
        row = rows.setdefault((id(p.layer), p.decision), _row(p.layer, p.decision, exempt))
        by_row.setdefault((id(p.layer), p.decision), []).append(p)
        count = counts[id(p.layer), p.decision, p.operation, p.graph]
        row["operations"][p.operation] = max(count, row["operations"].get(p.operation, 0))
    seen, mantissas = set(), []
    for key, row in rows.items():
        found = _operands(by_row[key], products.graph, flow)
        row["inputs"] = tuple(
            dict.fromkeys(flow.origin(each, by_row[key][0].layer) for each in found)
        )
        if row["format"] is not None and "forward" not in row["products"]:
            row["inputs"] = ("float: forward in FP32",)
        sizes = []
        for each in found:
            # Mantissas in another order are others in memory.
            if (id(each.expanded), each.perm) not in seen:
                seen.add((id(each.expanded), each.perm))
                sizes.append(flow.mantissa_bytes(each))
        row["bytes"] = None if None in sizes else sum(sizes)
        mantissas += sizes
    return list(rows.values()), mantissas


def _operands(products, graph, flow):
    """Returns the operands of a row's products that are activations."""
    # Before a loop, Keras calls its body once to see what comes out.
    inside = [p for p in products if p.graph is not graph] or products
    return [each for p in inside for each in p.operands if flow.is_activation(each.x)]


def _normalizations(recorded, flow) -> list[dict[str, Any]]:
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    kept = set()
    for call in recorded.normalizations:
        layer, reason = call.layer, call.reason
        if not reason and not call.whole and flow.is_activation(call.mean):
            reason = "renorm" if getattr(layer, "renorm", False) else "a mask"
            reason = "synchronized" if layer.synchronized else reason
        row = rows.setdefault(
            (id(layer), call.reason),
            {
                "path": layer.path or layer.name,
                "native": not call.reason,
                "reason": reason,
                "bytes": 0,
            },
        )
        row["reason"] = row["reason"] or reason
        if row["native"] and id(call.x) not in kept:
            kept.add(id(call.x))
            size = flow.normalization_bytes(call.x)
            row["bytes"] = None if None in (size, row["bytes"]) else row["bytes"] + size
    return list(rows.values())


def _kept(mantissas, flow) -> dict[str, int]:
    sizes = {"mantissas": mantissas, "floats": flow.float_bytes(), "masks": flow.mask_bytes()}
    kept = {name: sum(n for n in found if n is not None) for name, found in sizes.items()}
    return {**kept, "unknown": sum(found.count(None) for found in sizes.values())}


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


def _shortened(inputs) -> str:
    """Returns the words for a layer's inputs as one, those of floats last."""
    floats = [words.removeprefix("float: ") for words in inputs if words.startswith("float: ")]
    words = [words for words in inputs if not words.startswith("float: ")]
    if floats:
        words.append(f"float: {', '.join(floats)}")
    text = "; ".join(words)
    return text if len(text) <= _INPUT_WIDTH else text[: _INPUT_WIDTH - 3] + "..."


def _size(n: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB"


def _runs_on(fmt: DFPFormat | None) -> str:
    if fmt is None:
        return "FP32"
    text = f"INT16 ({fmt.mantissa_bits} bits, {fmt.rounding}, {fmt.accumulation})"
    return text if fmt.products == PRODUCTS else f"{text}: only {', '.join(fmt.products)}"
