"""Files that are either whole or not there, and folders that one process at a time writes to."""

from __future__ import annotations

import contextlib
import fcntl
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


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of such a block for the same folder.

    The lock ends with the process, however that ends. Where the file system has no locks, there is
    none.

    Raises:
        BlockingIOError: If another process is in such a block.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"Another process is writing to {folder}.") from error
        except OSError:
            # NFS, for one, has none for folders.
            pass
        yield
    finally:
        os.close(descriptor)
