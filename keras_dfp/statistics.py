"""The numbers of training steps, by layer: when ops measure them, and the files they go to.

`callbacks.DFPStatistics` uses it in `fit`, `training.run` in its own loop. docs/observability.md
says what the numbers mean.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import importlib.util
import io
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_dfp import comparing
from keras_dfp.backend.calling import matches
from keras_dfp.backend.losses import paths_in_order, paths_of
from keras_dfp.files import check_file, shown, written_whole
from keras_dfp.native import extension

TABLE = "statistics.csv"
COLUMNS = ("step", "layer", "tensor", "quantity", "value")
# By what the native ops call them.
TENSORS = ("activation", "weight", "gradient")
# And those that rows may be about, in their order.
_TENSORS = (*TENSORS, comparing.OUTPUT)
# Of the forward product, the input gradient and the weight gradient: the tensor that rows name.
_TIMES = (("activation", "forward_ms"), ("gradient", "input_gradient_ms"),
          ("weight", "weight_gradient_ms"))  # fmt: skip


class NonFiniteError(ArithmeticError):
    """A tensor that was to be quantized holds NaN or infinity, and training was to stop then.

    Attributes:
        what: A `NonFinite`: the first such tensor of the step.
    """

    def __init__(self, what: NonFinite):
        super().__init__(str(what))
        self.what = what


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """Where NaN or infinity was first met.

    Attributes:
        layer: The path of the layer.
        tensor: `"activation"`, `"weight"` or `"gradient"` (that of the layer's output); of a loss
            that no layer on integers has seen, `"loss"`.
        step: The step of training, counted from 1.
        sample: The index along the tensor's first axis; of a weight 0. The samples of a batch, or
            what a dense layer makes of them: samples times positions.
        samples: How many there are.
    """

    layer: str
    tensor: str
    step: int
    sample: int
    samples: int

    def __str__(self) -> str:
        if self.tensor == "loss":
            return f"the loss is NaN or infinity (step {self.step})"
        what = {
            "activation": "an input of its forward pass",
            "weight": "its weight",
            "gradient": "the gradient of its output, in the backward pass,",
        }[self.tensor]
        where = "" if self.tensor == "weight" else f", sample {self.sample} of {self.samples}"
        return (
            f"layer '{self.layer}': {what} holds NaN or infinity "
            f"({self.tensor}, step {self.step}{where})"
        )


@dataclasses.dataclass
class Operand:
    """What quantizing did to a tensor of a layer, in one step; tensors add up.

    Attributes:
        nonzero: Elements that were not zero, of the groups that share an exponent and are finite.
        lost: Those of them that became zero.
        clamped: Those that were too large for their exponent.
        signal: The sum of the squares of the elements.
        noise: The sum of the squares of what rounding changed them by.
        nonfinite: Groups with NaN or infinity.
        exponents: How many groups have which exponent, of those that are not all zero.
    """

    nonzero: int = 0
    lost: int = 0
    clamped: int = 0
    signal: float = 0.0
    noise: float = 0.0
    nonfinite: int = 0
    exponents: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: Operand) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def quantities(self) -> dict[str, float]:
        """Returns what rows of the table say of it."""
        found: dict[str, float] = {}
        if self.exponents:
            found["exponent_least"] = min(self.exponents)
            found["exponent_median"] = _median(self.exponents)
            found["exponent_largest"] = max(self.exponents)
        if self.nonzero:
            found["lost"] = self.lost / self.nonzero
            found["clamped"] = self.clamped / self.nonzero
        if self.signal:
            found["snr_db"] = 10 * math.log10(self.signal / self.noise) if self.noise else math.inf
        found["nonfinite"] = self.nonfinite
        return found


def _median(counts: collections.Counter[int]) -> int:
    """Returns the lower median."""
    seen, half = 0, (sum(counts.values()) + 1) // 2
    for value in sorted(counts):
        seen += counts[value]
        if seen >= half:
            return value
    raise ValueError("of nothing")


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What was measured in a step.

    Attributes:
        step: The step, counted from 1.
        operands: By layer and tensor.
        values: Rows of the table: from layer, tensor and quantity to a value.
    """

    step: int
    operands: dict[tuple[str, str], Operand]
    values: dict[tuple[str, str, str], float]

    def worst(self) -> str:
        """Returns, in a few words, which tensor has the most noise; empty if none has any."""
        noise = {
            key: value for key, value in self.values.items()
            if key[2] == "snr_db" and math.isfinite(value)
        }  # fmt: skip
        if not noise:
            return ""
        layer, tensor, _ = worst = min(noise, key=lambda key: noise[key])
        return f"worst {layer} ({tensor} {noise[worst]:.0f} dB)"


class Statistics:
    """Takes the numbers of every so many steps, and writes them.

    Args:
        every: Of how many steps one is looked at; None for none, if only non-finite tensors are to
            be found.
        log_dir: Where `statistics.csv` and, in `statistics`, TensorBoard's files go; None for
            nowhere.
        layers: Names, paths or patterns of the layers to write about; None for all.
        compare: Names, paths or patterns of the layers to compare with float32.
        stop_on_nonfinite: Whether `after` raises when a tensor is not finite, instead of warning
            once.

    Attributes:
        latest: The `Numbers` of the last step that was looked at, or None.
    """

    def __init__(
        self,
        every: int | None,
        log_dir: str | os.PathLike[str] | None = None,
        layers: Sequence[str] | str | None = None,
        compare: Sequence[str] | str | None = None,
        stop_on_nonfinite: bool = False,
    ):
        if every is not None and (
            isinstance(every, bool) or not isinstance(every, int) or every < 1
        ):
            raise ValueError(f"every must be a number of steps, at least 1; received {every!r}.")
        self.every = every
        self.folder = None if log_dir is None else Path(log_dir)
        self.layers = None if layers is None else _patterns("layers", layers)
        self.comparison = None
        if compare is not None:
            self.comparison = comparing.Comparison(_patterns("compare", compare))
        self.stop_on_nonfinite = stop_on_nonfinite
        self.latest: Numbers | None = None
        self._seen: list[str] = []  # the layers of the last step looked at, chosen or not
        self._before = 0
        self._closely = self._warned = False
        self._writer = None

    def start(self, step: int) -> None:
        """Begins, or goes on, after so many steps.

        Rows of later steps, which a run that was killed has left, are dropped.

        Raises:
            ValueError: If the file in the way is no such table.
            OSError: If it cannot be written.
            ImportError: If TensorBoard, which writes its files, is not installed.
        """
        if self.folder is None:
            return
        if importlib.util.find_spec("tensorboard") is None:
            raise ImportError(
                "Statistics are written by TensorBoard too, which is not installed: pip install "
                "tensorboard. Or leave out log_dir, and read `latest`."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        table = self.folder / TABLE
        try:
            rows = [row for row in read_table(table) if row[0] <= step] if table.exists() else []
        except ValueError as error:
            raise ValueError(f"{error} Move it away, and another will be begun.") from error
        with written_whole(table) as path:
            path.write_text(_lines([COLUMNS, *rows]), encoding="utf-8")
        with self._writing():
            self._writer = tf.summary.create_file_writer(str(self._events))

    def before(self, step: int, steps: int = 1) -> None:
        """To be called after `step` steps, before the next `steps` run at once."""
        self._before = step
        self._closely = self.every is not None and (step + steps) // self.every > step // self.every
        if self._closely:
            extension.take_numbers()
            if self.comparison is not None:
                self.comparison.on.assign(True)
        comparing.start(self.comparison)
        extension.take_nonfinite()
        extension.look_at_numbers(self._closely, True)

    def after(self, step: int) -> None:
        """To be called after these, when `step` have run.

        Raises:
            NonFiniteError: If a tensor was not finite and that is to stop the training.
        """
        extension.look_at_numbers(False, False)
        comparing.start(None)
        if self._closely:
            self._take(step)
        first = extension.take_nonfinite()
        if first is not None and not (self._warned and not self.stop_on_nonfinite):
            self._nonfinite(step, *first)

    def worst(self) -> str:
        """Returns, in a few words, which tensor of the last step looked at has the most noise."""
        return "" if self.latest is None else self.latest.worst()

    def unmatched(self) -> str:
        """Says which names or patterns were of no layer in the last step looked at; or nothing."""
        asked = {"layers": self.layers}
        if self.comparison is not None:
            asked["compare"] = self.comparison.patterns
        said = {name: comparing.unmatched(given or (), self._seen) for name, given in asked.items()}
        return " ".join(f"{name}: {words}" for name, words in said.items() if words)

    def stop(self) -> None:
        """Ends it, whether or not the last step succeeded."""
        extension.look_at_numbers(False, False)
        comparing.start(None)
        if self.comparison is not None:
            self.comparison.on.assign(False)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _nonfinite(self, step: int, site: str, role: int, sample: int, samples: int) -> None:
        paths = paths_of(site)
        if not paths:
            return
        what = NonFinite(paths[0], TENSORS[role], step, sample, samples)
        if self.stop_on_nonfinite:
            raise NonFiniteError(what)
        self._warned = True
        warnings.warn(f"keras_dfp: {what}.", stacklevel=4)

    def _take(self, step: int) -> None:
        operands, products, dropped = extension.take_numbers()
        if dropped:
            warnings.warn(
                f"keras_dfp: statistics of step {step} lack {dropped} tensors or products: there "
                "was no room for more layers.",
                stacklevel=4,
            )
        found: dict[tuple[str, str], Operand] = {}
        values: dict[tuple[str, str, str], float] = collections.defaultdict(float)
        for site, role, _, nonzero, lost, clamped, signal, noise, nonfinite, exponents in operands:
            counts = collections.Counter(exponents)
            for path in self._chosen(site):
                operand = found.setdefault((path, TENSORS[role]), Operand())
                operand.add(Operand(nonzero, lost, clamped, signal, noise, nonfinite, counts))
        for (path, tensor), operand in found.items():
            for quantity, value in operand.quantities().items():
                values[path, tensor, quantity] = value
        for site, product, _, nanoseconds in products:
            for path in self._chosen(site):
                values[path, *_TIMES[product]] += nanoseconds / 1e6 / max(1, step - self._before)
        if self.comparison is not None:
            self.comparison.on.assign(False)
            for (path, tensor), value in self.comparison.take().items():
                values[path, tensor, "error"] = value
        sites = [entry[0] for entry in (*operands, *products)]
        order = {path: number for number, path in enumerate(paths_in_order(sites))}
        self._seen = list(order)
        ordered = sorted(values, key=lambda key: (order[key[0]], _TENSORS.index(key[1]), key[2]))
        self.latest = Numbers(step, found, {key: values[key] for key in ordered})
        self._write(self.latest)

    def _chosen(self, site: str) -> list[str]:
        paths = paths_of(site)
        if self.layers is None:
            return paths
        return [path for path in paths if any(matches(pattern, path) for pattern in self.layers)]

    def _write(self, numbers: Numbers) -> None:
        if self.folder is None or self._writer is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        rows = [(numbers.step, *key, _text(value)) for key, value in numbers.values.items()]
        # In one go: a process that is killed tears the last line at most.
        with open(self.folder / TABLE, "a", newline="", encoding="utf-8") as file:
            file.write(_lines(rows))
        # In one go, too: a summary op for each number would take longer than the step.
        scalars = [
            scalar_pb(f"{quantity}/{tensor}/{layer}", value)
            for (layer, tensor, quantity), value in numbers.values.items()
            if math.isfinite(value)
        ]
        histograms = [
            histogram_pb(f"exponents/{tensor}/{layer}", np.repeat(*_columns(operand.exponents)))
            for (layer, tensor), operand in numbers.operands.items()
            if operand.exponents
        ]
        summary = Summary(value=[value for each in scalars + histograms for value in each.value])
        with self._writing():
            with self._writer.as_default(numbers.step):
                tf.summary.experimental.write_raw_pb(summary.SerializeToString())
            self._writer.flush()

    @property
    def _events(self) -> Path:
        return (self.folder or Path()) / "statistics"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Makes what TensorFlow says when it cannot write what Python would."""
        try:
            yield
        except tf.errors.OpError as error:
            # Without its account of where in TensorFlow.
            what = error.message.split(" [Op:")[0].rpartition("}} ")[2]
            raise OSError(
                f"Cannot write TensorBoard's files to {shown(self._events)}: {what}."
            ) from error


def _columns(counts: collections.Counter[int]) -> tuple[list[int], list[int]]:
    return list(counts), list(counts.values())


def read_table(path: Path) -> Iterator[tuple[int, str, str, str, str]]:
    """Yields the rows of a `statistics.csv`; a last line that was torn is left out.

    Args:
        path: The file.

    Raises:
        ValueError: If it is no such table.
    """
    number = 1
    try:
        check_file(path)
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(_whole_lines(file), strict=True)
            header = next(reader, None)
            if header is not None and tuple(header) != COLUMNS:
                raise ValueError(f"its columns must be {','.join(COLUMNS)}; got {','.join(header)}")
            for row in reader:
                number = reader.line_num
                if len(row) != len(COLUMNS):
                    raise ValueError(f"there must be {len(COLUMNS)} values; got {len(row)}")
                float(row[4])
                yield int(row[0]), row[1], row[2], row[3], row[4]
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{shown(path)} is no table of statistics, or spoiled at line {number}: {error}."
        ) from error


def _whole_lines(file: Iterable[str]) -> Iterator[str]:
    for line in file:
        # The last line of a run that goes on, or was killed.
        if not line.endswith("\n"):
            return
        yield line


def _lines(rows: Iterable[Sequence]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _text(value: float) -> str:
    return f"{value:.6g}"


def _patterns(name: str, patterns: Sequence[str] | str) -> tuple[str, ...]:
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{name} must be names or patterns of layers; received {patterns!r}.")
    return patterns
