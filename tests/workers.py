"""Worker processes on loopback, as `tf.distribute.MultiWorkerMirroredStrategy` wants them."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

from keras_dfp.benchmarks.workers import environment, free_ports

# No process of a test lives longer.
LIMIT = 240


@contextlib.contextmanager
def started(count, command, absent=(), threads=1):
    """Yields the processes of workers that run a command, by index; none is left in the end."""
    ports, processes = free_ports(count), {}
    try:
        for index in set(range(count)) - set(absent):
            processes[index] = subprocess.Popen(
                command,
                env=environment(ports, index, threads),
                cwd=Path(__file__).parent,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                # A shell's background jobs ignore it, and their children inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def outputs(processes):
    """Returns exit code, output and errors of each process, when all have ended."""
    results = {}
    for index, process in processes.items():
        output, errors = process.communicate(timeout=LIMIT)
        results[index] = process.returncode, output, errors
    return results


def results(count, program, *arguments, **options):
    """Runs a Python program in workers; returns the last line that each printed, from JSON."""
    with started(count, [sys.executable, "-c", program, *arguments], **options) as processes:
        ended = outputs(processes)
    for code, _, errors in ended.values():
        assert code == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for _, output, _ in ended.values()]
