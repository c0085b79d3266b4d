"""The command `keras-dfp`, also `python -m keras_dfp`: one module per subcommand.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import click

from keras_dfp.cli.audit import audit
from keras_dfp.cli.bench import bench
from keras_dfp.cli.compare import compare
from keras_dfp.cli.describe import describe
from keras_dfp.cli.evaluate import evaluate
from keras_dfp.cli.export import export
from keras_dfp.cli.info import info
from keras_dfp.cli.train import train
from keras_dfp.version import __version__


class _Group(click.Group):
    def invoke(self, ctx: click.Context):
        # click would exit with 1, as after a failure.
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Train Keras models on 16-bit integers (dynamic fixed point), on ordinary CPUs.

    \b
    Examples:
      keras-dfp compare              float32 against dfp16, on handwritten digits
      keras-dfp train resnet20 --data cifar10
      keras-dfp describe resnet50    which layers run on integers, and why others do not
      keras-dfp audit lenet          what integers cost each layer, measured
      keras-dfp bench conv           its speed against TensorFlow's, here
      keras-dfp info                 CPU, kernels, threads, versions
    """


main.add_command(train)
main.add_command(evaluate)
main.add_command(export)
main.add_command(compare)
main.add_command(describe)
main.add_command(audit)
main.add_command(bench)
main.add_command(info)
