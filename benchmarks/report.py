"""A document as tables: row by row in a terminal, or as a whole in Markdown.

Nothing is measured here; ratios, rates and totals are computed from the milliseconds of the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from keras_dfp.benchmarks.machine import quartiles
from keras_dfp.benchmarks.products import PASSES
from keras_dfp.benchmarks.run import OWN_NETWORK

Row = dict
SHORT = {"float32": "FP32", "bfloat16": "BF16"}


class Column(NamedTuple):
    """A column: its title, the text of its cell in a row, and its width; text is left-aligned."""

    title: str
    cell: Callable[[Row], str]
    width: int = 9
    text: bool = False


class Table(NamedTuple):
    """A table; without rows its title says it all."""

    title: str
    columns: list[Column]
    rows: list[Row]


# ---- what the columns are ------------------------------------------------------------------------


def columns(benchmark: str, run: dict) -> list[Column]:
    """Returns the columns of a run's rows."""
    settings, machine = run["settings"], run["machine"]
    if benchmark == "quantize":
        return [
            Column("elements", lambda row: f"{row['elements']}", 12),
            Column("in groups of", lambda row: f"{row['group']}", 14),
            Column("  way", lambda row: f"  {row['way']}", 14, text=True),
            _ms("ms", "dfp_ms"),
            *_memory(machine),
        ]
    if benchmark == "small":
        return [
            Column("product", lambda row: row["product"], 26, text=True),
            Column("mode", lambda row: row["mode"], 7, text=True),
            Column("us", lambda row: f"{row['dfp_us']:.1f}"),
            Column("FP32 us", lambda row: f"{row['float32_us']:.1f}"),
            Column("more", lambda row: f"{row['dfp_us'] - row['float32_us']:+.1f}"),
            Column("quantize us", lambda row: f"{row['quantize_us']:.1f}", 13),
        ]
    if benchmark == "step":
        first = run["rows"][0]
        return [
            Column("policy", lambda row: row["policy"], 16, text=True),
            _ms("ms a step", "step_ms", 11),
            Column("samples/s", lambda row: f"{row['images_per_s']:.2f}", 11),
            _against(first, lambda row: f"{_of_rounds(first, row)[1]:.2f}"),
            Column("half within", lambda row: _range(*_of_rounds(first, row)[::2]), 13),
            Column("peak MB", lambda row: f"{row['peak_memory_mb']:.0f}"),
            _against(first, lambda row: f"{row['peak_memory_mb'] / first['peak_memory_mb']:.2f}"),
        ]
    if benchmark == "pipeline":
        return [
            Column("network", lambda row: row["network"], 16, text=True),
            Column("kB an image", lambda row: f"{row['image_kb']:.0f}", 12),
            Column("images/s", lambda row: f"{row['images_per_s']:.0f}", 10),
            Column("CPU ms an image", lambda row: f"{row['cpu_ms']:.2f}", 17),
        ]
    if benchmark == "workers":
        return [
            Column("workers", lambda row: f"{row['workers']}"),
            Column("  exchange", lambda row: f"  {row['exchange']}", 12, text=True),
            _ms("ms a step", "step_ms", 11),
            Column("half within", lambda row: _range(row["low_ms"], row["high_ms"]), 15),
            Column("steps/s", lambda row: f"{1e3 / row['step_ms']:.1f}"),
            Column("bytes a step", lambda row: _whole(row["bytes"]), 14),
            Column("of a ring", lambda row: _whole(row["ring_bytes"]), 14),
        ]
    if benchmark == "gemm":
        label = [Column("M x N x K", lambda row: _size(row), 20, text=True)]
    else:
        label = [
            Column("layer", lambda row: row["layer"], 34, text=True),
            Column("n", lambda row: str(row["count"]), 3),
            Column("  pass", lambda row: f"  {row['pass']}", 18, text=True),
        ]
    speed = _memory(machine) if benchmark == "depthwise" else _arithmetic(machine)
    result = [*label, _ms("ms", "dfp_ms"), *speed]
    for name in settings["against"]:
        result += [_ms(f"{SHORT[name]} ms", f"{name}_ms"), Column("ratio", _ratio(name), 7)]
    result.append(_ms("quantize ms", "quantize_ms", 13))
    for name in settings["against"]:
        title = "ratio with" if name == "float32" else f"{SHORT[name]} with"
        result.append(Column(title, _ratio(name, quantize=True), 12))
    return result


def _ms(title: str, key: str, width: int = 9) -> Column:
    return Column(title, lambda row: f"{row[key]:.2f}", width)


def _range(low: float, high: float) -> str:
    return f"{low:.2f}-{high:.2f}"


def _whole(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"


def _arithmetic(machine: dict) -> list[Column]:
    return [
        Column("GMAC/s", lambda row: f"{gmacs(row):.0f}", 8),
        Column("of peak", lambda row: f"{gmacs(row) / machine['peak_gmacs']:.0%}"),
    ]


def _memory(machine: dict) -> list[Column]:
    return [
        Column("GB/s", lambda row: f"{gbs(row):.1f}", 8),
        Column("of copy", lambda row: f"{gbs(row) / machine['copy_gbs']:.0%}"),
    ]


def _against(first: Row, cell: Callable[[Row], str]) -> Column:
    title = f"x {first['policy']}"
    return Column(title, cell, len(title) + 2)


def _of_rounds(first: Row, row: Row) -> tuple[float, float, float]:
    """Returns the quartiles of how many times faster than the first policy's a round was."""
    pairs = zip(first["rounds_ms"], row["rounds_ms"], strict=True)
    return quartiles([base / mine for base, mine in pairs])


def _ratio(name: str, quantize: bool = False) -> Callable[[Row], str]:
    return lambda row: f"{ratio(row, name, quantize):.2f}"


def _size(row: Row) -> str:
    return f"{row['m']} x {row['n']} x {row['k']}"


def gmacs(row: Row) -> float:
    """Returns 10**9 products per second."""
    return row["macs"] / row["dfp_ms"] / 1e6


def gbs(row: Row) -> float:
    """Returns 10**9 bytes per second, read and written."""
    return row["bytes"] / row["dfp_ms"] / 1e6


def ratio(row: Row, name: str, quantize: bool = False) -> float:
    """Returns how many times faster than TensorFlow's dtype `name` keras-dfp is."""
    return row[f"{name}_ms"] / (row["dfp_ms"] + (row["quantize_ms"] if quantize else 0.0))


# ---- what follows from a run's rows --------------------------------------------------------------


def title(benchmark: str, run: dict) -> str:
    """Returns what was measured, and on what machine."""
    settings, machine = run["settings"], run["machine"]
    parts = [benchmark]
    if "network" in settings:
        parts = [f"{benchmark}: {settings['network']}, batch {settings['batch']}"]
        if size := settings["image_size"]:
            parts[0] += f", {size}x{size} images"
    parts.append(f"median of {settings['repeats']}")
    held = machine["onednn_max_cpu_isa"]
    parts.append(
        f"{machine['cpu']}, {machine['threads']} thread(s), {machine['isa']}; TensorFlow "
        f"{machine['tensorflow']} (oneDNN {'held to ' + held if held else 'as it chooses'}), "
        f"Keras {machine['keras']}, keras-dfp {machine['keras_dfp']}"
    )
    if "peak_gmacs" in machine:
        parts.append(
            f"measured peak {machine['peak_gmacs']:.0f} GMAC/s, copy {machine['copy_gbs']:.1f} GB/s"
        )
    return "; ".join(parts)


def total(rows: list[Row]) -> Row:
    """Returns the sum of the rows of layers, each as often as the layer occurs."""
    keys = [key for key in rows[0] if key in ("macs", "bytes") or key.endswith("_ms")]
    return {key: sum(row["count"] * row[key] for row in rows) for key in keys}


def _is_of(name: str, row: Row) -> bool:
    return row["pass"] == name


def totals(run: dict) -> list[Row]:
    """Returns the totals of a network's layers: of each pass, of all, and of all but those in
    groups, where TensorFlow is so slow that they would decide about the network."""
    parts: dict[tuple[str, str], Callable[[Row], bool]] = {}
    for name in PASSES:
        parts["total", name] = functools.partial(_is_of, name)
    parts["total", "all"] = lambda row: True
    if any(row["kind"] == "grouped" for row in run["rows"]):
        parts["total without groups", "all"] = lambda row: row["kind"] != "grouped"
    result = []
    for (label, name), wanted in parts.items():
        if rows := [row for row in run["rows"] if wanted(row)]:
            result.append({"layer": label, "count": "", "pass": name, **total(rows)})
    return result


def summaries(benchmark: str, run: dict) -> Iterator[Table]:
    """Yields the tables that follow from a run's rows."""
    if not run["rows"]:
        return
    shown = columns(benchmark, run)
    if benchmark in ("conv", "depthwise"):
        yield Table("", shown, totals(run))
    if benchmark in ("conv", "depthwise", "gemm"):
        for name in run["settings"]["against"]:
            slower = [row for row in run["rows"] if ratio(row, name) < 1]
            text = f"Slower than TensorFlow's {name}: {len(slower)} of {len(run['rows'])}."
            yield Table(text, shown, sorted(slower, key=lambda row: ratio(row, name)))
    if benchmark == "step":
        yield _kinds(run["rows"])
    if benchmark == "workers" and not run["settings"]["own_network"]:
        yield Table(f"Bytes are not counted: this user may not {' '.join(OWN_NETWORK)}.", [], [])


def _kinds(rows: list[Row]) -> Table:
    """Where the time of a step goes, a column per policy."""
    found = {row["policy"]: {kind["kind"]: kind for kind in row["kinds"]} for row in rows}
    for kinds in found.values():
        kinds["all"] = {key: sum(kind[key] for kind in kinds.values()) for key in ("ms", "mb")}
    names = list(dict.fromkeys(name for kinds in found.values() for name in kinds if name != "all"))

    def cell(policy):
        def text(row):
            kind = found[policy].get(row["kind"])
            if kind is None:
                return "-"
            share = kind["ms"] / found[policy]["all"]["ms"]
            return f"{kind['ms']:.1f} {share:4.0%} {kind['mb']:7.0f}"

        return text

    return Table(
        "Where a step's time goes: ms, share, MB read and written",
        [
            Column("kind of op", lambda row: row["kind"], 38, text=True),
            *(Column(policy, cell(policy), 22) for policy in found),
        ],
        [{"kind": name} for name in [*names, "all"]],
    )


def speedups(document: dict) -> Iterator[Table]:
    """Yields how much faster more threads are, for runs that differ in nothing else."""
    benchmark = document["benchmark"]
    alike: dict[str, list[dict]] = {}
    for run in document["runs"]:
        others = {key: value for key, value in run["settings"].items() if key != "threads"}
        alike.setdefault(str(others), []).append(run)
    for runs in alike.values():
        if len(runs) < 2 or benchmark == "small":
            continue
        times = {run["machine"]["threads"]: _times(benchmark, run) for run in runs}
        fewest = min(times)
        shown = [Column("", lambda row: row["label"], 26, text=True)]
        for n in sorted(times):
            shown.append(Column(f"{n} thr. ms", _time(times[n]), 12))
            if n != fewest:
                shown.append(Column("speedup", _speedup(times[fewest], times[n])))
        network = runs[0]["settings"].get("network", "")
        rows = [{"label": label} for label in times[fewest]]
        yield Table(f"Threads: {benchmark} {network}".rstrip(), shown, rows)


def _time(times):
    return lambda row: f"{times[row['label']]:.2f}"


def _speedup(fewest, times):
    return lambda row: f"{fewest[row['label']] / times[row['label']]:.2f}"


def _times(benchmark: str, run: dict) -> dict[str, float]:
    if benchmark in ("conv", "depthwise"):
        return {f"{row['layer']} {row['pass']}": row["dfp_ms"] for row in totals(run)}
    if benchmark == "gemm":
        return {_size(row): row["dfp_ms"] for row in run["rows"]}
    if benchmark == "quantize":
        return {
            f"{row['elements']} by {row['group']} {row['way']}": row["dfp_ms"]
            for row in run["rows"]
        }
    if benchmark == "pipeline":
        return {row["network"]: 1e3 / row["images_per_s"] for row in run["rows"]}
    if benchmark == "workers":
        return {f"{row['workers']} {row['exchange']}": row["step_ms"] for row in run["rows"]}
    return {row["policy"]: row["step_ms"] for row in run["rows"]}


# ---- how a table looks ---------------------------------------------------------------------------


def header(shown: list[Column]) -> str:
    """Returns a table's first line for a terminal."""
    return _aligned(shown, [column.title for column in shown])


def line(shown: list[Column], row: Row) -> str:
    """Returns a table's line for a terminal."""
    return _aligned(shown, [column.cell(row) for column in shown])


def _aligned(shown, cells):
    pairs = zip(shown, cells, strict=True)
    return "".join(f"{cell:{'<' if c.text else '>'}{c.width}}" for c, cell in pairs).rstrip()


def text(table: Table) -> str:
    """Returns a table for a terminal."""
    lines = [table.title] if table.title else []
    if table.rows:
        lines += [header(table.columns), *(line(table.columns, row) for row in table.rows)]
    return "\n".join(lines)


def markdown(document: dict, rows: bool) -> str:
    """Returns a document in Markdown.

    Args:
        document: What a benchmark wrote.
        rows: Whether to show every layer of a network, not only totals and what is slower.
    """
    benchmark = document["benchmark"]
    parts = []
    if not document["complete"]:
        parts.append("**Interrupted: this is what was measured until then.**")
    for run in document["runs"]:
        parts.append(f"{title(benchmark, run)}.")
        if rows or benchmark not in ("conv", "depthwise"):
            parts.append(_markdown(Table("", columns(benchmark, run), run["rows"])))
        parts += map(_markdown, summaries(benchmark, run))
    if document["complete"]:
        parts += map(_markdown, speedups(document))
    return "\n\n".join(part for part in parts if part)


def _markdown(table: Table) -> str:
    lines = [table.title, ""] if table.title else []
    if table.rows:
        cells = [[column.title for column in table.columns]]
        cells += [[column.cell(row) for column in table.columns] for row in table.rows]
        lines += ["| " + " | ".join(c.strip() for c in row) + " |" for row in cells]
        rule = "|" + "|".join("---" if c.text else "---:" for c in table.columns) + "|"
        lines.insert(len(lines) - len(table.rows), rule)
    return "\n".join(lines).rstrip()
