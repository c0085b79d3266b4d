"""One training, by its network's recipe: from its settings to its last checkpoint.

A run lives in a folder:

    run.json          what it is: settings, recipe, classes, number of images, versions
    checkpoint.npz    how far it has come; everything it needs to go on
    log.csv           a line for each epoch
    tensorboard/      loss and learning rate over the steps, results over the epochs
    statistics.csv    the numbers of the layers in every so many steps, if they are asked for,
    statistics/       and for TensorBoard
    model.keras       the trained model, once it is finished
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dfp import comparing, tables, zoo
from keras_dfp.files import locked, missing, read_json, remove_empty, shown, written_whole
from keras_dfp.info import peak_memory
from keras_dfp.recipe import Plateau
from keras_dfp.report import describe
from keras_dfp.statistics import NonFinite, NonFiniteError, Statistics
from keras_dfp.training import checkpoint, network
from keras_dfp.training.errors import DataError, RunError
from keras_dfp.training.log import Log, Row, Silence, check_rows, write_csv
from keras_dfp.training.network import Stopped
from keras_dfp.training.pipeline import Pipeline
from keras_dfp.training.schedule import Plateaus, learning_rate
from keras_dfp.training.settings import Settings
from keras_dfp.training.sources import Source
from keras_dfp.training.workers import Workers, alone
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

    def __post_init__(self) -> None:
        check_rows(self.history)
        if len(self.losses) != self.step or len(self.sums) != 5 or len(self.bad) != 2:
            raise ValueError(
                "there must be a loss for each step, five sums and two lists of bad images; got "
                f"{len(self.losses)} for {self.step}, {len(self.sums)} and {len(self.bad)}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What `run.json` holds: settings, and what else makes a run what it is.

    Attributes:
        settings: The run's.
        input_shape: Height, width and channels of an image.
        recipe: The recipe, as it was.
        classes: The names of the classes.
        images: How many there were to train on, and to test on.
        versions: Of what wrote it.
    """

    settings: Settings
    input_shape: list[int]
    recipe: dict[str, Any]
    classes: list[str]
    images: list[int]
    versions: dict[str, str]

    def __post_init__(self) -> None:
        if len(self.input_shape) != 3 or min(self.input_shape) < 1:
            raise ValueError(f"input_shape must be three sizes above 0; got {self.input_shape!r}.")


class Run:
    """A training that can stop at any moment and go on.

    Args:
        settings: What it is.
        folder: Where it lives.
        data: What to train on and what to test on: `settings.find_data()`.
        resume: Whether to go on if there is such a run in the folder.
        workers: Who trains it together: each makes such a run, of the same settings. The folder is
            that of worker 0, the chief; the others neither read nor write any.
        compare: Names, paths or patterns of layers that are compared with float32 in the steps that
            `train` looks at.

    Raises:
        RunError: If the workers do not agree; if the folder holds a run and `resume` is false, or
            another run; if the network cannot be built for such images; if there are no such
            weights to start from, or no such layers to compare.

    Attributes:
        new_classifier: Whether the weights that it starts from are for other classes, so that the
            classifier is a new one.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        data: tuple[Source, Source],
        resume: bool = False,
        workers: Workers | None = None,
        compare: Sequence[str] = (),
    ):
        self.settings = settings
        self.workers = workers = workers or alone()
        self.folder = folder
        self.training, self.test = (
            Pipeline(
                source,
                settings.recipe.images,
                settings.batch_size,
                zoo.preprocessing(settings.network, settings.weights),
                settings.skip_bad,
                workers,
            )
            for source in data
        )
        # Of whole images, all have the same size.
        if self.training.steps:
            self.test.shape = self.training.shape
        else:
            raise RunError(
                f"A batch of {settings.batch_size} images is more than the "
                f"{len(data[0])} there are to train on."
            )
        if settings.batch_size < workers.count:
            raise RunError(
                f"A batch of {settings.batch_size} images is too small for {workers.count} workers."
            )
        facts = {"input_shape": list(self.training.shape), **settings.facts(data)}
        known = {**dataclasses.asdict(settings), **facts, "versions": _versions()}
        del known["data"]  # The same images may lie elsewhere.
        workers.check_equal("settings and data", known)
        self.steps = settings.steps or settings.epochs * self.training.steps
        self.epochs = math.ceil(self.steps / self.training.steps)

        # Names and memory of an earlier run; its layers' names would go on counting.
        keras.utils.clear_session()
        keras.utils.set_random_seed(settings.seed)
        if settings.deterministic:
            tf.config.experimental.enable_op_determinism()
        with workers.strategy.scope():
            self.model = network.build(settings, self.training.shape, len(data[0].classes))
            self.new_classifier = False
            if settings.weights is not None and not self._checkpoint.exists():
                self.new_classifier = network.start_from(settings.weights, self.model, settings)
            if settings.freeze:
                network.freeze(self.model)
            if settings.sync_batch_norm:
                network.synchronize(self.model)
            self.optimizer = network.optimizer(settings.recipe)
            self.optimizer.build(self.model.trainable_variables)
        self._train_step = network.train_step(
            self.model,
            self.optimizer,
            settings.recipe,
            settings.label_smoothing,
            workers,
            settings.gradient_exchange,
        )
        self._test_step = network.test_step(self.model)
        self.progress = Progress()
        self._statistics: Statistics | None = None
        self._compare = tuple(compare)
        # If this process has begun it: what was in its folder before, and which folders it made.
        self._begun: tuple[set[Path], list[Path]] | None = None
        if workers.is_chief:
            if compare:
                on_integers = [row["path"] for row in describe(self.model).rows if row["format"]]
                if words := comparing.unmatched(compare, on_integers):
                    raise RunError(f"--compare {words}")
            self._open(resume, facts)
        self._load()

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        progress = self.progress
        return progress.diverged is not None or (
            progress.step == self.steps and not self._epoch_is_open
        )

    def train(
        self,
        checkpoint_steps: int = 100,
        statistics: int | None = None,
        stop_on_nonfinite: bool = False,
    ) -> None:
        """Trains to the end, or until the loss is no longer a number.

        Args:
            checkpoint_steps: Steps between checkpoints; there is one after every epoch, too.
            statistics: Steps of which one is looked at, see `keras_dfp.statistics`; None for none.
            stop_on_nonfinite: Whether to stop in the first step with a tensor, a weight or a loss
                that is not finite. The checkpoint is then the last from before: one is written
                at the start, and none with a weight that is not finite.

        Raises:
            NonFiniteError: If it stopped on a tensor that is not finite.
            KeyboardInterrupt: After Ctrl-C, when the step is done and a checkpoint is written. A
                second Ctrl-C does not wait.
            DataError: If an image cannot be read and is not to be skipped.
            BlockingIOError: If another process is training it.
        """
        chief = self.workers.is_chief
        with locked(self.folder) if chief else contextlib.nullcontext():
            if chief:
                # What a process that was killed while it wrote has left.
                for folder in self.folder.glob(".writing-*"):
                    shutil.rmtree(folder)
            # Perhaps another process has come further in the meantime.
            self._load()
            if not self.finished:
                try:
                    self._train(checkpoint_steps, statistics, stop_on_nonfinite)
                except Exception:
                    self._take_back()
                    raise
            # Also when the run was killed just before.
            target = self.folder / "model.keras"
            if chief and self.progress.diverged is None and not target.exists():
                with written_whole(target) as path:
                    network.deployable(self.model, self.settings).save(path)
            # Nobody leaves before all is written.
            self.workers.leave()

    def _train(self, checkpoint_steps: int, every: int | None, stop_on_nonfinite: bool) -> None:
        size = self.settings.batch_size
        chief = self.workers.is_chief
        log: Log | Silence = Silence()
        if chief:
            log = Log(self.folder, self.epochs, self.steps * size, self.progress.step * size)
        with contextlib.ExitStack() as stack:
            interrupted = stack.enter_context(_deferred_interrupt())
            stack.enter_context(contextlib.closing(log))
            if (every is not None and chief) or stop_on_nonfinite:
                self._statistics = Statistics(
                    every if chief else None,
                    self.folder if every and chief else None,
                    compare=self._compare if every and chief and self._compare else None,
                    stop_on_nonfinite=stop_on_nonfinite,
                )
                stack.callback(self._statistics.stop)
                try:
                    self._statistics.start(self.progress.step)
                except ValueError as error:
                    raise RunError(str(error)) from error
            if stop_on_nonfinite and not self._checkpoint.exists():
                self.save()
            try:
                while not self.finished:
                    for rate in self._steps_of_epoch(interrupted):
                        worst = self._statistics.worst() if self._statistics else ""
                        log.step(self.progress.step, size, self.progress.losses[-1], rate, worst)
                        if self._stop:
                            raise Stopped
                        if self.progress.step % checkpoint_steps == 0:
                            self.save()
                    if self.progress.diverged is None:
                        self._end_epoch(interrupted)
                    if self.progress.diverged is None:
                        log.epoch(self.progress.history)
                    self.save()
            except DataError:
                if self.progress.step:
                    self.save()
                raise
            except Stopped:
                self.save()
                self.workers.leave()
                raise KeyboardInterrupt from None

    def save(self) -> None:
        """Writes a checkpoint, if this is the worker that does."""
        if not self.workers.is_chief:
            return
        self.progress.bad = [sorted(part.bad) for part in (self.training, self.test)]
        variables = [*self.model.variables, *self.optimizer.variables]
        if self._stops_on_nonfinite:
            for variable in variables:
                if not np.isfinite(variable.numpy()).all():
                    what = NonFinite(variable.path, "weight", self.progress.step, 0, 1)
                    raise NonFiniteError(what)
        checkpoint.save(self._checkpoint, variables, dataclasses.asdict(self.progress))

    @property
    def _stops_on_nonfinite(self) -> bool:
        return self._statistics is not None and self._statistics.stop_on_nonfinite

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.npz"

    def _open(self, resume: bool, model: dict[str, Any]) -> None:
        """Goes on with the run in the folder, or starts one."""
        lacking = missing(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        before = set(self.folder.iterdir())
        if self._started(model):
            self._begun = before, lacking
            return
        if not resume:
            raise RunError(f"{shown(self.folder)} holds a run already.")
        known = dataclasses.asdict(read(self.folder))
        if different := self.settings.differences(known, model):
            raise RunError(f"{shown(self.folder)} holds another run: {'; '.join(different)}.")

    def _take_back(self) -> None:
        """Leaves nothing of a run that has failed in its first step.

        It would stand in the way of the same command, put right.
        """
        if self._begun is None or self.progress.step or self._checkpoint.exists():
            return
        before, lacking = self._begun
        for path in set(self.folder.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        remove_empty(lacking)

    def _started(self, model: dict[str, Any]) -> bool:
        """Writes `run.json`, unless there is one; returns whether it did."""
        path = self.folder / "run.json"
        if path.exists():
            return False
        settings = dataclasses.asdict(self.settings)
        content = {"settings": settings, **model, "versions": _versions()}
        try:
            with written_whole(path) as temporary:
                temporary.write_text(json.dumps(content, indent=1))
                # Of processes that start at once, one succeeds; renaming, they all would.
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    raise
                except OSError:
                    # Some file systems have no links.
                    pass
        except FileExistsError:
            return False
        return True

    def _load(self) -> None:
        """Goes on from the chief's checkpoint, if there is one."""
        exists, content = self._checkpoint.exists(), None
        if self.workers.count > 1:
            chief = self.workers.is_chief
            content = self.workers.from_chief(
                self._checkpoint.read_bytes() if chief and exists else b""
            )
            exists = bool(content)
        if not exists:
            return
        variables = [*self.model.variables, *self.optimizer.variables]
        state = checkpoint.load(self._checkpoint, variables, content)
        progress = _progress(self._checkpoint, state)
        done, size = len(progress.history), self.training.steps
        finished = (progress.step, done) == (self.steps, self.epochs)
        goes_on = done * size <= progress.step <= min((done + 1) * size, self.steps)
        in_epoch = not finished and progress.step > done * size
        if not (finished or goes_on) or in_epoch != (progress.sums[3] > 0):
            raise RunError(
                f"{shown(self._checkpoint)} is spoiled: {progress.step} steps and {done} epochs of "
                f"{size} steps do not go together."
            )
        self.progress = progress
        self.training.bad, self.test.bad = map(set, progress.bad)
        if progress.history and self.workers.is_chief:
            write_csv(self.folder / "log.csv", progress.history)

    @property
    def _epoch_is_open(self) -> bool:
        return self.progress.sums[3] > 0

    def _steps_of_epoch(self, interrupted: list) -> Iterator[float]:
        """Does the steps that are left of the epoch; yields the learning rate of each, done.

        `_stop` says after each whether one of the workers is interrupted: the same to all of them.
        """
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
            if self._statistics is not None:
                self._statistics.before(progress.step)
            note = tf.constant(float(bool(interrupted)))
            *sums, notes = self._train_step(images, labels, note).numpy().tolist()
            self._stop = bool(notes if self.workers.count > 1 else interrupted)
            if self._statistics is not None:
                self._statistics.after(progress.step + 1)
            if self._stops_on_nonfinite and not np.isfinite(sums[0]):
                raise NonFiniteError(NonFinite("", "loss", progress.step + 1, 0, 1))
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
            "learning_rate": float(keras.ops.convert_to_numpy(self.optimizer.learning_rate)),
            "loss": loss / images,
            "top1": top1 / images,
            "top5": top5 / images,
            **{f"test_{key}": value for key, value in test.items()},
            "seconds": seconds,
            "images_per_second": images / seconds,
            "peak_memory_mb": peak_memory() / 1e6,
        }
        progress.history.append(row)
        progress.sums = [0.0] * 5
        if isinstance(schedule, Plateau):
            patience = max(1, round(schedule.patience * self.epochs / self.settings.recipe.epochs))
            progress.plateaus.update(schedule, test["top1"], patience)


def _versions() -> dict[str, str]:
    return {
        "keras_dfp": __version__,
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
    }


def read(folder: Path) -> Facts:
    """Returns what a run's `run.json` says.

    Raises:
        RunError: If the folder holds no run, or one of another version.
    """
    try:
        content = read_json(folder / "run.json")
    except (OSError, ValueError) as error:
        raise RunError(f"{shown(folder)} is not the folder of a run: {error}") from error
    try:
        return tables.make(Facts, content)
    except ValueError as error:
        raise RunError(
            f"{shown(folder / 'run.json')} is spoiled, or of another version of keras-dfp: {error}"
        ) from error


def read_progress(folder: Path) -> Progress | None:
    """Returns how far a run has come by its last checkpoint; None if there is none yet.

    Raises:
        RunError: If the checkpoint is spoiled, or of another version.
    """
    path = folder / "checkpoint.npz"
    return _progress(path, checkpoint.load(path)) if path.exists() else None


def load(folder: Path, **changes: Any) -> tuple[Settings, keras.Model]:
    """Returns the settings of a run, and its network with the weights of its last checkpoint.

    Args:
        folder: The run's.
        **changes: Settings that are to be others.

    Raises:
        RunError: If the folder holds no run, or one without a checkpoint, or one that diverged.
    """
    known = read(folder)
    settings = dataclasses.replace(known.settings, **changes)
    path = folder / "checkpoint.npz"
    if not path.exists():
        raise RunError(f"The run in {shown(folder)} has no checkpoint yet.")
    height, width, channels = known.input_shape
    model = network.build(settings, (height, width, channels), len(known.classes))
    progress = _progress(path, checkpoint.load(path, model.variables))
    if progress.diverged is not None:
        raise RunError(
            f"The run in {shown(folder)} has no trained network: its loss was no longer a number "
            f"after step {progress.diverged}."
        )
    return settings, model


def _progress(path: Path, state: Any) -> Progress:
    try:
        return tables.make(Progress, state, finite=False)
    except ValueError as error:
        raise RunError(
            f"{shown(path)} is spoiled, or of another version of keras-dfp: {error}"
        ) from error


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
