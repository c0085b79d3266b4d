"""Recurrent layers: what does not change in the loop over time is quantised once, before it."""

import functools

from keras.src import backend as keras_backend

from keras_dfp import ops
from keras_dfp.backend.registry import replaces


@replaces(keras_backend, "rnn")
def _rnn(original):
    @functools.wraps(original)
    def rnn(*args, **kwargs):
        with ops.loop_scope():
            return original(*args, **kwargs)

    return rnn
