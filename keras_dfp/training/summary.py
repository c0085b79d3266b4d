"""Runs on one page: their curves, what low precision does to each layer, and what may help.

A run is read as it is, also while it goes on: all but `statistics.csv` is written whole, and of
that the last line may be torn.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import functools
import io
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from keras_dfp.audit import NOTABLE, advice, pattern, remedy
from keras_dfp.files import shown, written_whole
from keras_dfp.number import DFPFormat
from keras_dfp.policy import DFPPolicy
from keras_dfp.statistics import TABLE, TENSORS, read_table
from keras_dfp.training import run as runs_
from keras_dfp.training.comparison import curve
from keras_dfp.training.errors import RunError
from keras_dfp.training.log import Row
from keras_dfp.training.policies import policy
from keras_dfp.training.run import Facts, Progress
from keras_dfp.version import __version__

# What the comparison of a layer with float32 says of which tensor's rows.
ERRORS = {"output": "output", "activation": "input gradient", "weight": "weight gradient"}
PRODUCTS = {
    ("activation", "forward_ms"): "forward",
    ("gradient", "input_gradient_ms"): "input gradient",
    ("weight", "weight_gradient_ms"): "weight gradient",
}
# Of a table of so many steps, what is shown of now is the mean over its last part.
RECENT = 0.25
# So many layers are shown, the worst.
WORST = 10
# A picture of more layers shows the worst of them; of more steps, means.
MOST_LAYERS = 200
MOST_COLUMNS = 48
# Okabe and Ito's, which the colour-blind can tell apart; its yellow is too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES: tuple[Any, ...] = ("-", "--", ":", "-.")
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 160,
    # A layer may be called "$x".
    "text.parse_math": False,
}
# Of the names of pictures, so that those of an earlier report can be told from a user's files.
_PICTURE = re.compile(
    r"(loss|accuracy|throughput|memory|(exponents-[a-z]+|lost|noise|error|products)-\d+)\.png"
)


# ---- what there is -------------------------------------------------------------------------------


Series = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a `statistics.csv` holds.

    Attributes:
        layers: In the order of their first rows.
        steps: Those that were looked at.
        series: From layer, tensor and quantity to steps, ascending, and values.
    """

    layers: list[str]
    steps: np.ndarray
    series: dict[tuple[str, str, str], Series]

    @functools.cached_property
    def labels(self) -> dict[str, str]:
        """What layers are called in pictures."""
        return dict(zip(self.layers, _labels(self.layers), strict=True))

    def recent(self, layer: str, tensor: str, quantity: str) -> float | None:
        """Returns the mean over the last part of the steps; None where there is no number."""
        if (found := self.series.get((layer, tensor, quantity))) is None:
            return None
        steps, values = found
        first = self.steps[-math.ceil(RECENT * len(self.steps))]
        chosen = values[(steps >= first) & np.isfinite(values)]
        return float(chosen.mean()) if chosen.size else None


@dataclasses.dataclass(frozen=True)
class Worst:
    """A layer, and what is to be said of it.

    Attributes:
        layer: Its path.
        noise: The largest relative error: of a tensor by quantizing, or against float32.
        rows: For each tensor its name, SNR in dB, shares that were lost and clamped, all of them
            None where there is none.
        errors: Against float32, by name.
        nonfinite: The first step with NaN or infinity, and the tensor; None if there is none.
        remedy: As `audit.remedy` says.
        advice: The same in words.
    """

    layer: str
    noise: float
    rows: list[tuple[str, float | None, float | None, float | None]]
    errors: dict[str, float]
    nonfinite: tuple[int, str] | None
    remedy: str
    advice: str


@dataclasses.dataclass
class Told:
    """A run, as far as it has come.

    Attributes:
        number: Counted from 1.
        name: What distinguishes its folder from the others'.
        folder: Where it lives.
        facts: Its `run.json`; None for the `log_dir` of a callback.
        progress: Of its last checkpoint; None if there is none yet.
        statistics: None if there are none.
        worst: Its layers by their statistics, the worst first; those with no noise are left out.
    """

    number: int
    name: str
    folder: Path
    facts: Facts | None
    progress: Progress | None
    statistics: Statistics | None
    worst: list[Worst] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.statistics is not None:
            self.worst = _worst(self.statistics, self._policy.format)

    @property
    def label(self) -> str:
        return f"{self.number}  {_short(self.name, 36)}"

    @property
    def colour(self) -> str:
        return COLOURS[(self.number - 1) % len(COLOURS)]

    @property
    def ink(self) -> str:
        """What can be read on the colour."""
        return "#000" if self.colour in ("#CC79A7", "#E69F00", "#56B4E9") else "#fff"

    @property
    def line(self) -> Any:
        return LINES[(self.number - 1) // len(COLOURS) % len(LINES)]

    @property
    def steps(self) -> int:
        """Steps in all."""
        if self.facts is None:
            return 0
        this = self.facts.settings
        return this.steps or this.epochs * (self.facts.images[0] // this.batch_size)

    @property
    def state(self) -> str:
        if self.progress is None:
            return "" if self.facts is None else "no checkpoint yet"
        step, total = self.progress.step, self.steps
        if self.progress.diverged is not None:
            return f"the loss was no longer a number after step {step:,}"
        return "finished" if step >= total else f"step {step:,} of {total:,}"

    @property
    def history(self) -> list[Row]:
        """A row for every epoch."""
        return self.progress.history if self.progress else []

    @property
    def losses(self) -> list[float]:
        """The loss of every step, where it is a number."""
        losses = self.progress.losses if self.progress else []
        return [loss for loss in losses if math.isfinite(loss)]

    @property
    def last(self) -> Row:
        """The last epoch's row."""
        return self.history[-1] if self.history else {}

    @property
    def throughput(self) -> float | None:
        """Images per second: the median over epochs, or that of an unfinished first one."""
        if self.progress is None:
            return None
        rates = [row["images_per_second"] for row in self.progress.history]
        images, seconds = self.progress.sums[3:]
        return float(np.median(rates)) if rates else images / seconds if seconds else None

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen."""
        if self.facts is None:
            return {}
        found = dataclasses.asdict(self.facts.settings)
        return {key: value for key, value in found.items() if value not in (None, False)}

    @property
    def _policy(self) -> DFPPolicy:
        found = policy(self.facts.settings.policy) if self.facts is not None else None
        return found if isinstance(found, DFPPolicy) else DFPPolicy()

    @property
    def advised(self) -> list[Worst]:
        """The layers that something may help, the worst first."""
        return [each for each in self.worst if each.advice]

    @property
    def snippet(self) -> str:
        """Returns the policy that all of the advice amounts to, in Python; or nothing."""
        chosen: dict[str, list[str]] = {}
        for each in self.worst:
            chosen.setdefault(each.remedy, []).append(each.layer)
        this = self._policy
        if len(chosen.get("mantissa_bits", ())) > len(self.worst) / 2:
            # It is the policy's, not single layers'.
            del chosen["mantissa_bits"]
            this = DFPPolicy(**{**this.get_config(), "mantissa_bits": 16})
            if not chosen.keys() - {""}:
                return f"keras_dfp.{this!r}"
        base = repr(this).removesuffix(")")
        lines = []
        if "exponents" in chosen:
            lines.append("exponents='sample'")
            # The paper's recipe has no choice of them.
            base = "DFPPolicy('dfp16'"
        if "mantissa_bits" in chosen:
            inner = "".join(
                f"        {pattern(layer)!r}: {{'mantissa_bits': 16}},\n"
                for layer in chosen["mantissa_bits"]
            )
            lines.append(f"overrides={{\n{inner}    }}")
        if "exclude" in chosen:
            inner = "".join(f"        {pattern(layer)!r},\n" for layer in chosen["exclude"])
            lines.append(f"exclude=[\n{inner}    ]")
        if not lines:
            return ""
        return f"keras_dfp.{base},\n" + "".join(f"    {line},\n" for line in lines) + ")"


def read(folders: Sequence[Path]) -> list[Told]:
    """Returns what there is of runs.

    Args:
        folders: Of runs of `keras-dfp train`, of comparisons (all of their runs), or `log_dir` of a
            `DFPStatistics`.

    Raises:
        RunError: If a folder is none of these, or a file in it is spoiled.
        OSError: If one cannot be read.
    """
    found = list(dict.fromkeys(each for folder in folders for each in _expanded(folder)))
    return [
        _read(number, name, folder)
        for number, (name, folder) in enumerate(zip(_names(found), found, strict=True), 1)
    ]


def _expanded(folder: Path) -> list[Path]:
    if not folder.is_dir():
        what = "it is no folder" if os.path.lexists(folder) else "it does not exist"
        raise RunError(f"{shown(folder)} is not the folder of a run: {what}.")
    if any((folder / name).exists() for name in ("run.json", TABLE)):
        return [folder]
    inner = [each.parent for each in folder.glob("seed*/*/run.json")]
    if inner:
        # As they are compared: with float32.
        return sorted(inner, key=lambda run: (len(run.parent.name), run.parent.name,
                                              run.name != "float32", run.name))  # fmt: skip
    raise RunError(
        f"{shown(folder)} is not the folder of a run: there is neither run.json nor statistics.csv "
        "in it, nor runs of a comparison (seed1/float32)."
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns paths without what they have in common."""
    paths = [folder.absolute() for folder in folders]
    common = os.path.commonpath([path.parent for path in paths])
    return [shown(os.path.relpath(path, common)) for path in paths]


def _read(number: int, name: str, folder: Path) -> Told:
    facts = progress = statistics = None
    if (folder / "run.json").exists():
        facts = runs_.read(folder)
        progress = runs_.read_progress(folder)
    if (folder / TABLE).exists():
        statistics = read_statistics(folder / TABLE)
    return Told(number, name, folder, facts, progress, statistics)


def read_statistics(path: Path) -> Statistics | None:
    """Returns what a table of statistics holds; None if there is no whole line of numbers yet.

    Of several values for the same step, the last counts.

    Raises:
        RunError: If it is not such a table.
    """
    layers: dict[str, None] = {}
    values: dict[tuple[str, str, str], dict[int, float]] = {}
    try:
        for step, layer, tensor, quantity, value in read_table(path):
            layers.setdefault(layer)
            values.setdefault((layer, tensor, quantity), {})[step] = float(value)
    except ValueError as error:
        raise RunError(str(error)) from error
    if not values:
        return None
    series = {}
    for key, each in values.items():
        steps = np.array(sorted(each))
        series[key] = steps, np.array([each[step] for step in steps.tolist()])
    every = np.unique(np.concatenate([steps for steps, _ in series.values()]))
    return Statistics(list(layers), every, series)


def _worst(statistics: Statistics, fmt: DFPFormat) -> list[Worst]:
    found = [_judged(statistics, layer, fmt) for layer in statistics.layers]
    found = [each for each in found if each.noise or each.nonfinite]
    return sorted(found, key=lambda each: (each.nonfinite is None, -each.noise))


def _judged(statistics: Statistics, layer: str, fmt: DFPFormat) -> Worst:
    rows, noises, shares = [], [0.0], [0.0]
    first = None
    for tensor in TENSORS:
        snr, lost, clamped = (
            statistics.recent(layer, tensor, name) for name in ("snr_db", "lost", "clamped")
        )
        if (snr, lost, clamped) != (None, None, None):
            rows.append((tensor, snr, lost, clamped))
        noises.append(0.0 if snr is None else 10 ** (-snr / 20))
        shares.append(lost or 0.0)
        steps, counts = statistics.series.get((layer, tensor, "nonfinite"), _NOTHING)
        if (bad := steps[counts > 0]).size and (first is None or bad[0] < first[0]):
            first = int(bad[0]), tensor
    errors = {}
    for tensor, name in ERRORS.items():
        if (error := statistics.recent(layer, tensor, "error")) is not None:
            errors[name] = error
    noise = max(*noises, *errors.values())
    what = remedy(noise, max(shares), fmt)
    words = advice(layer, what)
    if first is not None:
        words = (
            "NaN or infinity: look here first. A lower learning rate, or the input"
            + "; " * bool(words)
            + words
        )
    return Worst(layer, noise, rows, errors, first, what, words)


_NOTHING: Series = (np.empty(0, int), np.empty(0))


# ---- pictures ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG.

    Attributes:
        name: Of its file.
        title: What it shows, of which run.
        png: The file.
        size: Width and height on the screen.
        run: The number of the only run that it shows; 0 if it shows all.
    """

    name: str
    title: str
    png: bytes
    size: tuple[int, int]
    run: int = 0

    @classmethod
    def of(cls, name: str, title: str, figure: Figure, run: Told | None = None) -> Picture:
        file = io.BytesIO()
        figure.savefig(file, format="png")
        width, height = figure.get_size_inches()
        title, number = (title, 0) if run is None else (f"{title}: {run.name}", run.number)
        name = f"{name}.png" if run is None else f"{name}-{number}.png"
        return cls(name, title, file.getvalue(), (round(96 * width), round(96 * height)), number)

    @property
    def tall(self) -> bool:
        """Whether it has names in small print, a row each."""
        return self.name.startswith(("lost", "noise", "products"))

    @property
    def url(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def pictures(runs: Sequence[Told]) -> dict[str, list[Picture]]:
    """Returns the pictures of each section, those that there are numbers for."""
    found: dict[str, list[Picture | None]] = {
        "curves": [_loss(runs), _accuracy(runs)],
        "exponents": [],
        "lost": [],
        "noise": [],
        "errors": [],
        "speed": [_throughput(runs), _memory(runs)],
        "products": [],
    }
    measured = [run for run in runs if run.statistics is not None]
    decibels = _range_of_noise(measured)
    for run in measured:
        found["exponents"] += [_exponents(run, tensor) for tensor in TENSORS]
        found["lost"].append(
            _heat_map(
                run,
                "lost",
                ScalarMappable(LogNorm(1e-4, 1, clip=True), "cividis"),
                "share lost to zero",
                {1e-4: "≤ 0.01 %", 1e-3: "0.1 %", 1e-2: "1 %", 1e-1: "10 %", 1: "100 %"},
            )
        )
        found["noise"].append(
            _heat_map(
                run,
                "snr_db",
                ScalarMappable(Normalize(*decibels, clip=True), "cividis_r"),
                "signal to noise of quantizing, dB",
                {n: f"{n:.0f}" for n in np.arange(decibels[0], decibels[1] + 1, 10)},
            )
        )
        found["errors"].append(_errors(run))
        found["products"].append(_products(run))
    return {key: [each for each in made if each is not None] for key, made in found.items()}


def _panel(height: float, width: float = 5.8) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _height(runs: Sequence[Told]) -> float:
    """Returns the height of a picture that leaves room for the names of runs."""
    return 3.3 + 0.17 * math.ceil(len(runs) / 2)


def _legend(
    figure: Figure, known: Sequence[Told], named: bool, extra: Sequence[tuple[str, dict]] = ()
) -> None:
    """Names runs below a picture, if there are several, and what kinds of lines mean."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=run.colour, linestyle=run.line, label=run.label)
        for run in known
        if named
    ]
    handles += [Line2D([], [], color="0.35", label=label, **style) for label, style in extra]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)


def _steps_axis(axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _log_axis(axes) -> None:
    """Makes an axis logarithmic, unless its numbers lie close together; labels some of it."""
    low, high = axes.dataLim.intervaly
    if not 0 < 4 * low < high:
        return
    axes.set_yscale("log")
    subs = (1, 2, 3, 5, 7) if high < 30 * low else (1, 3) if high < 1000 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _loss(runs: Sequence[Told]) -> Picture | None:
    known = [run for run in runs if run.losses]
    if not known:
        return None
    figure, axes = _panel(_height(known))
    for run in known:
        steps, means = curve(run.losses, max(run.steps, len(run.losses)))
        axes.plot(steps, means, run.line, color=run.colour, lw=1.2, marker="." * (len(steps) == 1))
        axes.plot(
            [row["step"] for row in run.history],
            [row["test_loss"] for row in run.history],
            "o",
            color=run.colour,
            ms=4,
            mfc="white",
        )
    axes.set_title("Loss")
    _log_axis(axes)
    _steps_axis(axes)
    _legend(
        figure,
        known,
        len(runs) > 1,
        [("training", {}), ("test", {"linestyle": "", "marker": "o", "ms": 4, "mfc": "white"})],
    )
    return Picture.of("loss", "Loss over the steps", figure)


def _of_epochs(
    runs: Sequence[Told],
    draw: Callable[[Any, Told, list], None],
    key: str,
    name: str,
    title: str,
    extra: Sequence[tuple[str, dict]] = (),
    from_zero: bool = False,
) -> Picture | None:
    """Draws what is known of epochs, over the steps."""
    known = [run for run in runs if key in run.last]
    if not known:
        return None
    figure, axes = _panel(_height(known))
    for run in known:
        draw(axes, run, [row["step"] for row in run.history if key in row])
    axes.set_title(title)
    axes.margins(y=0.15)
    axes.set_xlim(left=0)
    if from_zero:
        axes.set_ylim(bottom=0)
    _steps_axis(axes)
    _legend(figure, known, len(runs) > 1, extra)
    return Picture.of(name, title, figure)


def _accuracy(runs: Sequence[Told]) -> Picture | None:
    def draw(axes, run, steps):
        history = run.history
        top1 = [100 * row["test_top1"] for row in history]
        axes.plot(steps, top1, run.line, color=run.colour, marker="o", ms=4, mfc="white")
        axes.plot(steps, [100 * row["top1"] for row in history], "x", color=run.colour, ms=4)

    return _of_epochs(
        runs,
        draw,
        "test_top1",
        "accuracy",
        "Top-1 accuracy, %",
        [("training", {"linestyle": "", "marker": "x", "ms": 4}),
         ("test", {"marker": "o", "ms": 4, "mfc": "white"})],
    )  # fmt: skip


def _throughput(runs: Sequence[Told]) -> Picture | None:
    def draw(axes, run, steps):
        rates = [row["images_per_second"] for row in run.history]
        axes.plot(steps, rates, run.line, color=run.colour, marker="o", ms=4)

    title = "Throughput of training, images per second"
    return _of_epochs(runs, draw, "images_per_second", "throughput", title, from_zero=True)


def _memory(runs: Sequence[Told]) -> Picture | None:
    def draw(axes, run, steps):
        peaks = [row["peak_memory_mb"] for row in run.history if "peak_memory_mb" in row]
        axes.plot(steps, peaks, run.line, color=run.colour, marker="o", ms=4)

    title = "Peak memory of the process so far, MB"
    return _of_epochs(runs, draw, "peak_memory_mb", "memory", title, from_zero=True)


def _exponents(run: Told, tensor: str) -> Picture | None:
    assert run.statistics is not None
    series = run.statistics.series
    layers = [each for each in run.statistics.layers if (each, tensor, "exponent_median") in series]
    if not layers:
        return None
    figure, axes = _panel(2.7, 4.4)
    steps = run.statistics.steps
    low = _grid(run.statistics, layers, tensor, "exponent_least")
    high = _grid(run.statistics, layers, tensor, "exponent_largest")
    with _quiet():
        low, high = np.nanmin(low, axis=0), np.nanmax(high, axis=0)
    if len(steps) > 1:
        axes.fill_between(steps, low, high, color="0.85", lw=0)
    else:
        axes.vlines(steps, low, high, color="0.85", lw=6)
    colours = ScalarMappable(Normalize(0, max(1, len(layers) - 1)), "viridis")
    for depth, layer in enumerate(layers):
        x, values = series[layer, tensor, "exponent_median"]
        alone = "." * (len(x) == 1)
        axes.plot(
            x, values, color=colours.to_rgba(np.array(depth)), lw=1.1, alpha=0.9, marker=alone
        )
    axes.set(title=f"{tensor.capitalize()}: exponent e", ylabel="values are q · 2ᵉ")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    _steps_axis(axes)
    if len(layers) > 1:
        bar = figure.colorbar(colours, ax=axes, pad=0.02, ticks=[0, len(layers) - 1], aspect=25)
        bar.set_ticks([0, len(layers) - 1], labels=["first\nlayer", f"layer\n{len(layers)}"])
        bar.outline.set_visible(False)
    return Picture.of(
        f"exponents-{tensor}", f"Exponents of each layer's {tensor} over the steps", figure, run
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Where nothing is known of a step, NumPy would warn."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Mean of empty|All-NaN)", RuntimeWarning)
        yield


def _grid(statistics: Statistics, layers: Sequence[str], tensor: str, quantity: str) -> np.ndarray:
    """Returns a row for each layer, a column for each step; NaN where there is no number."""
    found = np.full((len(layers), len(statistics.steps)), np.nan)
    for row, layer in zip(found, layers, strict=True):
        steps, values = statistics.series.get((layer, tensor, quantity), _NOTHING)
        row[np.searchsorted(statistics.steps, steps)] = values
    return found


def _range_of_noise(runs: Sequence[Told]) -> tuple[float, float]:
    """Returns tens of dB around the ratios of all runs, so that their colours mean the same."""
    ratios = [
        values[np.isfinite(values)]
        for run in runs
        if run.statistics is not None
        for (_, _, quantity), (_, values) in run.statistics.series.items()
        if quantity == "snr_db"
    ]
    every = np.concatenate([[], *ratios])
    if not every.size:
        return 0.0, 10.0
    low = max(0, 10 * math.floor(every.min() / 10))
    return float(low), float(max(low + 10, min(100, 10 * math.ceil(every.max() / 10))))


def _heat_map(
    run: Told, quantity: str, colours: ScalarMappable, title: str, ticks: dict[float, str]
) -> Picture | None:
    """Draws a quantity of all tensors: a row for each layer, steps from left to right."""
    statistics = run.statistics
    assert statistics is not None
    layers = [
        layer
        for layer in statistics.layers
        if any((layer, tensor, quantity) in statistics.series for tensor in TENSORS)
    ]
    if not layers:
        return None
    grids = np.array([_grid(statistics, layers, tensor, quantity) for tensor in TENSORS])
    # Nothing was rounded: as good as it gets.
    grids[np.isposinf(grids)] = max(ticks)
    if len(layers) > MOST_LAYERS:
        with _quiet():
            means = np.nanmean(grids, axis=2)
            bad = np.nanmin(means, axis=0) if quantity == "snr_db" else -np.nanmax(means, axis=0)
        worst = np.sort(np.argsort(bad)[:MOST_LAYERS])
        layers, grids = [layers[i] for i in worst], grids[:, worst]
    parts = np.array_split(
        np.arange(len(statistics.steps)), min(MOST_COLUMNS, len(statistics.steps))
    )
    with _quiet():
        grids = np.stack([np.nanmean(grids[:, :, part], axis=2) for part in parts], axis=2)

    labels, size = [statistics.labels[layer] for layer in layers], 7
    left = 0.15 + max(_width(label, size) for label in sorted(labels, key=len)[-3:])
    width, row, top, bottom, gap = 5.8, 0.135, 0.85, 0.5, 0.1
    height = top + row * len(layers) + bottom
    figure = Figure(figsize=(width, height))
    each = (width - left - 0.15 - 2 * gap) / 3

    def add_axes(x, y, across, up):
        return figure.add_axes((x / width, y / height, across / width, up / height))

    for number, (tensor, grid) in enumerate(zip(TENSORS, grids, strict=True)):
        axes = add_axes(left + number * (each + gap), bottom, each, row * len(layers))
        # Hatched where there are no numbers.
        axes.patch.set(facecolor="white", edgecolor="0.8", hatch="/////", lw=0)
        shares = np.ma.masked_invalid(grid)
        if quantity == "lost":
            shares = np.ma.maximum(shares, min(ticks))
        axes.pcolormesh(shares, norm=colours.norm, cmap=colours.cmap)
        axes.set_title(tensor, fontsize=8, loc="left", pad=3)
        axes.invert_yaxis()
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_yticks(np.arange(len(layers)) + 0.5, labels if number == 0 else [], fontsize=size)
        axes.tick_params(length=0)
        axes.set_xticks([])
        y = -0.12 / (row * len(layers))
        style = {"transform": axes.transAxes, "fontsize": 7, "va": "center"}
        axes.text(0, y, _count(statistics.steps[0]), ha="left", **style)
        if len(statistics.steps) > 1:
            axes.text(1, y, _count(statistics.steps[-1]), ha="right", **style)
    figure.text((left + (width - left - 0.15) / 2) / width, 0.15 / height, "step", ha="center")
    axes = add_axes(left, height - 0.36, width - left - 0.35, 0.1)
    bar = figure.colorbar(colours, cax=axes, orientation="horizontal")
    bar.set_ticks(list(ticks), labels=list(ticks.values()), fontsize=7)
    bar.ax.tick_params(length=2, pad=1)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.set_title(title[0].upper() + title[1:], fontsize=9, loc="left", pad=4)
    name = "lost" if quantity == "lost" else "noise"
    return Picture.of(name, f"{title} of each layer", figure, run)


def _errors(run: Told) -> Picture | None:
    """Draws errors against float32 of the layers that are compared, the worst few."""
    statistics = run.statistics
    assert statistics is not None
    compared = {layer for layer, _, quantity in statistics.series if quantity == "error"}
    if not compared:
        return None

    def worst(layer):
        return max(statistics.recent(layer, tensor, "error") or 0.0 for tensor in ERRORS)

    layers = sorted(compared, key=worst, reverse=True)[: len(COLOURS)]
    figure = Figure(figsize=(5.8, 5.6), layout="constrained")
    panels = figure.subplots(len(ERRORS), sharex=True)
    for axes, (tensor, name) in zip(panels, ERRORS.items(), strict=True):
        for colour, layer in zip(COLOURS, layers, strict=False):
            steps, errors = statistics.series.get((layer, tensor, "error"), _NOTHING)
            kept = errors > 0
            axes.plot(steps[kept], 100 * errors[kept], ".-", color=colour, ms=4)
        axes.axhline(100 * NOTABLE, color="0.4", linestyle=":", lw=1)
        axes.set_title(f"{name}: error against float32, %".capitalize())
        _log_axis(axes)
    _steps_axis(panels[-1])
    lines = panels[0].get_lines()[: len(layers)]
    labels = [statistics.labels[layer] for layer in layers]
    figure.legend(lines, labels, loc="outside lower center", ncols=2, fontsize=8)
    return Picture.of("error", "Errors of layers against float32", figure, run)


def _products(run: Told) -> Picture | None:
    statistics = run.statistics
    assert statistics is not None
    times = {
        layer: [statistics.recent(layer, *key) or 0.0 for key in PRODUCTS]
        for layer in statistics.layers
    }
    layers = sorted(
        (each for each in times if sum(times[each])), key=lambda each: -sum(times[each])
    )
    if not layers:
        return None
    every, layers = layers, layers[:15]
    figure, axes = _panel(1.2 + 0.2 * len(layers))
    left = np.zeros(len(layers))
    for number, name in enumerate(PRODUCTS.values()):
        values = np.array([times[layer][number] for layer in layers])
        axes.barh(np.arange(len(layers)), values, left=left, color=COLOURS[number], label=name)
        left += values
    labels = [statistics.labels[layer] for layer in layers]
    axes.set_yticks(np.arange(len(layers)), labels, fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    title = "Time of the products of a step, ms"
    if len(layers) < len(every):
        share = sum(sum(times[each]) for each in layers) / sum(map(sum, times.values()))
        title += f" (the longest {len(layers)} of {len(every)}: {share:.0%} of all)"
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return Picture.of("products", "Time of each layer's products", figure, run)


def _count(step: int) -> str:
    return EngFormatter(sep="", places=None)(int(step))


def _width(text: str, size: float) -> float:
    """Returns the width of a text in inches."""
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, size=1, prop=FontProperties()).get_extents().width * size / 72


def _short(text: str, most: int) -> str:
    """Returns a text with its middle left out if it is too long: ends tell layers apart."""
    if len(text) <= most:
        return text
    head = most // 3
    return f"{text[:head]}…{text[head + 1 - most :]}"


def _labels(layers: Sequence[str]) -> list[str]:
    """Returns names for a picture, not too long, each once: what tells a path from the others."""
    most = 34
    paths = [shown(layer).split("/") for layer in layers]
    if len(paths) > 1:
        same = [len(set(parts)) == 1 for parts in zip(*paths, strict=False)]
        if len(set(map(len, paths))) > 1:
            # Of paths of different depth, only what they begin with.
            same = same[: (*same, False).index(False)]
        same += [False] * max(map(len, paths))
        paths = [
            [part for part, shared in zip(path, same, strict=False) if not shared] or path[-1:]
            for path in paths
        ]
    texts = []
    for path in paths:
        if len("/".join(path)) > most:
            path = [_short(part, max(6, (most + 1) // len(path) - 1)) for part in path]
        texts.append(_short("/".join(path), most))
    if len(set(texts)) < len(texts):
        texts = [f"{number} {_short(text, most - 4)}" for number, text in enumerate(texts, 1)]
    return texts


# ---- the page ------------------------------------------------------------------------------------


def write(runs: Sequence[Told], path: Path) -> Path:
    """Writes the page, and its pictures into a folder beside it.

    Args:
        runs: What `read` returns.
        path: The HTML file.

    Returns:
        The folder: `report-pictures` for `report.html`.

    Raises:
        OSError: If a file cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        sections = pictures(runs)
    text = page(runs, sections)
    # Not without the ending alone: it may be that of a run.
    folder = path.with_name(f"{path.stem}-pictures")
    made = {picture.name: picture for section in sections.values() for picture in section}
    if made:
        folder.mkdir(exist_ok=True)
    for name, picture in made.items():
        with written_whole(folder / name) as temporary:
            temporary.write_bytes(picture.png)
    for old in folder.glob("*.png"):
        # Of an earlier report, of more runs.
        if old.name not in made and _PICTURE.fullmatch(old.name):
            old.unlink()
    with written_whole(path) as temporary:
        # UTF-8, as the page says, whatever the locale; paths may hold what has no characters.
        temporary.write_bytes(text.encode(errors="backslashreplace"))
    return folder


def page(runs: Sequence[Told], sections: dict[str, list[Picture]]) -> str:
    """Returns the page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    return environment.get_template("summary.html").render(
        runs=runs,
        sections=sections,
        most=WORST,
        notable=-20 * math.log10(NOTABLE),
        version=__version__,
        now=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
