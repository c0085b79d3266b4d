"""Recurrent layers: what does not change in the loop over time is quantized once, before it."""

import functools

import tensorflow as tf

from keras_dfp.backend.registry import replaces
from keras_dfp.internals import inner_loop, rnn_owner
from keras_dfp.operand import loop_step


@replaces(rnn_owner, "rnn", "step_function ...", called_by=inner_loop)
def _rnn(original):
    @functools.wraps(original)
    def rnn(step_function, *args, **kwargs):
        @loop_step
        @functools.wraps(step_function)
        def step(inputs, states):
            output, new_states = step_function(inputs, states)
            if not tf.executing_eagerly():
                _keep_shapes(states, new_states)
            return output, new_states

        return original(step, *args, **kwargs)

    return rnn


def _keep_shapes(states, new_states):
    """Tells TensorFlow that a state keeps its shape, which its loop insists on.

    Called with sizes it was not traced for, a `tf.function` has its shapes inferred anew by
    TensorFlow, but not past a native op: C shape functions do not see attributes.
    """
    for state, new in zip(tf.nest.flatten(states), tf.nest.flatten(new_states), strict=False):
        if isinstance(new, tf.Tensor) and new.shape.is_compatible_with(state.shape):
            new.set_shape(state.shape)
