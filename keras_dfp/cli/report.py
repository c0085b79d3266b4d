"""`keras-dfp report`: runs on one page."""

from __future__ import annotations

import os
from pathlib import Path

import click

from keras_dfp.cli.options import PACKAGES, OutputFile, check_folder, require
from keras_dfp.files import shown


@click.command()
@click.argument(
    "folders", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "--output",
    type=OutputFile(".html", ".htm"),
    help="The file to write.  [default: report.html in RUN; of several, in the folder that holds "
    "them]",
)
def report(folders: tuple[Path, ...], output: Path | None) -> None:
    """Write a page about one or several runs, side by side.

    RUN is the folder of a run of `keras-dfp train`, finished or not; that of `keras-dfp compare`,
    which stands for all of its runs; or the log_dir of a DFPStatistics callback. The page is one
    HTML file that needs nothing else: curves, throughput and memory; with --statistics also the
    exponents, what was lost and the noise of each layer, and what may help the worst of them. Its
    pictures are PNG files, too, in a folder beside it.

    \b
    Examples:
      keras-dfp report runs/lenet-dfp16
      keras-dfp report runs/lenet --output lenet.html
      keras-dfp report runs/resnet20-float32 runs/resnet20-dfp16
    """
    require(*PACKAGES, "jinja2")
    # Here and not above, because it needs those packages.
    from keras_dfp.training import summary

    runs = summary.read(folders)
    if output is None:
        output = Path(os.path.commonpath([folder.absolute() for folder in folders])) / "report.html"
        # As the user would write it.
        if len(folders) == 1:
            output = folders[0] / "report.html"
        check_folder(output)
    folder = summary.write(runs, output)
    for run in runs:
        if run.snippet and "\n" not in run.snippet:
            click.echo(f"{run.name}: most layers need more bits: {run.snippet}")
        for each in run.advised[:3]:
            click.echo(f"{run.name}: {shown(each.layer)}: {shown(each.advice)}")
        if len(run.advised) > 3:
            more = len(run.advised) - 3
            click.echo(f"{run.name}: and {more} layer{'s' if more > 1 else ''} more.")
    click.echo(f"In {shown(output)}; its pictures in {shown(folder)}{os.sep}")
