"""The roofline of a document: attained speed against arithmetic intensity."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keras_dfp.benchmarks import report


def plot(document: dict, path: Path) -> None:
    """Draws one panel per run into a file; a point per row, its area by its share of the time.

    The roofs are measured: products per second in registers, and the bandwidth of a copy. A
    point above the slanted roof has its operands in a cache.

    Args:
        document: Of `conv`, `depthwise` or `gemm`.
        path: The file; its suffix says in what format.
    """
    from matplotlib.figure import Figure

    runs = document["runs"]
    figure = Figure(figsize=(8, 5.5 * len(runs)), layout="constrained")
    for axes, run in zip(figure.subplots(len(runs), squeeze=False)[:, 0], runs, strict=True):
        _panel(axes, document["benchmark"], run)
    figure.savefig(path, dpi=150)


def _panel(axes, benchmark: str, run: dict) -> None:
    settings, machine, rows = run["settings"], run["machine"], run["rows"]
    peak, bandwidth = machine["peak_gmacs"], machine["copy_gbs"]
    intensities = [row["macs"] / row["bytes"] for row in rows]
    longest = max((row.get("count", 1) * row["dfp_ms"] for row in rows), default=1)
    for name in dict.fromkeys(row.get("pass", "product") for row in rows):
        points = [
            (x, report.gmacs(row), 120 * row.get("count", 1) * row["dfp_ms"] / longest + 8)
            for x, row in zip(intensities, rows, strict=True)
            if row.get("pass", "product") == name
        ]
        axes.scatter(*zip(*points, strict=True), alpha=0.7, label=name)
    x = np.geomspace(min([*intensities, 1]) / 2, max([*intensities, 10]) * 2)
    roof = np.minimum(peak, x * bandwidth)
    axes.plot(x, roof, color="black", linewidth=1, label="roof, measured")
    axes.annotate(
        f"peak {peak:.0f} GMAC/s", (x[-1], peak), (0, 4), textcoords="offset points", ha="right"
    )
    axes.annotate(
        f"copy {bandwidth:.0f} GB/s", (x[0], roof[0]), (4, 12), textcoords="offset points"
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="products per byte of operands and result",
        ylabel="GMAC/s",
        title=f"{settings.get('network', benchmark)}, {machine['isa']}, "
        f"{machine['threads']} thread(s)\n{machine['cpu']}",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")
