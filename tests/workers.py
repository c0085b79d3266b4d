"""Worker processes on loopback, as `tf.distribute.MultiWorkerMirroredStrategy` wants them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

# No process of a test lives longer.
LIMIT = 240


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def environment(ports, index, threads=1):
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
    return {
        **os.environ,
        "TF_CONFIG": json.dumps(config),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "OMP_NUM_THREADS": str(threads),
        "TF_NUM_INTRAOP_THREADS": str(threads),
    }


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
