"""Several runs from equal beginnings, and what they show: a table, a JSON file and a plot.

For each seed, all policies start from the same weights and see the same batches; so the difference
between two policies is paired, and what the seeds have in common cancels out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from keras_dfp import tables
from keras_dfp.files import read_json, shown, write_json, write_text, written_whole
from keras_dfp.training.errors import RunError
from keras_dfp.training.log import Row, check_rows, write_csv
from keras_dfp.training.run import Run
from keras_dfp.training.settings import Settings
from keras_dfp.training.sources import Source

# Points of a loss curve, each the mean of the steps between.
POINTS = 200
# Of a run's last epoch, what is compared in pairs.
COMPARED = ("loss", "test_loss", "test_top1")
# And what is shown beside it.
SHOWN = ("test_top5", "images_per_second")


@dataclasses.dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        policy: As for `policies.policy`.
        seed: Its seed.
        steps: Where the points of its loss curve are, `POINTS` at most.
        losses: The points: the mean training loss of the steps up to there from the point before,
            as long as it was a number.
        history: A row for every epoch.
        diverged: The step at which the loss was no longer a number.
    """

    policy: str
    seed: int
    steps: list[int]
    losses: list[float]
    history: list[Row]
    diverged: int | None

    def __post_init__(self) -> None:
        check_rows(self.history, (*COMPARED, *SHOWN))

    @classmethod
    def of(cls, run: Run) -> Result:
        progress = run.progress
        return cls(
            run.settings.policy,
            run.settings.seed,
            *curve([loss for loss in progress.losses if math.isfinite(loss)], run.steps),
            progress.history,
            progress.diverged,
        )


def start(
    settings: Settings, policy: str, seed: int, folder: Path, data: tuple[Source, Source]
) -> Run:
    """Returns one run of a comparison, to be trained.

    It lives in `folder/seed<seed>/<policy>`. A finished one is found finished there, one that was
    interrupted goes on from its checkpoint.
    """
    this = dataclasses.replace(settings, policy=policy, seed=seed)
    return Run(this, folder / f"seed{seed}" / policy.replace(":", "-"), data, resume=True)


def kept(
    folder: Path, settings: Settings, data: tuple[Source, Source]
) -> dict[tuple[str, int], Result]:
    """Returns what `results.json` in a folder holds, by policy and seed.

    So a study goes on from this file alone, also where its runs are not, or no longer.

    Args:
        folder: The study's.
        settings: The study's.
        data: `settings.find_data()`.

    Raises:
        RunError: If there is such a file, but of something else.
    """
    path = folder / "results.json"
    if not path.exists():
        return {}
    try:
        content = read_json(path)
        different = settings.differences(content, settings.facts(data), ("policy", "seed"))
        results = [
            tables.make(
                Result,
                {**each, "steps": each["losses"]["steps"], "losses": each["losses"]["means"]},
                "runs.",
                finite=False,
            )
            for each in content["runs"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{shown(path)} does not hold results of a comparison: {error!r}") from error
    if different:
        raise RunError(f"{shown(path)} holds the results of another study: {'; '.join(different)}.")
    # Means and bands need the same points of all.
    whole = [result for result in results if result.diverged is None]
    lengths = {(len(r.steps), len(r.losses), len(r.history)) for r in whole}
    if len(lengths) > 1 or any(min(each) < 1 or each[0] != each[1] for each in lengths):
        raise RunError(
            f"{shown(path)} does not hold results of a comparison: its curves and histories are "
            "not equally long."
        )
    return {(result.policy, result.seed): result for result in results}


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Returns a row for each policy: means over its seeds, and differences to the first policy.

    Accuracies are shares of 1. `loss` is that of the last epoch. For each of `COMPARED` there is
    the mean paired difference and the half width of its 95 % interval by Student's t:
    `loss_difference` and `loss_interval`, for instance; `None` where there are too few pairs.
    `curve_gap` is how far the mean loss curve is from the first policy's, on average over the
    steps, and `curve_spread` the first policy's own standard deviation between seeds, on the same
    average. Runs that diverged are counted, and left out of the means.
    """
    policies = list(dict.fromkeys(result.policy for result in results))
    whole = {(r.policy, r.seed): r for r in results if r.diverged is None}
    curves = {key: np.array(result.losses) for key, result in whole.items()}
    last = {key: result.history[-1] for key, result in whole.items()}

    def of(policy: str) -> dict[int, Row]:
        return {seed: row for (name, seed), row in last.items() if name == policy}

    rows = []
    for policy in policies:
        mine, first = of(policy), of(policies[0])
        means = {
            key: float(np.mean([row[key] for row in mine.values()])) if mine else None
            for key in (*COMPARED, *SHOWN)
        }
        top1 = [row["test_top1"] for row in mine.values()]
        shared = [seed for seed in mine if seed in first and policy != policies[0]]
        pairs = {key: [mine[s][key] - first[s][key] for s in shared] for key in COMPARED}
        gaps = [curves[policy, seed] - curves[policies[0], seed] for seed in shared]
        spread = [curves[policies[0], seed] for seed in first]
        rows.append(
            {
                "policy": policy,
                "runs": len(mine),
                "diverged": sum(r.policy == policy and r.diverged is not None for r in results),
                **means,
                "test_top1_std": float(np.std(top1, ddof=1)) if len(top1) > 1 else None,
                "pairs": len(shared),
                **{
                    f"{key}_difference": float(np.mean(values)) if values else None
                    for key, values in pairs.items()
                },
                **{f"{key}_interval": half_width(values) for key, values in pairs.items()},
                "curve_gap": float(np.abs(np.mean(gaps, axis=0)).mean()) if gaps else None,
                "curve_spread": float(np.std(spread, axis=0, ddof=1).mean())
                if len(spread) > 1
                else None,
            }
        )
    return rows


def half_width(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """Returns the half width of the t-interval of a mean; `None` for fewer than two values."""
    if len(values) < 2:
        return None
    quantile = stats.t.ppf((1 + confidence) / 2, len(values) - 1)
    return float(quantile * np.std(values, ddof=1) / math.sqrt(len(values)))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a summary as a table in Markdown."""

    def text(value, form="{:.4f}"):
        return "-" if value is None else form.format(value)

    def percent(value, spread):
        return text(value, "{:.2%}") + ("" if spread is None else f" ± {100 * spread:.2f}")

    def difference(row, key, scale=1, digits=4):
        mean, interval = row[f"{key}_difference"], row[f"{key}_interval"]
        if mean is None:
            return "-"
        return f"{scale * mean:+.{digits}f}" + (
            "" if interval is None else f" ± {scale * interval:.{digits}f}"
        )

    def gap(row):
        if row["curve_gap"] is None:
            return "-"
        return f"{row['curve_gap']:.4f} / {text(row['curve_spread'])}"

    to = f"to {rows[0]['policy']}"
    cells = [
        (
            "policy",
            "runs",
            "train loss",
            f"{to} ± 95 %",
            "test loss",
            f"{to} ± 95 %",
            "test top-1 ± std",
            f"{to}, points ± 95 %",
            "loss curve: gap / spread",
            "img/s",
        ),
        *(
            (
                row["policy"],
                f"{row['runs']}" + (f", {row['diverged']} diverged" if row["diverged"] else ""),
                text(row["loss"]),
                difference(row, "loss"),
                text(row["test_loss"]),
                difference(row, "test_loss"),
                percent(row["test_top1"], row["test_top1_std"]),
                difference(row, "test_top1", 100, 2),
                gap(row),
                text(row["images_per_second"], "{:.0f}"),
            )
            for row in rows
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        f"| {' | '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))} |"
        for row in cells
    ]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(lines)


def write(
    folder: Path, settings: Settings, data: tuple[Source, Source], results: Sequence[Result]
) -> str:
    """Writes `results.csv`, `results.md`, `results.json` and `curves.png`; returns the table.

    Args:
        folder: The study's.
        settings: The study's.
        data: `settings.find_data()`.
        results: All there are.
    """
    rows = summary(results)
    write_csv(folder / "results.csv", rows)
    shared = dataclasses.asdict(settings)
    for each in ("policy", "seed"):
        del shared[each]
    content = {
        "settings": shared,
        **settings.facts(data),
        "summary": rows,
        "runs": [
            {
                "policy": result.policy,
                "seed": result.seed,
                "diverged": result.diverged,
                "history": result.history,
                "losses": {"steps": result.steps, "means": result.losses},
            }
            for result in results
        ],
    }
    write_json(folder / "results.json", content)
    write_text(folder / "results.md", f"{table(rows)}\n")
    with written_whole(folder / "curves.png") as path:
        plot(results, path)
    return table(rows)


def curve(losses: Sequence[float], steps: int) -> tuple[list[int], list[float]]:
    """Returns the points of a loss curve, `POINTS` at most over a run of so many steps.

    A point is the last of some steps, and their mean.
    """
    window = math.ceil(steps / POINTS)
    starts = range(0, len(losses), window)
    return (
        [min(start + window, len(losses)) for start in starts],
        [round(float(np.mean(losses[start : start + window])), 5) for start in starts],
    )


def plot(results: Sequence[Result], path: Path) -> None:
    """Draws training loss and test accuracy: a line for a policy's mean, a band for its seeds.

    Of more than three policies only the first has its band. A run that diverged is a dotted line.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(11, 5), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    policies = list(dict.fromkeys(result.policy for result in results))
    for number, policy in enumerate(policies):
        color = f"C{number}"
        mine = [result for result in results if result.policy == policy]
        whole = [result for result in mine if result.diverged is None]
        for result in mine:
            if result.diverged is not None:
                loss.plot(result.steps, result.losses, color=color, linestyle=":")
        label = f"{policy} ({len(whole)} seed{'s' * (len(whole) != 1)}"
        label += f", {len(mine) - len(whole)} diverged)" if len(whole) < len(mine) else ")"
        loss.plot([], [], color=color, label=label)
        if not whole:
            continue
        # All curves of a policy have the same points.
        for axes, x, curves, marker in (
            (loss, whole[0].steps, [result.losses for result in whole], ""),
            (
                accuracy,
                range(1, 1 + len(whole[0].history)),
                [[row["test_top1"] for row in result.history] for result in whole],
                ".",
            ),
        ):
            low, mean, high = (f(curves, axis=0) for f in (np.min, np.mean, np.max))
            if len(x) == 1:
                # A band has no width here.
                axes.errorbar(number, mean, (mean - low, high - mean), color=color, fmt="o")
                continue
            axes.plot(x, mean, color=color, marker=marker)
            if number == 0 or len(policies) <= 3:
                axes.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
    loss.set(title="Training loss", xlabel="step", yscale="log")
    # A loss often stays within one power of ten.
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    accuracy.set(title="Test accuracy (top-1)", xticks=[])
    epochs = max(len(result.history) for result in results)
    if epochs > 1:
        accuracy.set(xlabel="epoch", xlim=(0.5, epochs + 0.5))
        accuracy.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    handles, labels = loss.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(policies)))
    figure.savefig(path, dpi=150)
