"""One training, by its network's recipe: from its settings to its last checkpoint.

A run lives in a folder:

    run.json          what it is: settings, recipe, classes, number of images, versions
    checkpoint.npz    how far it has come; everything it needs to go on
    log.csv           a line for each epoch
    tensorboard/      loss and learning rate over the steps, results over the epochs
    model.keras       the trained model, once it is finished
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dfp import zoo
from keras_dfp.files import locked, written_whole
from keras_dfp.recipe import Plateau
from keras_dfp.training import checkpoint, network
from keras_dfp.training.errors import DataError, RunError
from keras_dfp.training.log import Log, Row, write_csv
from keras_dfp.training.network import Stopped
from keras_dfp.training.pipeline import Pipeline
from keras_dfp.training.schedule import Plateaus, learning_rate
from keras_dfp.training.settings import Settings
from keras_dfp.training.sources import Source
from keras_dfp.version import __version__


@dataclasses.dataclass
class Progress:
    """How far a run has come: what a checkpoint holds besides variables.

    Attributes:
        step: Steps done.
        sums: Of the epoch that goes on: loss, top-1 hits, top-5 hits, images, seconds.
        losses: The loss of every step.
        history: A row for every epoch done.
        plateaus: What the schedule has seen.
        bad: Unreadable images, of the training and of the test data.
        diverged: The step at which the loss, of training or of the test, was no longer a number.
    """

    step: int = 0
    sums: list[float] = dataclasses.field(default_factory=lambda: [0.0] * 5)
    losses: list[float] = dataclasses.field(default_factory=list)
    history: list[Row] = dataclasses.field(default_factory=list)
    plateaus: Plateaus = dataclasses.field(default_factory=Plateaus)
    bad: list[list[int]] = dataclasses.field(default_factory=lambda: [[], []])
    diverged: int | None = None

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Progress:
        return cls(**{**state, "plateaus": Plateaus(**state["plateaus"])})


class Run:
    """A training that can stop at any moment and go on.

    Args:
        settings: What it is.
        folder: Where it lives.
        data: What to train on and what to test on: `settings.find_data()`.
        resume: Whether to go on if there is such a run in the folder.

    Raises:
        RunError: If the folder holds a run and `resume` is false, or another run; if the network
            cannot be built for such images.
    """

    def __init__(
        self, settings: Settings, folder: Path, data: tuple[Source, Source], resume: bool = False
    ):
        self.settings = settings = settings.resolved()
        self.folder = folder
        self.training, self.test = (
            Pipeline(
                source,
                settings.recipe.images,
                settings.batch_size,
                zoo.preprocessing(settings.network),
                settings.skip_bad,
            )
            for source in data
        )
        if not self.training.steps:
            raise RunError(
                f"A batch of {settings.batch_size} images is more than the "
                f"{len(data[0])} there are to train on."
            )
        self.steps = settings.steps or settings.epochs * self.training.steps
        self.epochs = math.ceil(self.steps / self.training.steps)

        # Names and memory of an earlier run; its layers' names would go on counting.
        keras.utils.clear_session()
        keras.utils.set_random_seed(settings.seed)
        if settings.deterministic:
            tf.config.experimental.enable_op_determinism()
        shape = self.training.image_shape()
        self.model = network.build(settings, shape, len(data[0].classes))
        self.optimizer = network.optimizer(settings.recipe)
        self.optimizer.build(self.model.trainable_variables)
        self._train_step = network.train_step(
            self.model, self.optimizer, settings.recipe, settings.label_smoothing
        )
        self._test_step = network.test_step(self.model)
        self.progress = Progress()
        self._open(resume, {"input_shape": list(shape), **settings.facts(data)})

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        progress = self.progress
        return progress.diverged is not None or (
            progress.step == self.steps and not self._epoch_is_open
        )

    def train(self, checkpoint_steps: int = 100) -> None:
        """Trains to the end, or until the loss is no longer a number.

        Args:
            checkpoint_steps: Steps between checkpoints; there is one after every epoch, too.

        Raises:
            KeyboardInterrupt: After Ctrl-C, when the step is done and a checkpoint is written. A
                second Ctrl-C does not wait.
            DataError: If an image cannot be read and is not to be skipped.
            BlockingIOError: If another process is training it.
        """
        with locked(self.folder):
            # What a process that was killed while it wrote has left.
            for folder in self.folder.glob(".writing-*"):
                shutil.rmtree(folder)
            if not self.finished:
                self._train(checkpoint_steps)
            # Also when the run was killed just before.
            target = self.folder / "model.keras"
            if self.progress.diverged is None and not target.exists():
                with written_whole(target) as path:
                    network.deployable(self.model, self.settings).save(path)

    def _train(self, checkpoint_steps: int) -> None:
        size = self.settings.batch_size
        log = Log(self.folder, self.epochs, self.steps * size, self.progress.step * size)
        with _deferred_interrupt() as interrupted, contextlib.closing(log):
            try:
                while not self.finished:
                    for rate in self._steps_of_epoch():
                        log.step(self.progress.step, size, self.progress.losses[-1], rate)
                        if interrupted:
                            raise Stopped
                        if self.progress.step % checkpoint_steps == 0:
                            self.save()
                    if self.progress.diverged is None:
                        self._end_epoch(interrupted)
                    if self.progress.diverged is None:
                        log.epoch(self.progress.history)
                    self.save()
            except DataError:
                self.save()
                raise
            except Stopped:
                self.save()
                raise KeyboardInterrupt from None

    def save(self) -> None:
        """Writes a checkpoint."""
        self.progress.bad = [sorted(part.bad) for part in (self.training, self.test)]
        checkpoint.save(
            self.folder / "checkpoint.npz",
            [*self.model.variables, *self.optimizer.variables],
            dataclasses.asdict(self.progress),
        )

    def _open(self, resume: bool, model: dict[str, Any]) -> None:
        """Goes on with the run in the folder, or starts one."""
        this = {"settings": dataclasses.asdict(self.settings), **model}
        if not (self.folder / "run.json").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            versions = {
                "keras_dfp": __version__,
                "keras": keras.__version__,
                "tensorflow": tf.__version__,
            }
            with written_whole(self.folder / "run.json") as path:
                path.write_text(json.dumps({**this, "versions": versions}, indent=1))
            return
        if not resume:
            raise RunError(f"{self.folder} holds a run already.")
        known = read(self.folder)
        if different := self.settings.differences(known, model):
            raise RunError(f"{self.folder} holds another run: {'; '.join(different)}.")
        if (self.folder / "checkpoint.npz").exists():
            state = checkpoint.load(
                self.folder / "checkpoint.npz", [*self.model.variables, *self.optimizer.variables]
            )
            self.progress = Progress.from_dict(state)
            self.training.bad, self.test.bad = map(set, self.progress.bad)
            if self.progress.history:
                write_csv(self.folder / "log.csv", self.progress.history)

    @property
    def _epoch_is_open(self) -> bool:
        return self.progress.sums[3] > 0

    def _steps_of_epoch(self) -> Iterator[float]:
        """Does the steps that are left of the epoch; yields the learning rate of each, done."""
        progress, size = self.progress, self.training.steps
        epoch = len(progress.history)
        first, end = progress.step - epoch * size, min(size, self.steps - epoch * size)
        if first == end:
            return
        batches = self.training.training(self.settings.seed, epoch, first)
        start = time.perf_counter()
        for number, (images, labels) in enumerate(batches, first + 1):
            rate = learning_rate(
                self.settings.recipe, progress.step / self.steps, progress.plateaus.reductions
            )
            self.optimizer.learning_rate = rate
            sums = self._train_step(images, labels).numpy().tolist()
            seconds, start = time.perf_counter() - start, time.perf_counter()
            progress.sums = [a + b for a, b in zip(progress.sums, (*sums, seconds), strict=True)]
            progress.losses.append(sums[0] / sums[3])
            progress.step += 1
            if not np.isfinite(sums[0]):
                progress.diverged = progress.step
            yield rate
            if number == end or progress.diverged:
                return

    def _end_epoch(self, interrupted: list) -> None:
        """Tests, and adds the epoch to the history."""
        progress, schedule = self.progress, self.settings.recipe.schedule
        test = network.evaluate(self._test_step, self.test, interrupted)
        if np.isnan(test["loss"]):
            progress.diverged = progress.step
            return
        loss, top1, top5, images, seconds = progress.sums
        row = {
            "epoch": len(progress.history) + 1,
            "step": progress.step,
            "learning_rate": float(self.optimizer.learning_rate),
            "loss": loss / images,
            "top1": top1 / images,
            "top5": top5 / images,
            **{f"test_{key}": value for key, value in test.items()},
            "seconds": seconds,
            "images_per_second": images / seconds,
        }
        progress.history.append(row)
        progress.sums = [0.0] * 5
        if isinstance(schedule, Plateau):
            patience = max(1, round(schedule.patience * self.epochs / self.settings.recipe.epochs))
            progress.plateaus.update(schedule, test["top1"], patience)


def read(folder: Path) -> dict[str, Any]:
    """Returns the content of a run's `run.json`.

    Raises:
        RunError: If the folder holds no run.
    """
    try:
        return json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} is not the folder of a run: {error}") from error


def load(folder: Path, **changes: Any) -> tuple[Settings, keras.Model]:
    """Returns the settings of a run, and its network with the weights of its last checkpoint.

    Args:
        folder: The run's.
        **changes: Settings that are to be others.

    Raises:
        RunError: If the folder holds no run, or one without a checkpoint, or one that diverged.
    """
    known = read(folder)
    settings = Settings(**{**known["settings"], **changes})
    if not (folder / "checkpoint.npz").exists():
        raise RunError(f"The run in {folder} has no checkpoint yet.")
    model = network.build(settings, tuple(known["input_shape"]), len(known["classes"]))
    diverged = checkpoint.load(folder / "checkpoint.npz", model.variables)["diverged"]
    if diverged is not None:
        raise RunError(
            f"The run in {folder} has no trained network: its loss was no longer a number after "
            f"step {diverged}."
        )
    return settings, model


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[list]:
    """Yields a list that Ctrl-C puts something in, the first time; the second is as usual."""
    interrupted = []

    def note(number, frame):
        interrupted.append(number)
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
