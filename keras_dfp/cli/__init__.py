"""The command `keras-dfp`, also `python -m keras_dfp`: one module per subcommand.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import errno
from typing import Any

import click
import tensorflow as tf

from keras_dfp.cli.audit import audit
from keras_dfp.cli.bench import bench
from keras_dfp.cli.compare import compare
from keras_dfp.cli.describe import describe
from keras_dfp.cli.evaluate import evaluate
from keras_dfp.cli.export import export
from keras_dfp.cli.info import info
from keras_dfp.cli.options import failure
from keras_dfp.cli.report import report
from keras_dfp.cli.train import train
from keras_dfp.files import shown
from keras_dfp.training.errors import TrainingError
from keras_dfp.training.sources import reason
from keras_dfp.version import __version__


class _Group(click.Group):
    """Makes what is wrong through no fault of the program the line that a command ends with."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # click would exit with 1, as after a failure.
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)
        except TrainingError as error:
            raise failure(error) from error
        except (MemoryError, tf.errors.ResourceExhaustedError) as error:
            raise failure(f"There is not enough memory, or disk: {reason(error)}") from error
        except (tf.errors.PermissionDeniedError, tf.errors.NotFoundError) as error:
            raise failure(reason(error)) from error
        except OSError as error:
            # Who reads the output may have gone: click knows what to do.
            if error.errno == errno.EPIPE:
                raise
            where = f": {shown(error.filename)}" if error.filename else ""
            raise failure(f"{error.strerror or error}{where}") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Train Keras models on 16-bit integers (dynamic fixed point), on ordinary CPUs.

    \b
    Examples:
      keras-dfp compare              float32 against dfp16, on handwritten digits
      keras-dfp train resnet20 --data cifar10
      keras-dfp report runs/lenet    curves, exponents and the worst layers, on a page
      keras-dfp describe resnet50    which layers run on integers, and why others do not
      keras-dfp audit lenet          what integers cost each layer, measured
      keras-dfp bench conv           its speed against TensorFlow's, here
      keras-dfp info                 CPU, kernels, threads, versions
    """


main.add_command(train)
main.add_command(evaluate)
main.add_command(export)
main.add_command(compare)
main.add_command(report)
main.add_command(describe)
main.add_command(audit)
main.add_command(bench)
main.add_command(info)
