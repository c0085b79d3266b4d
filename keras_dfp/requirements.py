"""What the package needs; checked when this is imported, before anything else of it.

What is missing is an ImportError (for `KERAS_DFP_ISA`, a ValueError) that says so; of the command
`keras-dfp` it is the last line, and the only one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys


def _check() -> None:
    try:
        _check_tensorflow()
        _check_backend()
        importlib.import_module("keras_dfp.native")
    except (ImportError, ValueError) as error:
        if _is_command():
            sys.exit(f"Error: {error}")
        raise


def _check_tensorflow() -> None:
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            "keras_dfp needs TensorFlow, which is not installed. Install it with "
            "`pip install tensorflow-cpu` or `pip install tensorflow`."
        )


def _check_backend() -> None:
    try:
        import keras

        backend = repr(keras.backend.backend())
    # A backend that is not installed, or that Keras does not know.
    except (ImportError, ValueError) as error:
        if importlib.util.find_spec("keras") is None:
            raise
        asked = os.environ.get("KERAS_BACKEND")
        backend = f"{asked!r} ({error})" if asked else f"one that fails ({error})"
    if backend != "'tensorflow'":
        raise ImportError(
            f"keras_dfp works with Keras's TensorFlow backend, but Keras runs on {backend}. "
            'Set KERAS_BACKEND=tensorflow in the environment, or "backend": "tensorflow" in '
            "~/.keras/keras.json, before Keras is imported."
        )


def _is_command() -> bool:
    """Tells whether `keras-dfp`, or `python -m keras_dfp`, is what imports the package."""
    # Python calls the program "-m" until it has found, hence imported, what it is to run.
    return os.path.basename(sys.argv[0]) in ("keras-dfp", "-m") if sys.argv else False


_check()
