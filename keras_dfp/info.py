"""What runs here: the machine, the kernels and the versions."""

from __future__ import annotations

import platform
import re
import resource
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dfp import native
from keras_dfp.version import __version__


class Info(dict):
    """A dict that prints as a table."""

    def __str__(self) -> str:
        rows = []
        for name, value in self.items():
            if name == "kernels":
                rows += [
                    (
                        f"kernel {entry['name']}",
                        "in use"
                        if entry["name"] == self["isa"]
                        else "available"
                        if entry["available"]
                        else f"not available: {entry['reason']}",
                    )
                    for entry in value
                ]
            else:
                rows.append((name, ", ".join(value) if isinstance(value, list) else str(value)))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def info() -> Info:
    """Describes the machine, the kernels in use and the versions.

    Returns:
        A dict, printed as a table: `cpu` (its name), `cpu_features` (instruction sets it has, of
        those with kernels), `isa` (the one in use; `KERAS_DFP_ISA` forces another), `kernels` (one
        dict per instruction set: `name`, `compiled`, `available`, `reason`), `threads` (how many a
        kernel may use), `plugin` (whether Keras is dispatching to keras_dfp), and the versions of
        the package, its compiler and its dependencies.

    Example:

    >>> keras_dfp.info()["isa"]
    'avx512vnni'
    """
    from keras_dfp import backend

    native.follow_thread_setting()
    extension = native.extension
    build: dict[str, Any] = extension.build_info()
    return Info(
        cpu=_cpu_name(),
        cpu_features=extension.cpu_features(),
        isa=extension.isa(),
        kernels=extension.isas(),
        threads=extension.threads(),
        plugin="installed" if backend.installed() else "not installed",
        keras_dfp=__version__,
        keras=keras.__version__,
        tensorflow=tf.__version__,
        numpy=np.__version__,
        python=platform.python_version(),
        compiler=build["compiler"],
        openmp=build["openmp"],
    )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory() -> int:
    """Returns the most bytes of memory this process has had resident."""
    status = Path("/proc/self/status").read_text()
    if found := re.search(r"VmHWM:\s+(\d+) kB", status):
        return 1024 * int(found[1])
    # Not in the first place: a process inherits this figure from the one that started it.
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
