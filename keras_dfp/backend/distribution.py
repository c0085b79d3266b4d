"""`fit` under MultiWorkerMirroredStrategy on CPUs, which stock Keras fails at (keras#20585).

Two small faults of Keras's trainer, in all versions of `FAULTY`:

reduce_per_replica          takes the mean of logs, which are scalars, over their first axis
_maybe_symbolic_build       builds a model from the mean of the batches of all workers, which need
                            not have one shape; a batch of this worker is all it needs

In any other strategy, and without one, Keras's own functions run. When Keras is right, this file
goes: `tests/test_distribution.py` fails then.
"""

import functools

import tensorflow as tf

from keras_dfp import internals
from keras_dfp.backend.registry import replaces

FAULTY = (3, 16)  # the last version that was looked at


def _several_workers(strategy) -> bool:
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) and bool(
        strategy.cluster_resolver.cluster_spec().as_dict()
    )


if internals.KERAS <= FAULTY:

    @replaces(
        internals.tf_trainer,
        "reduce_per_replica",
        "values strategy reduction",
        called_by=internals.TFTrainer.make_predict_function,
    )
    def _reduce_per_replica(original):
        @functools.wraps(original)
        def reduce_per_replica(values, strategy, reduction):
            if reduction not in ("auto", "mean") or not _several_workers(strategy):
                return original(values, strategy, reduction)
            return tf.nest.map_structure(
                lambda value: strategy.reduce(tf.distribute.ReduceOp.MEAN, value, axis=None), values
            )

        return reduce_per_replica

    @replaces(
        internals.TFTrainer,
        "_maybe_symbolic_build",
        "self iterator data_batch",
        called_by=internals.TFTrainer.fit,
    )
    def _maybe_symbolic_build(original):
        @functools.wraps(original)
        def maybe_symbolic_build(self, iterator=None, data_batch=None):
            strategy = self._distribute_strategy
            if iterator is None or strategy is None or not _several_workers(strategy):
                return original(self, iterator=iterator, data_batch=data_batch)
            _, _, batches = next(iter(iterator))
            batch = tf.nest.map_structure(
                lambda value: strategy.experimental_local_results(value)[0], next(batches)
            )
            return original(self, data_batch=batch)

        return maybe_symbolic_build
