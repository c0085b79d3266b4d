"""Measures configurations, each in a process of its own, for a document.

A process of its own, because instruction sets and threads are TensorFlow's for the life of a
process, and because the peak of its memory is then the configuration's own. Where policies are
compared, their processes live together and take turns, because machines drift.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
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
# What a process writes that was refused memory, but not killed for it.
WANT_OF_MEMORY = "ResourceExhaustedError|MemoryError|bad_alloc"


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
    """Yields what workers send: ("machine", facts), ("doing", Doing) and ("row", dict).

    Whoever stops early closes this generator, which ends the processes.

    Args:
        benchmark: Name of the module.
        settings: What it measures; `isa` and `threads` (None for the best and for all) decide
            about the process, and `own_network`, if it is there, whether it has a network namespace
            of its own. Each of `policies`, if they are there, is the `policy` of another process;
            these take turns.

    Raises:
        RuntimeError: If a process fails.
    """
    policies = settings.get("policies")
    each = [{**settings, "policy": policy} for policy in policies] if policies else [settings]
    workers = [_worker(benchmark, one) for one in each]
    shares = [0.0] * len(workers)
    going = dict(enumerate(workers))
    with contextlib.ExitStack() as stack:
        for worker in workers:
            stack.callback(worker.close)
        while going:
            for i, worker in list(going.items()):
                for kind, value in worker:
                    if kind == "turn":
                        break
                    if kind == "doing":
                        shares[i] = value.share
                        value = Doing(value.what, sum(shares) / len(shares))
                    yield kind, value
                else:
                    shares[i] = 1.0
                    del going[i]


def _worker(benchmark: str, settings: dict) -> Iterator[tuple[str, Any]]:
    """Starts a process and yields what it sends; after ("turn", None) it waits to be resumed."""
    command = [sys.executable, "-m", "keras_dfp.benchmarks.worker", benchmark, json.dumps(settings)]
    if settings.get("own_network"):
        command = [*OWN_NETWORK, *command]
    with (
        tempfile.TemporaryFile("w+") as errors,
        # In a session of its own, so that Ctrl-C reaches it through this process only.
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment(settings["isa"]),
            text=True,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin and process.stdout
        try:
            for line in process.stdout:
                kind, value = json.loads(line)
                yield kind, Doing(*value) if kind == "doing" else value
                if kind == "turn":
                    # One that has died while it waited has closed its output, too.
                    with contextlib.suppress(BrokenPipeError):
                        # Nothing may stay in a buffer, which would be written when it is closed.
                        os.write(process.stdin.fileno(), b"go\n")
        except BaseException:
            # Those that it has started, too.
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if code := process.wait():
            errors.seek(0)
            raise RuntimeError(_failure(benchmark, settings, code, errors.read()))


def how_ended(process: str, code: int, errors: str) -> str:
    """Returns a sentence on a process that failed.

    Args:
        process: What to call it.
        code: Its exit code; that of a signal is negative.
        errors: What it wrote to its standard error.
    """
    # Of a traceback, the last line says what was wrong.
    last = errors.strip().split("\n")[-1]
    if code == -signal.SIGKILL:
        return f"{process} was killed (SIGKILL), probably for want of memory."
    if code < 0:
        return f"{process} was killed by {signal.Signals(-code).name}. The last it wrote: {last}"
    return f"{process} ended with exit code {code}. {last}"


def _failure(benchmark: str, settings: dict, code: int, errors: str) -> str:
    names = [settings[key] for key in ("network", "policy") if key in settings]
    text = how_ended(f"The process measuring {' '.join([benchmark, *names])}", code, errors)
    policies = settings.get("policies", [])
    if policies and (code == -signal.SIGKILL or re.search(WANT_OF_MEMORY, errors)):
        text = text.rstrip(".: ") + ". "
        if len(policies) > 1:
            text += f"The {len(policies)} policies need memory at once: name fewer (--policy), or"
        else:
            text += "Choose"
        text += " a smaller --batch."
    return text


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
