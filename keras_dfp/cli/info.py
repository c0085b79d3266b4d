"""`keras-dfp info`: what this machine offers and what is used of it."""

from __future__ import annotations

import click

import keras_dfp


@click.command()
def info() -> None:
    """Show the CPU's features, the kernels available and chosen, threads and versions."""
    facts = keras_dfp.info()
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' '):{width}}{value}")
