"""`keras-dfp info`: what this machine offers and what is used of it."""

from __future__ import annotations

import click

import keras_dfp


@click.command()
def info() -> None:
    """Show the CPU's features, the kernels available and chosen, threads and versions."""
    click.echo(keras_dfp.info())
