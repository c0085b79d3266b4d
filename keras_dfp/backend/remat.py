"""What runs in the backward pass, recomputation and gradients of the user's, keeps its policy."""

import contextlib
import functools
import inspect

import keras
import tensorflow as tf

from keras_dfp.backend import recording
from keras_dfp.backend.calling import bind_caller
from keras_dfp.backend.registry import replaces
from keras_dfp.internals import core, remat_owner
from keras_dfp.operand import noted


@replaces(remat_owner, "remat", "f", called_by=keras.remat)
def _remat(original):
    @functools.wraps(original)
    def remat(f):
        @functools.wraps(f)
        def rematerialised(*args, **kwargs):
            return original(bind_caller(f))(*args, **kwargs)

        return rematerialised

    return remat


@replaces(core, "custom_gradient", "fun", called_by=keras.ops.custom_gradient)
def _custom_gradient(original):
    @functools.wraps(original)
    def custom_gradient(fun):
        @functools.wraps(fun)
        def forward(*args, **kwargs):
            recorded = recording.active()
            with tf.GradientTape() if recorded else contextlib.nullcontext() as tape:
                outputs, gradient = fun(*args, **kwargs)
            backward = bind_caller(gradient)
            # TensorFlow looks there for an argument `variables`.
            backward.__signature__ = inspect.signature(gradient)
            if recorded:
                _trace(backward, outputs, tape.watched_variables())
            return outputs, backward

        return original(forward)

    return custom_gradient


def _trace(backward, outputs, variables):
    """Shows the recording what the backward function multiplies."""
    upstream = map(tf.ones_like, tf.nest.flatten(outputs))
    # Only the forward pass has operands to tell of.
    with noted(None):
        if variables:
            backward(*upstream, variables=variables)
        else:
            backward(*upstream)
