"""`keras-dfp bench`: how fast the integers are on this machine, against stock TensorFlow."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from keras_dfp import native, zoo
from keras_dfp.benchmarks import gemm as gemm_benchmark
from keras_dfp.benchmarks import pipeline as pipeline_benchmark
from keras_dfp.benchmarks import quantize as quantize_benchmark
from keras_dfp.benchmarks import report, roofline, wire
from keras_dfp.benchmarks.networks import ALL, NETWORKS, OF_IMAGES
from keras_dfp.benchmarks.products import DTYPES
from keras_dfp.benchmarks.run import SCHEMA, may_have_own_network, measure
from keras_dfp.cli.options import PLOTS, POLICY_HELP, ListType, OutputFile, PolicyType, failure
from keras_dfp.exchange import EXCHANGES
from keras_dfp.files import read_json, shown, write_json, written_whole

POLICIES = ("float32", "mixed_bfloat16", "dfp16", "dfp16_paper")
# Who draws a benchmark's document; of the others there is no plot.
PLOTTED = {**dict.fromkeys(("conv", "depthwise", "gemm"), roofline.plot), "workers": wire.plot}


# ---- types of options ----------------------------------------------------------------------------


class _Size(click.ParamType):
    name = "MxNxK"

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        numbers = [int(n) for n in value.split("x")] if re.fullmatch(r"\d+(x\d+)*", value) else []
        numbers = numbers * 3 if len(numbers) == 1 else numbers
        if len(numbers) != 3 or min(numbers) < 1:
            self.fail(f"{value!r} is neither N nor MxNxK, positive integers", param, ctx)
        return numbers


def _isa(ctx, param, value):
    names = [entry["name"] for entry in native.extension.isas() if entry["available"]]
    if value is not None and value not in names:
        raise click.BadParameter(f"{value!r} is not available here; available: {', '.join(names)}.")
    return value


def _plot_file(ctx, param, value):
    if value is not None and importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException("--plot needs matplotlib. Install: pip install matplotlib")
    return value


# ---- options that commands share -----------------------------------------------------------------


def _options(*options) -> Callable:
    def decorate(function):
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_machine = _options(
    click.option("--isa", callback=_isa, help="Instruction set to force.  [default: the best]"),
    click.option(
        "--threads",
        type=ListType(click.IntRange(min=1)),
        default=[None],
        help="For both sides, say 2, or 1,2 to compare.  [default: all]",
    ),
)
_json = click.option(
    "--json", "json_path", type=OutputFile(), help="Write the figures to this file."
)
_plot = click.option(
    "--plot",
    "plot_path",
    type=OutputFile(*PLOTS),
    callback=_plot_file,
    help="Draw the figures to this file.",
)
_against = click.option(
    "--against",
    type=ListType(click.Choice(list(DTYPES))),
    default="float32",
    show_default=True,
    help="What TensorFlow computes in, say float32,bfloat16.",
)


def _repeats(default: int, what: str = "runs") -> Callable:
    return click.option(
        "--repeats",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        help=f"The median of so many {what} counts, after one to warm up.",
    )


def _network(names, default: str) -> Callable:
    fixed = [name for name in names if name not in OF_IMAGES]
    return _options(
        click.option(
            "--network",
            "networks",
            type=click.Choice([*names, "all"]),
            multiple=True,
            default=[default],
            show_default=True,
            help=f"May be given several times; all: {', '.join(ALL)}.",
        ),
        click.option("--batch", type=click.IntRange(min=1), help=_defaults(names, "batch")),
        click.option(
            "--image-size",
            type=click.IntRange(min=35),
            help=(f"Not for {', '.join(fixed)}.  " if fixed else "")
            + _defaults(OF_IMAGES, "image_size"),
        ),
    )


def _defaults(names, field: str) -> str:
    """Says what the networks have by default: most of them, and the others."""
    found = collections.defaultdict(list)
    for name in names:
        found[getattr(NETWORKS[name], field)].append(name)
    most, *others = sorted(found.items(), key=lambda item: -len(item[1]))
    texts = [f"{value} for {', '.join(names)}" for value, names in others]
    return f"[default: {'; '.join([str(most[0]), *texts])}]"


def _each_network(networks, batch: int | None, image_size: int | None) -> list[dict]:
    named = (ALL if name == "all" else [name] for name in networks)
    names = dict.fromkeys(itertools.chain.from_iterable(named))
    for name in names:
        if image_size and name not in OF_IMAGES:
            raise click.BadParameter(
                f"--image-size is not for {name}, whose input has a fixed shape."
            )
    return [
        {
            "network": name,
            "batch": batch or NETWORKS[name].batch,
            "image_size": image_size or NETWORKS[name].image_size,
        }
        for name in names
    ]


# ---- the commands --------------------------------------------------------------------------------


class _Bench(click.Group):
    def parse_args(self, ctx, args):
        if "--end-to-end" in args:
            args = ["step", *(argument for argument in args if argument != "--end-to-end")]
        return super().parse_args(ctx, args)


@click.group(cls=_Bench)
def bench() -> None:
    """Measure on this machine: keras-dfp against stock TensorFlow, in turns.

    `bench --end-to-end` is another name of `bench step`.

    \b
    Examples:
      keras-dfp bench conv --network resnet50
      keras-dfp bench conv --network all --against float32,bfloat16 --json all.json --plot all.png
      keras-dfp bench gemm --isa avx2 --threads 1,2
      keras-dfp bench step --network vgg16
      keras-dfp bench report all.json
    """


@bench.command()
@_network(OF_IMAGES, "resnet50")
@_against
@_machine
@_repeats(7)
@_json
@_plot
def conv(**options) -> None:
    """Time every convolution and dense layer of a network, in all three passes.

    Operands are int16, results float32; packing is included, quantizing the operands is shown
    beside it. The input gradient of the first layer is left out. Ratios are TensorFlow's time over
    ours; "ratio with" is with quantizing.

    \b
    Examples:
      keras-dfp bench conv
      keras-dfp bench conv --network vgg16 --network alexnet --against float32,bfloat16
      keras-dfp bench conv --isa avx2 --threads 1
    """
    _run_layers("conv", ["conv", "grouped", "depthwise", "dense"], **options)


@bench.command()
@_network(OF_IMAGES, "mobilenet_v2")
@_against
@_machine
@_repeats(7)
@_json
@_plot
def depthwise(**options) -> None:
    """Time the depthwise convolutions of a network, which are bound by the memory.

    Shows the bytes of operands and results per second, as a share of a copy's.

    \b
    Example:
      keras-dfp bench depthwise --network mobilenet_v2
    """
    _run_layers("depthwise", ["depthwise"], **options)


@bench.command()
@click.option(
    "--size",
    "sizes",
    type=_Size(),
    multiple=True,
    help="N for a square product, or MxNxK; may be given several times.  "
    "[default: squares from 256 to 4096, and some as they occur in networks]",
)
@_against
@_machine
@_repeats(7)
@_json
@_plot
def gemm(sizes, against, isa, threads, repeats, json_path, plot_path) -> None:
    """Time matrix products.

    \b
    Examples:
      keras-dfp bench gemm
      keras-dfp bench gemm --size 1024 --size 100352x64x576 --threads 1,2
    """
    sizes = [list(size) for size in sizes or gemm_benchmark.SIZES]
    settings = {"sizes": sizes, "against": against, "repeats": repeats}
    _run("gemm", [settings], isa=isa, threads=threads, json_path=json_path, plot_path=plot_path)


@bench.command()
@click.option(
    "--elements",
    type=click.IntRange(min=1),
    multiple=True,
    help="May be given several times.  [default: 64 Ki to 64 Mi]",
)
@click.option(
    "--group",
    "groups",
    type=click.IntRange(min=1),
    multiple=True,
    help="Elements that share an exponent; may be given several times.  [default: 10, 1 KB, 64 KB, "
    "3 MB, all]",
)
@_machine
@_repeats(7)
@_json
def quantize(elements, groups, isa, threads, repeats, json_path) -> None:
    """Time quantizing: bytes read and written per second, as a share of a copy's.

    \b
    Example:
      keras-dfp bench quantize --threads 1,2
    """
    settings = {
        "elements": list(elements or quantize_benchmark.ELEMENTS),
        "groups": list(groups or quantize_benchmark.GROUPS),
        "repeats": repeats,
    }
    _run("quantize", [settings], isa=isa, threads=threads, json_path=json_path)


@bench.command()
@_machine
@_repeats(20)
@_json
def small(isa, threads, repeats, json_path) -> None:
    """Time products so small that only the call counts, eagerly and in a graph.

    \b
    Example:
      keras-dfp bench small
    """
    _run("small", [{"repeats": repeats}], isa=isa, threads=threads, json_path=json_path)


@bench.command()
@_network(NETWORKS, "resnet50")
@click.option(
    "--policy",
    "policies",
    type=click.Choice(POLICIES),
    multiple=True,
    default=POLICIES,
    show_default=True,
    help="May be given several times; figures are compared with the first.",
)
@_machine
@_repeats(10, "rounds")
@_json
def step(networks, batch, image_size, policies, isa, threads, repeats, json_path) -> None:
    """Time whole training steps: samples per second, peak memory, and where the time goes.

    Each policy runs in a process of its own, on random samples, with SGD and momentum. They take
    turns: in a round each runs steps for 0.4 seconds, or one, while the others wait. So they need
    their memory together. Ratios are the medians of those of the rounds, half of which are within
    the range beside them. The time by kind of op comes from TensorFlow's profiler.

    \b
    Examples:
      keras-dfp bench step
      keras-dfp bench step --network lstm --network transformer
      keras-dfp bench --end-to-end --network vgg16 --policy float32 --policy dfp16
    """
    common = {"policies": list(dict.fromkeys(policies)), "repeats": repeats}
    each = [{**network, **common} for network in _each_network(networks, batch, image_size)]
    _run("step", each, isa=isa, threads=threads, json_path=json_path)


@bench.command()
@click.option(
    "--network",
    "networks",
    type=click.Choice(pipeline_benchmark.NETWORKS),
    multiple=True,
    default=("resnet50", "vgg16"),
    show_default=True,
    help="May be given several times.",
)
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Images in an epoch.",
)
@_machine
@_repeats(3)
@_json
def pipeline(networks, batch, images, isa, threads, repeats, json_path) -> None:
    """Time reading, decoding and augmenting images, as training does, with no training going on.

    The images are JPEG files of 500x375 pixels, made for it. Compare the figures with those of
    `bench step`: where training is not several times slower, it may wait for its input.

    \b
    Example:
      keras-dfp bench pipeline --network resnet50
    """
    if images < batch:
        raise click.BadParameter(f"{images} images do not make a batch of {batch}.")
    settings = {
        "networks": list(dict.fromkeys(networks)),
        "batch": batch,
        "images": images,
        "repeats": repeats,
    }
    _run("pipeline", [settings], isa=isa, threads=threads, json_path=json_path)


@bench.command()
@click.option("--network", type=click.Choice(zoo.list()), default="lenet", show_default=True)
@click.option(
    "--policy", type=PolicyType(), default="dfp16", help=f"{POLICY_HELP}  [default: dfp16]"
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=96,
    show_default=True,
    help="Images in a step, of all workers together.",
)
@click.option(
    "--workers",
    "counts",
    type=ListType(click.IntRange(1, 256)),
    default="1,2,3",
    show_default=True,
    help="How many train together.",
)
@click.option(
    "--exchange",
    "exchanges",
    type=ListType(click.Choice(EXCHANGES)),
    default=",".join(EXCHANGES),
    show_default=True,
    help="How they add up gradients; in turns.",
)
@click.option("--isa", callback=_isa, help="Instruction set to force.  [default: the best]")
@click.option(
    "--threads",
    type=ListType(click.IntRange(min=1)),
    default="1",
    show_default=True,
    help="Of each worker.",
)
@_repeats(200)
@_json
@_plot
def workers(
    network, policy, batch, counts, exchanges, isa, threads, repeats, json_path, plot_path
) -> None:
    """Time the steps of several workers on this machine, and count the bytes they exchange.

    They train as `keras-dfp train` does, on random images, and speak over the loopback device.
    Bytes are counted in a network namespace of their own, if you may make one (unshare
    --map-root-user --net); otherwise only times are measured. With more workers times threads than
    the machine has cores, times say little of several machines; bytes are the same there.

    \b
    Examples:
      keras-dfp bench workers
      keras-dfp bench workers --network resnet20 --batch 128 --workers 2
    """
    if batch < max(counts):
        raise click.BadParameter(f"--batch {batch} is too small for {max(counts)} workers.")
    settings = {
        "network": network,
        "policy": policy,
        "batch": batch,
        "image_size": None,
        "counts": counts,
        "exchanges": exchanges,
        "repeats": repeats,
        "own_network": may_have_own_network(),
    }
    _run("workers", [settings], isa=isa, threads=threads, json_path=json_path, plot_path=plot_path)


@bench.command("report")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--rows", is_flag=True, help="Every layer of a network, not only the totals.")
@_plot
def report_(file, rows, plot_path) -> None:
    """Print a file that --json wrote as tables in Markdown.

    \b
    Example:
      keras-dfp bench report resnet50.json >> performance.md
    """
    try:
        document = read_json(file)
        schema = document["schema"]
    except (KeyError, TypeError, ValueError) as error:
        raise click.ClickException(
            f"{shown(file)} was not written by keras-dfp bench --json."
        ) from error
    if schema != SCHEMA:
        raise click.ClickException(
            f"{shown(file)} has schema {schema}; this version reads {SCHEMA}. Measure again."
        )
    try:
        benchmark = document["benchmark"]
        if plot_path and benchmark not in PLOTTED:
            raise click.ClickException(
                f"{shown(file)} is of bench {benchmark}; --plot draws {', '.join(PLOTTED)}."
            )
        click.echo(report.markdown(document, rows))
        if plot_path:
            _draw(document, plot_path)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise failure(f"{shown(file)} is spoiled: {error!r}") from error


# ---- running them --------------------------------------------------------------------------------


def _run_layers(
    benchmark: str, kinds: list[str], networks, batch, image_size, against, repeats, **options
) -> None:
    """Measures the layers of these kinds in each network."""
    common = {"kinds": kinds, "against": against, "repeats": repeats}
    each = [{**network, **common} for network in _each_network(networks, batch, image_size)]
    _run(benchmark, each, **options)


def _run(
    benchmark: str,
    each: list[dict],
    *,
    isa: str | None,
    threads: list[int | None],
    json_path: Path | None,
    plot_path: Path | None = None,
) -> None:
    """Measures every configuration and prints it row by row; writes what was asked for.

    Args:
        benchmark: Name of the module of keras_dfp.benchmarks.
        each: Settings, one dict per run.
        isa: Instruction set, None for the best.
        threads: Each run is measured with each of these numbers; None for all threads.
        json_path: Where to write the document.
        plot_path: Where to draw it.
    """
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "complete": False,
        "runs": [],
    }
    # Drawn where there is a terminal for it.
    bar = tqdm(
        total=len(each) * len(threads),
        disable=None,
        leave=False,
        bar_format="measuring {desc}: {percentage:.0f} % done, {remaining} left",
    )
    try:
        for settings, n in itertools.product(each, threads):
            run: dict[str, Any] = {
                "settings": {**settings, "isa": isa, "threads": n},
                "machine": {},
                "rows": [],
            }
            document["runs"].append(run)
            _measure(benchmark, run, bar)
            if not run["rows"]:
                click.echo(f"Nothing to measure: {settings['network']} has no such layers.")
            _print_summaries(benchmark, run)
        bar.close()
        document["complete"] = True
        for table in report.speedups(document):
            click.echo("\n" + report.text(table))
    except KeyboardInterrupt:
        bar.close()
        click.echo("\n\nInterrupted; so far:")
        for run in document["runs"][-1:]:
            _print_summaries(benchmark, run)
        raise
    except RuntimeError as error:
        raise failure(error) from error
    finally:
        bar.close()
        document["runs"] = [run for run in document["runs"] if run["rows"]]
        if json_path and document["runs"]:
            write_json(json_path, document)
        if plot_path and document["runs"]:
            _draw(document, plot_path)


def _measure(benchmark: str, run: dict, bar: tqdm) -> None:
    """Measures, printing every row as it comes and adding it to the run; moves the bar by 1."""
    before = bar.n
    module = "conv" if benchmark == "depthwise" else benchmark
    # Closed here, so that what interrupts the loop ends the processes.
    with contextlib.closing(measure(module, run["settings"])) as sent:
        for kind, value in sent:
            if kind == "doing":
                bar.set_description_str(value.what, refresh=False)
                bar.n = before + value.share
                bar.refresh()
                continue
            with tqdm.external_write_mode():
                if kind == "machine" and not run["machine"]:
                    run["machine"] = value
                    click.echo(f"\n{report.title(benchmark, run)}\n")
                elif kind == "row":
                    run["rows"].append(value)
                    columns = report.columns(benchmark, run)
                    if len(run["rows"]) == 1:
                        click.echo(report.header(columns))
                    click.echo(report.line(columns, value))
    bar.n = before + 1


def _print_summaries(benchmark: str, run: dict) -> None:
    for table in report.summaries(benchmark, run):
        click.echo("\n" + report.text(table))


def _draw(document: dict, path: Path) -> None:
    with written_whole(path) as temporary:
        PLOTTED[document["benchmark"]](document, temporary)
