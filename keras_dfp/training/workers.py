"""Several processes that train one network together, as TF_CONFIG says; or this one alone.

The engine is `tf.distribute.MultiWorkerMirroredStrategy`. What it lacks is here: nobody waits for
ever for a worker that never starts, and what ends one worker ends all of them, with its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_dfp import internals
from keras_dfp.training.errors import RunError

# Seconds that a worker which has seen the end of another stays, so that the others see the end of
# that one too, and not of this.
LINGER = 5
_WORKER = re.compile(r"/job:worker/(?:replica:0/)?task:(\d+)")
_REPORTED = "keras-dfp: "


@dataclasses.dataclass
class Workers:
    """The workers of a training, seen from one of them.

    Attributes:
        addresses: Host and port of each.
        index: Which of them this is; worker 0 is the chief, who writes files and to the terminal.
        strategy: In whose scope the network is made.
    """

    addresses: list[str]
    index: int
    strategy: tf.distribute.Strategy

    def __post_init__(self) -> None:
        self.leaves = False

        @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.int32)])
        def total(x):
            return self.strategy.run(self._all_reduce, args=(x,))

        self._total = total

    @property
    def count(self) -> int:
        return len(self.addresses)

    @property
    def is_chief(self) -> bool:
        return self.index == 0

    def name(self, index: int) -> str:
        return f"worker {index} ({self.addresses[index]})"

    def share(self, images: int) -> slice:
        """Returns which of the images of a batch are this worker's: equally many, or one more."""
        return slice(images * self.index // self.count, images * (self.index + 1) // self.count)

    def gathered(self, content: bytes) -> list[bytes]:
        """Returns what each worker has passed: all must call it."""
        if self.count == 1:
            return [content]
        lengths = np.zeros(self.count, np.int32)
        lengths[self.index] = len(content)
        lengths = self._sum(lengths)
        # Whole words of 32 bits for each.
        ends = np.cumsum(-(-lengths // 4))
        if not ends[-1]:
            # TensorFlow's all-reduce of nothing is a segmentation fault.
            return [b""] * self.count
        words = np.zeros(ends[-1], np.int32)
        first = ends[self.index] - -(-len(content) // 4)
        words.view(np.uint8)[4 * first : 4 * first + len(content)] = np.frombuffer(
            content, np.uint8
        )
        everything = self._sum(words).tobytes()
        starts = [0, *(4 * ends[:-1]).tolist()]
        return [
            everything[start : start + length]
            for start, length in zip(starts, lengths.tolist(), strict=True)
        ]

    def from_chief(self, content: bytes) -> bytes:
        """Returns what the chief has passed: all must call it."""
        return self.gathered(content if self.is_chief else b"")[0]

    def leave(self) -> None:
        """Returns when all workers are here to end, by agreement: then nobody tells the others."""
        self.gathered(b"")
        self.leaves = True

    def check_equal(self, what: str, mine: dict[str, Any]) -> None:
        """Raises RunError unless all workers have the same; all must call it."""
        everyone = [json.loads(each) for each in self.gathered(json.dumps(mine).encode())]
        for index, other in enumerate(everyone):
            different = [key for key in other if other[key] != everyone[0][key]]
            if different:
                key = different[0]
                raise RunError(
                    f"All workers must have the same {what}, but {key} is {everyone[0][key]!r} for "
                    f"{self.name(0)} and {other[key]!r} for {self.name(index)}."
                )

    def _sum(self, x: np.ndarray) -> np.ndarray:
        return self._total(tf.constant(x)).numpy()

    def _all_reduce(self, x: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        # `identity`: what comes from outside of the replica is on no device.
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(x))


def alone() -> Workers:
    """Returns the one worker that this process is where there are no others."""
    return Workers(["here"], 0, tf.distribute.get_strategy())


@contextlib.contextmanager
def joined(timeout: float) -> Iterator[Workers]:
    """Yields the workers that TF_CONFIG names, when all have started; without it, this one alone.

    TensorFlow must not have done anything before. An error that leaves the block ends the other
    workers, who are told of it. So does the end of a worker, by whatever: within a second of its
    next step where its machine says so; a machine that falls silent is given up by TensorFlow after
    its own time.

    Args:
        timeout: Seconds to wait for the others.

    Raises:
        RunError: If TF_CONFIG is wrong, a worker has not started, or one has ended.
    """
    addresses, index = _cluster()
    if len(addresses) < 2:
        yield alone()
        return
    _rendezvous(addresses, index, timeout)
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except (tf.errors.OpError, RuntimeError) as error:
        raise RunError(
            f"Worker {index} ({addresses[index]}) cannot start TensorFlow's server: {error}"
        ) from error
    # TensorFlow takes note of it and does nothing.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    workers = Workers(addresses, index, strategy)
    try:
        yield workers
    except tf.errors.OpError as error:
        raise _ended(workers, error) from error
    except BaseException as error:
        if not workers.leaves:
            message = " ".join(str(error).split()) or type(error).__name__
            _report(f"{workers.name(index)} has stopped: {message}")
        raise


def _ended(workers: Workers, error: tf.errors.OpError) -> RunError:
    """Returns what to say when TensorFlow can no longer speak with the others, and tells them."""
    message = str(error)
    _, reported, rest = message.partition(_REPORTED)
    if reported:
        # Others have said why: the line, without what TensorFlow adds.
        return RunError(rest.splitlines()[0].split("\\n")[0] + " " + _ADVICE)
    # The last that is named is the one that did not answer.
    named = [int(index) for index in _WORKER.findall(message)]
    others = [index for index in named if index != workers.index]
    if not others:
        if not isinstance(error, _LOST):
            raise error
        what = "another worker has ended, or cannot be reached"
    else:
        what = f"{workers.name(others[-1])} has ended, or cannot be reached"
    _report(what)
    time.sleep(LINGER)
    return RunError(f"{what}. {_ADVICE}")


_ADVICE = "Start all workers again with --resume."
_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
)


def _report(message: str) -> None:
    """Makes what the others wait for fail with a message."""
    with contextlib.suppress(tf.errors.OpError, ValueError):
        internals.context().report_error_to_cluster(
            tf.errors.FAILED_PRECONDITION, _REPORTED + message
        )


def _cluster() -> tuple[list[str], int]:
    """Returns what TF_CONFIG says: the addresses of the workers, and which of them this is."""
    text = os.environ.get("TF_CONFIG", "")
    if not text.strip():
        return [], 0
    try:
        config = json.loads(text)
    except ValueError as error:
        raise _wrong(text, f"it is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise _wrong(text, "it is no object")
    if not (cluster := config.get("cluster")):
        return [], 0
    if not isinstance(cluster, dict) or set(cluster) != {"worker"}:
        raise _wrong(text, "its cluster must have workers, and nothing else")
    addresses, task = cluster["worker"], config.get("task")
    if not isinstance(addresses, list) or not addresses:
        raise _wrong(text, "its workers must be a list of addresses")
    for address in addresses:
        host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise _wrong(text, f"{address!r} is no host:port, of a port from 1 to 65535")
        if addresses.count(address) > 1:
            raise _wrong(text, f"{address} is there twice")
    if not isinstance(task, dict) or task.get("type") != "worker":
        raise _wrong(text, "its task must have the type worker")
    index = task.get("index")
    if isinstance(index, str) and index.isdecimal():
        index = int(index)
    if type(index) is not int or not 0 <= index < len(addresses):
        raise _wrong(text, f"the index of its task must be from 0 to {len(addresses) - 1}")
    return addresses, index


def _wrong(text: str, what: str) -> RunError:
    example = (
        '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, '
        '"task": {"type": "worker", "index": 0}}'
    )
    return RunError(
        "TF_CONFIG must name the workers, each once, and say which of them this is, as in "
        f"{example}; {what}; got {text}"
    )


def _rendezvous(addresses: list[str], index: int, timeout: float) -> None:
    """Returns when all workers are here.

    TensorFlow's own waiting can neither be limited nor interrupted. So each worker first listens at
    its address until all others have called there, and calls all others; their calls wait there if
    it has not come to listen to them.
    """
    end = time.monotonic() + timeout
    hello = json.dumps([addresses, index]).encode()
    others = set(range(len(addresses))) - {index}
    to_call = set(others)
    callers: set[int] = set()
    with _listener(addresses[index], index) as listener:
        while to_call or callers != others:
            for other in sorted(to_call):
                with contextlib.suppress(OSError):
                    with socket.create_connection(_host_and_port(addresses[other]), 1) as call:
                        call.sendall(hello)
                        to_call.discard(other)
            try:
                caller, _ = listener.accept()
            except TimeoutError:
                pass
            else:
                with caller, contextlib.suppress(OSError):
                    callers |= _caller(caller, addresses, index)
            if time.monotonic() > end and (missing := to_call | (others - callers)):
                names = ", ".join(f"{i} ({addresses[i]})" for i in sorted(missing))
                raise RunError(
                    f"Not all workers have started within {timeout:.0f} s: worker {index} "
                    f"({addresses[index]}) does not hear from worker {names}. The same command "
                    "must run on every machine, each with its own index in TF_CONFIG, and these "
                    "addresses must be reachable; --worker-timeout waits longer."
                )


def _caller(caller: socket.socket, addresses: list[str], index: int) -> set[int]:
    """Returns which worker a caller is, in a set, empty if it is none."""
    caller.settimeout(1)
    text = b""
    while part := caller.recv(4096):
        text += part
        if len(text) > 2**20:
            return set()
    try:
        theirs, number = json.loads(text)
    except ValueError:
        return set()
    if theirs != addresses:
        raise RunError(
            f"TF_CONFIG must name the same workers everywhere; got {addresses} in worker {index}, "
            f"and {theirs} in worker {number}."
        )
    if number == index:
        raise RunError(f"Two workers have index {index} in TF_CONFIG.")
    return {number}


def _listener(address: str, index: int) -> socket.socket:
    host, port = _host_and_port(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        try:
            return _bound(family, host, port)
        except OSError as error:
            # Behind the name of a service, say: as TensorFlow, at every address of this machine.
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return _bound(family, "", port)
    except OSError as error:
        raise RunError(
            f"Worker {index} cannot listen at {address}: {error.strerror}. Choose another port in "
            "TF_CONFIG, the same on every machine, or end what uses it."
        ) from error


def _bound(family: int, host: str, port: int) -> socket.socket:
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
        listener.settimeout(0.2)
    except BaseException:
        listener.close()
        raise
    return listener


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
