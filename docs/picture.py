"""Draws README's picture from what was measured: `python docs/picture.py` writes docs/picture.png.

Speed is the table "Whole training steps" of performance.md; accuracy, the study of ResNet-20 in
accuracy/resnet20.
"""

import json
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

DOCS = Path(__file__).parent
# Of Okabe and Ito's palette, which colour-blind people can tell apart; marks and dashes differ too.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "0.25"


def speeds() -> list[tuple[str, float, float | None]]:
    """Returns of each network its name, and how fast dfp16 and mixed_bfloat16 are, in float32s."""
    page = (DOCS / "performance.md").read_text()
    section = page.partition("## Whole training steps")[2].partition("Where the time goes")[0]
    lines = [line for line in section.splitlines() if line.startswith("|") and "**" in line]
    rows = [re.split(r" *\| *", line.strip("| ")) for line in lines]
    named = [(re.split(", batch| 784", row[0])[0], row[3].strip("*"), row[4]) for row in rows]
    return [(name, float(ours), float(other) if other else None) for name, ours, other in named]


def accuracies(policy: str) -> np.ndarray:
    """Returns the test accuracy in per cent of each run after each epoch."""
    results = json.loads((DOCS / "accuracy" / "resnet20" / "results.json").read_text())
    runs = [run["history"] for run in results["runs"] if run["policy"] == policy]
    return 100 * np.array([[epoch["test_top1"] for epoch in run] for run in runs])


figure = Figure(figsize=(10, 4.2), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])

rows = sorted(speeds(), key=lambda row: row[1])
names, ours, others = zip(*rows, strict=True)
where = np.arange(len(rows))
left.barh(where, ours, color=BLUE, height=0.62, label="dfp16")
left.plot(
    [np.nan if other is None else other for other in others],
    where,
    linestyle="none",
    marker="D",
    color=ORANGE,
    markeredgecolor="black",
    label="mixed_bfloat16 (where measured)",
)
left.axvline(1, color=GREY, linestyle="--", label="float32")
for y, speed in zip(where, ours, strict=True):
    # Where no marker ever is.
    left.text(0.04, y, f"{speed:.2f}x", va="center", color="white", weight="bold", fontsize=9)
left.set_yticks(where, names)
left.set(xlim=(0, 2.3), xlabel="steps per second, float32 = 1 (higher is better)")
left.set_title("Speed: 2 cores with AVX-512-VNNI", loc="left", weight="bold")
left.legend(loc="upper center", bbox_to_anchor=(0.4, -0.13), ncols=3, frameon=False)

for policy, color, style, marker in (("float32", GREY, "--", "s"), ("dfp16", BLUE, "-", "o")):
    runs = accuracies(policy)
    epochs = np.arange(1, runs.shape[1] + 1)
    right.fill_between(epochs, runs.min(0), runs.max(0), color=color, alpha=0.15, lw=0)
    label = f"{policy}: {runs[:, -1].mean():.2f} %"
    right.plot(epochs, runs.mean(0), style, color=color, marker=marker, label=label)
right.set(xlabel="epoch", ylabel="CIFAR-10 test accuracy, %")
title = f"Accuracy: ResNet-20, {len(runs)} seeds"
right.set_title(title, loc="left", weight="bold")
right.legend(loc="lower right", title="mean at the end")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if axes is left else "y", alpha=0.3)
    axes.set_axisbelow(True)

figure.savefig(DOCS / "picture.png", dpi=110, metadata={"Software": None})
