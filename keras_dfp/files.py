"""Files that are either whole or not there, and folders that one process at a time writes to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


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


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole."""
    with written_whole(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
        OSError: If it cannot be read, or is no file; a named pipe is not waited for.
        ValueError: If it is not JSON.
    """
    check_file(path)
    try:
        return json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_file(path: Path) -> None:
    """Raises OSError unless a path is a file, or a link to one, that can be read from."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, f"It is {kind(path)}, not a file", str(path))


def kind(path: Path) -> str:
    """Returns what something is that is not a file, in words."""
    for test, words in (
        (path.is_dir, "a folder"),
        (path.is_fifo, "a named pipe"),
        (path.is_socket, "a socket"),
        (path.is_block_device, "a device"),
        (path.is_char_device, "a device"),
        (path.is_symlink, "a link to nothing"),
    ):
        if test():
            return words
    return "nothing that can be read"


def shown(path: str | os.PathLike[str]) -> str:
    """Returns a path as it can be printed, on one line, whatever bytes are in it."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Makes a folder, and those it lies in, for a block; one that fails leaves none of them empty.

    Raises:
        OSError: If it cannot be made.
    """
    lacking = missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        remove_empty(lacking)
        raise


def missing(folder: Path) -> list[Path]:
    """Returns which of a folder and those it lies in do not exist, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes those of some folders that are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


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
            raise BlockingIOError(f"Another process is writing to {shown(folder)}.") from error
        except OSError:
            # NFS, for one, has none for folders.
            pass
        yield
    finally:
        os.close(descriptor)
