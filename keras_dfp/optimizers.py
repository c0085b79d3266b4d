"""Keras's SGD and Adam in one native pass over each variable, with slots in half the memory.

Keras's optimizers are chains of TensorFlow ops, each of which reads and writes whole variables.
Here decay, slots and weights of a variable are one pass (docs/numerics.md, "Optimizers"); what
comes before it (clipping, accumulation, loss scaling) and after it (moving averages, constraints)
is Keras's own. The weights stay float32: what optimizers add is too small for 16 bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_dfp import exchange, internals, native

SLOTS = ("float32", "dfp16")
_BLOCK = 64  # elements of a slot that share an exponent, as the native op has it


class _Native:
    """Before an optimizer of Keras among the bases of a class: its step is a native op.

    Two things keep Keras's own step: variables that are not float32, with a warning; and sparse
    gradients (of `Embedding`), unless the slots are in fixed point: then they are made dense.
    """

    _slot_names: tuple[str, ...]

    # Who asks whether XLA can compile a model.
    native = True

    def __init__(self, *args, slots: str = "float32", gradient_exchange: str = "float32", **kwargs):
        if slots not in SLOTS:
            raise ValueError(
                f"{type(self).__name__}: slots must be {' or '.join(map(repr, SLOTS))}; "
                f"got {slots!r}."
            )
        exchange.check(gradient_exchange, type(self).__name__)
        if gradient_exchange != "float32" and internals.missing:
            # Keras may call something else than what is overridden below.
            raise internals.unknown(f"{internals.missing[0]} does not exist")
        super().__init__(*args, **kwargs)
        self.slots = slots
        self.gradient_exchange = gradient_exchange

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        # For each kind of slot, the exponents of each variable.
        self._exponents = [
            [self._add_exponents(*pair) for pair in zip(variables, slots, strict=True)]
            for slots in self._slots_of_all()
        ]
        others = [_name(v) for v in variables if v.dtype != "float32"]
        if others:
            warnings.warn(
                f"keras_dfp: {type(self).__name__} updates {', '.join(others)} by Keras's own "
                "operations, with slots of their own dtype: the native pass is for float32 "
                "variables.",
                stacklevel=2,
            )

    def add_variable_from_reference(self, reference_variable, name=None, initializer="zeros"):
        if not self._in_fixed_point(reference_variable, name):
            return super().add_variable_from_reference(
                reference_variable, name=name, initializer=initializer
            )
        return self._add_beside(reference_variable, reference_variable.shape, "int16", name)

    def _add_exponents(self, variable, slot):
        if slot is None or keras.backend.standardize_dtype(slot.dtype) != "int16":
            return None
        blocks = -(-slot.shape.num_elements() // _BLOCK)
        return self._add_beside(variable, (blocks,), "int32", "exponents")

    def _add_beside(self, variable, shape, dtype, name):
        """Adds a variable of zeros that is distributed as another one is."""
        path = getattr(variable, "path", variable.name).replace("/", "_").replace(":", "_")
        with self._distribution_strategy.extended.colocate_vars_with(_tf_variable(variable)):
            return self.add_variable(shape, "zeros", dtype=dtype, name=f"{path}_{name}")

    def _in_fixed_point(self, variable, name) -> bool:
        return (
            self.slots == "dfp16"
            and name in self._slot_names
            and keras.backend.standardize_dtype(variable.dtype) == "float32"
        )

    def _apply_weight_decay(self, variables):
        """Is a part of each variable's step."""

    def _all_reduce_sum_gradients(self, grads_and_vars):
        if self.gradient_exchange == "float32" or tf.distribute.in_cross_replica_context():
            return super()._all_reduce_sum_gradients(grads_and_vars)
        gradients, variables = zip(*grads_and_vars, strict=True)
        return list(zip(exchange.summed(gradients, "dfp16"), variables, strict=True))

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        slots = [slots[index] for slots in self._slots_of_all()]
        decay = self.weight_decay if self.weight_decay and self._use_weight_decay(variable) else 0.0
        exponents = [e[index] for e in self._exponents if e[index] is not None]
        sparse = isinstance(gradient, tf.IndexedSlices) and not exponents
        if sparse or keras.backend.standardize_dtype(variable.dtype) != "float32":
            if decay:
                rate = tf.cast(learning_rate, variable.dtype)
                self.assign_sub(variable, variable * tf.cast(decay, variable.dtype) * rate)
            super().update_step(gradient, variable, learning_rate)
            return
        native.follow_thread_setting()
        weight, new, new_exponents = self._native_step(
            weight=tf.convert_to_tensor(_tf_variable(variable)),
            gradient=tf.cast(tf.convert_to_tensor(gradient), tf.float32),
            rate=tf.cast(learning_rate, tf.float32),
            step=tf.cast(self.iterations + 1, tf.int64),
            slots=[tf.convert_to_tensor(_tf_variable(slot)) for slot in slots],
            exponents=[tf.convert_to_tensor(_tf_variable(e)) for e in exponents],
            weight_decay=decay,
            seed=index,
        )
        updated = [*slots, *exponents, variable]
        for old, value in zip(updated, [*new, *new_exponents, weight], strict=True):
            self.assign(old, native.known_shape(value, old.shape))

    def get_config(self):
        return {
            **super().get_config(),
            "slots": self.slots,
            "gradient_exchange": self.gradient_exchange,
        }


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPSGD(_Native, keras.optimizers.SGD):
    """`keras.optimizers.SGD` in one native pass over each variable, to the same bits.

    Args:
        slots: `"float32"`, or `"dfp16"`: momentum in half the memory, as 16-bit integers with an
            exponent for every 64 of them, rounded stochastically. Weights are float32 anyway.
        gradient_exchange: `"float32"`, or `"dfp16"`: in a distribution strategy, gradients travel
            as 16-bit integers, and their sum has the same bits in any order (docs/distributed.md).

    All other arguments are those of `keras.optimizers.SGD`.

    Raises:
        ValueError: If an argument is not allowed; the message says what is.

    Example:

    >>> optimizer = keras_dfp.optimizers.DFPSGD(0.1, momentum=0.9, nesterov=True, slots="dfp16")
    >>> model.compile(optimizer, "sparse_categorical_crossentropy")
    """

    _slot_names = ("momentum",)

    def _slots_of_all(self) -> Sequence[list]:
        return [self.momentums] if self.momentum else []

    def _native_step(self, **arguments):
        return native.lib.dfp_sgd(
            **arguments, momentum=float(self.momentum), nesterov=bool(self.nesterov)
        )


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPAdam(_Native, keras.optimizers.Adam):
    """`keras.optimizers.Adam`, and `AdamW`, in one native pass over each variable.

    With `weight_decay` it is `keras.optimizers.AdamW`. The results are Keras's but for the
    correction of the bias of young moments, which Keras computes in float32: up to some 1e-5 of a
    step, in the first steps.

    Args:
        slots: `"float32"`, or `"dfp16"`: both moments in half the memory, as 16-bit integers with
            an exponent for every 64 of them, rounded stochastically; of the second one the roots.
            Weights are float32 anyway.
        gradient_exchange: As for `DFPSGD`.

    All other arguments are those of `keras.optimizers.Adam`; `beta_1`, `beta_2` and `epsilon` are
    numbers.

    Raises:
        ValueError: If an argument is not allowed; the message says what is.

    Example:

    >>> optimizer = keras_dfp.optimizers.DFPAdam(1e-3, weight_decay=4e-3)
    >>> model.compile(optimizer, "sparse_categorical_crossentropy")
    """

    _slot_names = ("momentum", "velocity", "velocity_hat")

    def _slots_of_all(self) -> Sequence[list]:
        largest = [self._velocity_hats] if self.amsgrad else []
        return [self._momentums, self._velocities, *largest]

    def _native_step(self, **arguments):
        return native.lib.dfp_adam(
            **arguments,
            beta_1=float(self.beta_1),
            beta_2=float(self.beta_2),
            renewal_1=1 - float(self.beta_1),
            renewal_2=1 - float(self.beta_2),
            epsilon=float(self.epsilon),
        )


def _tf_variable(variable) -> tf.Variable:
    return variable.value if isinstance(variable, keras.Variable) else variable


def _name(variable) -> str:
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return f"{getattr(variable, 'path', variable.name)!r} ({dtype})"
