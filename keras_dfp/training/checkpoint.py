"""A checkpoint: one file, written whole, that a run continues from bit for bit."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_dfp.files import check_file, shown, written_whole
from keras_dfp.training.errors import RunError


def save(path: Path, variables: Sequence[keras.Variable], state: dict[str, Any]) -> None:
    """Writes variables, in their order, and a state that JSON can hold.

    The order and not the names identify variables, because Keras counts up the names of layers
    that have none with every model.
    """
    arrays = {str(number): variable.value.numpy() for number, variable in enumerate(variables)}
    with written_whole(path) as temporary:
        np.savez(temporary, state=json.dumps(state), **arrays)


def load(
    path: Path, variables: Sequence[keras.Variable] = (), content: bytes | None = None
) -> dict[str, Any]:
    """Assigns the first variables of a checkpoint, and returns its state.

    Args:
        path: The file.
        variables: What to assign.
        content: What is in the file, where it is another worker's.

    Raises:
        RunError: If the file is no checkpoint, or not one of these variables.
    """
    try:
        if content is None:
            check_file(path)
        with np.load(path if content is None else io.BytesIO(content)) as file:
            state = json.loads(str(file["state"]))
            arrays = [file[str(number)] for number in range(len(variables))]
    # What NumPy raises depends on what is wrong with the file.
    except Exception as error:
        raise RunError(f"{shown(path)} is not a checkpoint of this model: {error!r}") from error
    for variable, array in zip(variables, arrays, strict=True):
        if array.shape != tuple(variable.shape) or array.dtype != variable.dtype:
            raise RunError(
                f"{shown(path)} is of another model: {variable.path} has shape "
                f"{tuple(variable.shape)} and dtype {variable.dtype}, in the file {array.shape} "
                f"and {array.dtype}."
            )
        variable.assign(array)
    return state
