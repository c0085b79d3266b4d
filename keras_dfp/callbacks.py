"""Callbacks for `fit`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import keras

from keras_dfp.statistics import NonFinite, NonFiniteError, Numbers, Statistics

__all__ = ["DFPStatistics", "NonFinite", "NonFiniteError"]


class DFPStatistics(keras.callbacks.Callback):
    """Writes, every so many steps, what low precision does to each layer's numbers.

    For each layer on integers, and its activation, its weight and the gradient of its output: the
    exponents, the share of values lost to zero and of those clamped, the signal-to-noise ratio of
    quantizing, and how many samples are not finite; and the time of its three products. To
    TensorBoard (`log_dir/statistics`) and to a table, `log_dir/statistics.csv`, in long form:
    `step,layer,tensor,quantity,value`. `docs/observability.md` says what the numbers mean.

    Steps are counted by the optimizer, so that training that goes on from a checkpoint goes on
    here: rows of later steps, which a killed process may have left, are dropped when it starts.
    With `steps_per_execution`, all steps of an execution that holds one to be looked at are, under
    the number of the last. (A model without an `optimizer` is counted from each `fit` on.)

    Whatever `every` says, a tensor that is not finite is looked for in every step: the first is
    named, once, in a warning. Models that are trained at the same time in one process share the
    switch, and should not be looked at together.

    Args:
        every: Steps of which one is looked at: those whose number it divides.
        log_dir: A folder; None writes nothing, and leaves the numbers in `latest`.
        layers: Names or paths of layers, or patterns of them (`"block1*"`), to write about. None
            for all.
        compare: Likewise, of layers to compare with float32 on the same batch: their products are
            computed again in both ways, and the relative error of the output and of both gradients
            is in the table as `error`. It costs six products of the layer in a step that is looked
            at, and a little in all others, because the layer is not fused with what surrounds it.
        stop_on_nonfinite: Whether to raise `NonFiniteError` after a step with a tensor that is not
            finite, before other callbacks save what came of it.

    Attributes:
        latest: A `Numbers` with those of the last step that was looked at, or None.

    Raises:
        ValueError: If `every` is no positive int, or `statistics.csv` is no such table.
        TypeError: If `layers` or `compare` are no strings.

    Example:

    >>> model.fit(x, y, callbacks=[keras_dfp.callbacks.DFPStatistics(every=100, log_dir="logs")])
    """

    def __init__(
        self,
        every: int = 100,
        log_dir: str | os.PathLike[str] | None = None,
        layers: Sequence[str] | str | None = None,
        compare: Sequence[str] | str | None = None,
        stop_on_nonfinite: bool = False,
    ):
        super().__init__()
        if every is None:
            raise ValueError("every must be a number of steps, at least 1; received None.")
        self._statistics = Statistics(every, log_dir, layers, compare, stop_on_nonfinite)
        self._batches = 0

    @property
    def latest(self) -> Numbers | None:
        return self._statistics.latest

    def on_train_begin(self, logs=None):
        self._batches = 0
        self._statistics.start(self._step())
        if self._statistics.comparison is not None:
            # What was traced before does not compare.
            self.model.make_train_function(force=True)

    def on_train_batch_begin(self, batch, logs=None):
        self._statistics.before(self._step(), getattr(self.model, "steps_per_execution", None) or 1)

    def on_train_batch_end(self, batch, logs=None):
        self._batches += getattr(self.model, "steps_per_execution", None) or 1
        try:
            self._statistics.after(self._step())
        except NonFiniteError:
            self._stop()
            raise

    def on_train_end(self, logs=None):
        self._stop()
        every = self._statistics.every
        if self.latest is None:
            warnings.warn(
                f"DFPStatistics: training ended at step {self._step()} and had no step with "
                f"numbers: every={every} looks at steps {every}, {2 * every}, ...",
                stacklevel=2,
            )
        elif words := self._statistics.unmatched():
            warnings.warn(f"DFPStatistics: {words}", stacklevel=2)

    def _step(self) -> int:
        optimizer = getattr(self.model, "optimizer", None)
        if optimizer is None:
            return self._batches
        # That of replicas is no number, but can be converted.
        return int(keras.ops.convert_to_numpy(optimizer.iterations))

    def _stop(self) -> None:
        self._statistics.stop()
        if self._statistics.comparison is not None:
            self.model.train_function = None
