"""What it takes to exchange gradients: steps a second and bytes on the wire, of several workers.

The workers are processes of this machine, each of so many threads, in the training that
`keras-dfp train` runs: on random images, with every kind of exchange in turns. They speak over the
loopback device. Where the machine lets its users make a network namespace, they have one of their
own, and the bytes are the device's: of this training, protocols included, and of nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from keras_dfp.benchmarks.machine import milliseconds, quartiles
from keras_dfp.benchmarks.run import Doing, how_ended

# Steps of one exchange before the turn of the next, and seconds of silence between them, in whose
# middle bytes are counted: what belongs to a turn is over, and the next has not begun.
TURN, SILENCE = 10, 0.1
# Seconds until all workers have loaded TensorFlow.
TIMEOUT = 300
ALONE = "none"


def measure(settings: dict) -> Iterator[Doing | dict]:
    """Yields a row per number of workers and exchange; settings: network, policy, batch, counts,
    exchanges, repeats, threads, own_network."""
    if settings["own_network"]:
        _start_loopback()
    for i, count in enumerate(settings["counts"]):
        plural = "s" if count > 1 else ""
        share = i / len(settings["counts"])
        yield Doing(f"{settings['network']}, {count} worker{plural}", share)
        yield from _rows(count, settings)


def _rows(count: int, settings: dict) -> list[dict]:
    command = [sys.executable, "-m", __name__, json.dumps(settings)]
    ports = free_ports(count)
    with contextlib.ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in ports]
        processes = []
        for index, log in enumerate(errors):
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment(ports, index, settings["threads"]),
                    stdout=subprocess.PIPE if index == 0 else log,
                    stderr=log,
                    text=True,
                )
            )
            stack.callback(processes[-1].wait)
            stack.callback(processes[-1].kill)
        output, _ = processes[0].communicate()
        for index, (process, log) in enumerate(zip(processes, errors, strict=True)):
            if code := process.wait():
                log.seek(0)
                # Workers that see another end name it.
                raise RuntimeError(how_ended(f"Worker {index} of {count}", code, log.read()))
    return json.loads(output)


def free_ports(count: int) -> list[int]:
    """Returns ports of this machine at which nobody listens."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def environment(ports: list[int], index: int, threads: int | None) -> dict[str, str]:
    """Returns the environment of one of the workers at ports of this machine.

    Args:
        ports: Of all of them.
        index: Which it is.
        threads: That it may have; None for all.
    """
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
    found = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, "TF_CONFIG": json.dumps(config)}
    if threads is not None:
        found.update(OMP_NUM_THREADS=str(threads), TF_NUM_INTRAOP_THREADS=str(threads))
    return found


# ---- one of the workers --------------------------------------------------------------------------


def _work(settings: dict) -> list[dict]:
    """Returns the rows, in worker 0; the others return none."""
    # Not above: TensorFlow must not have done anything before the workers have joined.
    from keras_dfp.training.workers import joined

    with joined(TIMEOUT) as workers:
        rows = _measured(workers, settings)
        workers.leave()
    return rows if workers.is_chief else []


def _measured(workers, settings: dict) -> list[dict]:
    import tensorflow as tf

    from keras_dfp import zoo
    from keras_dfp.training import network
    from keras_dfp.training.settings import Settings

    this = Settings.of(
        settings["network"],
        "random",
        policy=settings["policy"],
        batch_size=settings["batch"],
    )
    example = zoo.load(this.network)
    shape, classes = example.input_shape[1:], example.output_shape[-1]
    with workers.strategy.scope():
        model = network.build(this, shape, classes)
        optimizer = network.optimizer(this.recipe)
        optimizer.build(model.trainable_variables)
    share = workers.share(this.batch_size)
    images = tf.random.normal([share.stop - share.start, *shape])
    labels = tf.random.uniform([len(images)], maxval=classes, dtype=tf.int32)
    exchanges = settings["exchanges"] if workers.count > 1 else [ALONE]
    ways = {
        exchange: network.train_step(
            model,
            optimizer,
            this.recipe,
            0.0,
            workers,
            "float32" if exchange == ALONE else exchange,
        )
        for exchange in exchanges
    }
    for step in ways.values():
        _turn(step, images, labels, 1)
    taken: dict[str, list[float]] = {exchange: [] for exchange in ways}
    sent = dict.fromkeys(ways, 0)
    turn = min(TURN, settings["repeats"])
    for _ in range(math.ceil(settings["repeats"] / turn)):
        for exchange, step in ways.items():
            before = loopback_bytes()
            taken[exchange] += _turn(step, images, labels, turn)
            time.sleep(SILENCE / 2)
            sent[exchange] += loopback_bytes() - before
            time.sleep(SILENCE / 2)
    trained = sum(math.prod(weight.shape) for weight in model.trainable_variables)
    return [
        {
            "workers": workers.count,
            "exchange": exchange,
            **dict(zip(("low_ms", "step_ms", "high_ms"), quartiles(each), strict=True)),
            "bytes": sent[exchange] / len(each) if settings["own_network"] else None,
            "ring_bytes": _ring(workers.count, exchange, trained),
        }
        for exchange, each in taken.items()
    ]


def _turn(step, images, labels, steps: int) -> list[float]:
    """Returns the milliseconds of steps; each is over when the sum over all workers is there."""
    return [milliseconds(lambda: step(images, labels).numpy()) for _ in range(steps)]


def _ring(count: int, exchange: str, numbers: int) -> int:
    """Returns the bytes that all workers of a ring send to sum so many numbers."""
    return 2 * (count - 1) * numbers * (2 if exchange == "dfp16" else 4)


# ---- the loopback device -------------------------------------------------------------------------


def _start_loopback() -> None:
    """Sets it up: in a new namespace it is down."""
    up, set_flags = 0x1, 0x8914  # IFF_UP, SIOCSIFFLAGS
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh22x", b"lo", up))


def loopback_bytes() -> int:
    """Returns the bytes that the loopback device of this namespace has sent."""
    with open("/proc/self/net/dev") as lines:
        for line in lines:
            name, _, numbers = line.partition(":")
            if name.strip() == "lo":
                return int(numbers.split()[8])
    return 0


if __name__ == "__main__":
    # TensorFlow's libraries may print; what was standard output is for the rows alone.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with results:
        json.dump(_work(json.loads(sys.argv[1])), results)
