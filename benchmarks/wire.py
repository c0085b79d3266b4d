"""What several workers exchange, as a plot: bytes on the wire and milliseconds a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np

# Of Okabe and Ito's palette, which colour-blind people can tell apart; hatches differ too.
LOOKS = {
    "none": {"color": "0.6"},
    "float32": {"color": "#E69F00", "hatch": "//"},
    "dfp16": {"color": "#0072B2"},
}


def plot(document: dict, path: Path) -> None:
    """Draws two panels per run into a file: bytes, where they were counted, and milliseconds.

    Args:
        document: Of `workers`.
        path: The file; its suffix says in what format.
    """
    from matplotlib.figure import Figure

    runs = document["runs"]
    figure = Figure(figsize=(9, 3.6 * len(runs)), layout="constrained")
    for (left, right), run in zip(figure.subplots(len(runs), 2, squeeze=False), runs, strict=True):
        _panels(left, right, run)
    figure.savefig(path, dpi=110)


def _panels(left, right, run: dict) -> None:
    settings, rows = run["settings"], run["rows"]
    counted = settings["own_network"]
    several = [row for row in rows if row["workers"] > 1]
    _bars(left, several, lambda row: (row["bytes"] if counted else row["ring_bytes"]) / 1e3)
    if counted:
        x, y = _places(several), [row["ring_bytes"] / 1e3 for row in several]
        left.hlines(
            y, x - 0.18, x + 0.18, color="black", linestyle=":", label="the gradients' part"
        )
    left.set(ylabel="kB a step, of all workers together")
    what = "Bytes on the wire" if counted else "Bytes of gradients (not counted)"
    left.set_title(what, loc="left", weight="bold")
    _bars(right, rows, lambda row: row["step_ms"])
    middle = np.array([row["step_ms"] for row in rows])
    ends = np.array([[row["low_ms"] for row in rows], [row["high_ms"] for row in rows]])
    right.errorbar(
        _places(rows), middle, np.abs(ends - middle), color="black", linestyle="none", capsize=3
    )
    right.set(ylabel="ms a step; half of them within the whiskers")
    network = f"{settings['network']}, batch {settings['batch']}"
    right.set_title(f"Time: {network}", loc="left", weight="bold")
    for axes, shown in ((left, several), (right, rows)):
        counts = _counts(shown)
        axes.set_xticks(range(len(counts)), [f"{n} worker{'s' * (n > 1)}" for n in counts])
        axes.set_xlim(-0.6, max(len(counts), 1) - 0.4)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        # Above what is tallest.
        axes.set_ylim(0, 1.35 * axes.get_ylim()[1])
        axes.legend(frameon=False, loc="upper left", fontsize=8)


def _bars(axes, rows: list[dict], height) -> None:
    """Draws a bar for each row, with its height in it."""
    for exchange in dict.fromkeys(row["exchange"] for row in rows):
        mine = [row["exchange"] == exchange for row in rows]
        bars = axes.bar(
            _places(rows)[mine],
            [height(row) for row in rows if row["exchange"] == exchange],
            width=0.36,
            edgecolor="white",
            label="alone" if exchange == "none" else f"exchange: {exchange}",
            **LOOKS[exchange],
        )
        for bar in bars:
            axes.text(
                bar.get_x() + bar.get_width() / 2,
                0.04 * bar.get_height(),
                f"{bar.get_height():,.0f}",
                ha="center",
                va="bottom",
                fontsize=8,
                bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none"},
            )


def _counts(rows: list[dict]) -> list[int]:
    return list(dict.fromkeys(row["workers"] for row in rows))


def _places(rows: list[dict]) -> np.ndarray:
    """Returns where each row's bar stands: those of as many workers beside each other."""
    aside = {"none": 0.0, "float32": -0.19, "dfp16": 0.19}
    counts = _counts(rows)
    return np.array([counts.index(row["workers"]) + aside[row["exchange"]] for row in rows])
