"""Measures configurations, each in a process of its own, for a document.

A process of its own, because instruction sets and threads are TensorFlow's for the life of a
process, and because the peak of its memory is then the configuration's own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

SCHEMA = 1  # of the documents
# What TensorFlow's oneDNN is held to, so that both sides use the same instruction set. Above
# these it gains nothing in float32 that keras-dfp's next one does not have as well.
ONEDNN_ISAS = {"avx2": "AVX2", "avxvnni": "AVX2"}
# Runs a command as root of a user namespace, in a network namespace where nobody else is.
OWN_NETWORK = ["unshare", "--map-root-user", "--net"]


class Doing(NamedTuple):
    """What a benchmark is about to do, and what share of its work is done."""

    what: str
    share: float


def may_have_own_network() -> bool:
    """Tells whether this user may make a network namespace here."""
    try:
        return not subprocess.run([*OWN_NETWORK, "true"], capture_output=True).returncode
    except OSError:
        return False


def measure(benchmark: str, settings: dict) -> Iterator[tuple[str, Any]]:
    """Yields what a worker sends: ("machine", facts), ("doing", Doing) and ("row", dict).

    Args:
        benchmark: Name of the module.
        settings: What it measures; `isa` and `threads` (None for the best and for all) decide
            about the process, and `own_network`, if it is there, whether it has a network namespace
            of its own.

    Raises:
        RuntimeError: If the process fails.
    """
    command = [sys.executable, "-m", "keras_dfp.benchmarks.worker", benchmark, json.dumps(settings)]
    if settings.get("own_network"):
        command = [*OWN_NETWORK, *command]
    with (
        tempfile.TemporaryFile("w+") as errors,
        # In a session of its own, so that Ctrl-C reaches it through this process only.
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment(settings["isa"]),
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                kind, value = json.loads(line)
                yield kind, Doing(*value) if kind == "doing" else value
        except BaseException:
            # Those that it has started, too.
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if process.wait():
            errors.seek(0)
            # Of a traceback, the last line says what was wrong.
            said = errors.read().strip().split("\n")
            raise RuntimeError(
                f"The process measuring {benchmark} {settings} ended with exit code "
                f"{process.returncode} (-9: perhaps for want of memory). {said[-1]}"
            )


def environment(isa: str | None) -> dict[str, str]:
    """Returns the environment of a worker that runs on an instruction set.

    What is set already stays, but for `isa`; without it, KERAS_DFP_ISA decides, or else the CPU.
    """
    isa = isa or os.environ.get("KERAS_DFP_ISA")
    defaults = {"TF_CPP_MIN_LOG_LEVEL": "3"}
    if isa in ONEDNN_ISAS:
        defaults["ONEDNN_MAX_CPU_ISA"] = ONEDNN_ISAS[isa]
    forced = {} if isa is None else {"KERAS_DFP_ISA": isa}
    return {**defaults, **os.environ, **forced}
