"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which becomes `path` when the block succeeds.

    Whatever ends the block otherwise, Ctrl-C included, leaves `path` as it was.

    Args:
        path: The file to write; its folder must exist.

    Example:

    >>> with written_whole(Path("model.keras")) as temporary:
    ...     model.save(temporary)
    """
    # In the same folder, because a file is renamed atomically only within a file system; with the
    # same suffix, because writers choose the file's format by it.
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)
