"""What a run tells while it goes on: a progress bar, a line for each epoch, CSV, TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import tensorflow as tf
from tqdm import tqdm

from keras_dfp.files import shown, written_whole
from keras_dfp.training.errors import RunError
from keras_dfp.training.sources import reason

# Steps between points in TensorBoard.
INTERVAL = 10
# Seconds between lines where there is no terminal to draw a bar on.
QUIET = 60

Row = dict[str, int | float]
# What there is of an epoch; of late also `peak_memory_mb`.
KEYS = (
    *("epoch", "step", "learning_rate", "loss", "top1", "top5"),
    *("test_loss", "test_top1", "test_top5", "seconds", "images_per_second"),
)


class Pace:
    """How fast long work goes on, tests and checkpoints included, and how long it will take.

    Args:
        total: How much there is to do: images, for instance.
    """

    def __init__(self, total: int):
        self.total = total
        self.done = 0
        self._start = time.monotonic()

    def update(self, done: int) -> None:
        """Notes that so much more is done."""
        self.done += done

    @property
    def left(self) -> str:
        """The time left, as hours:minutes:seconds; `"?"` before anything is done."""
        if not self.done:
            return "?"
        seconds = (time.monotonic() - self._start) / self.done * max(0, self.total - self.done)
        return tqdm.format_interval(seconds)

    def __str__(self) -> str:
        return f"{self.done / (time.monotonic() - self._start):.0f} img/s, {self.left} left"


class Log:
    """The log of one run, in its folder: `log.csv`, and `tensorboard`.

    Args:
        folder: The run's folder.
        epochs: Epochs in all.
        images: Images in all, over all epochs.
        done: How many of them an earlier part of the run has trained on.
    """

    def __init__(self, folder: Path, epochs: int, images: int, done: int):
        self.folder = folder
        self.epochs = epochs
        self.pace = Pace(images - done)
        self._said = time.monotonic()
        # Only a terminal understands a bar, which draws over itself.
        self.bar = tqdm(
            total=images, initial=done, unit="img", disable=None, dynamic_ncols=True, smoothing=0.05
        )
        with self._writing():
            self.writer = tf.summary.create_file_writer(str(folder / "tensorboard"))
            self.writer.flush()

    def step(self, step: int, images: int, loss: float, rate: float, worst: str = "") -> None:
        """Notes a step of training on some images; `worst` says which layer is doing worst."""
        text = f"loss {loss:.4f}, {worst}" if worst else f"loss {loss:.4f}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(images)
        self.pace.update(images)
        if self.bar.disable and time.monotonic() - self._said > QUIET:
            self._said = time.monotonic()
            print(f"step {step}: {text}, {self.pace}", flush=True)
        if step % INTERVAL == 0:
            self._summaries(step, {"loss": loss, "learning_rate": rate})

    def epoch(self, history: list[Row]) -> None:
        """Notes an epoch, the last of a run's history."""
        row = history[-1]
        line = (
            f"epoch {row['epoch']}/{self.epochs}: "
            f"loss {row['loss']:.4f}, top-1 {row['top1']:.2%}, top-5 {row['top5']:.2%}; "
            f"test loss {row['test_loss']:.4f}, top-1 {row['test_top1']:.2%}, "
            f"top-5 {row['test_top5']:.2%}; {row['images_per_second']:.0f} img/s"
            + (f", {self.pace.left} left" if row["epoch"] < self.epochs else "")
        )
        with tqdm.external_write_mode():
            print(line, flush=True)
        self._summaries(int(row["step"]), {f"epoch/{key}": value for key, value in row.items()})
        write_csv(self.folder / "log.csv", history)

    def close(self) -> None:
        self.bar.close()
        with self._writing():
            self.writer.close()

    def _summaries(self, step: int, values: Row) -> None:
        with self._writing(), self.writer.as_default(step):
            for key, value in values.items():
                tf.summary.scalar(key, value)
            self.writer.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except tf.errors.OpError as error:
            folder = shown(self.folder / "tensorboard")
            raise RunError(f"Cannot write to {folder}: {reason(error)}") from error


class Silence:
    """The log of a worker that is not the chief."""

    def step(self, step: int, images: int, loss: float, rate: float, worst: str = "") -> None:
        """As `Log.step`."""

    def epoch(self, history: list[Row]) -> None:
        """As `Log.epoch`."""

    def close(self) -> None:
        """As `Log.close`."""


def check_rows(rows: list[Row], keys: Sequence[str] = KEYS) -> None:
    """Raises ValueError if rows that were read from a file are not those of epochs."""
    for number, row in enumerate(rows, 1):
        if missing := [key for key in keys if key not in row]:
            raise ValueError(f"the history of epoch {number} lacks {', '.join(missing)}.")


def write_csv(path: Path, rows: list[Row]) -> None:
    """Writes rows, whole; what the rows of an older version lack is left empty."""
    keys = dict.fromkeys(key for row in rows for key in row)
    with written_whole(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
