"""XLA: models with layers on integers fall back to `jit_compile=False`, with Keras's warning."""

import functools

import keras
from keras.src.trainers import trainer

from keras_dfp.backend.calling import decide
from keras_dfp.backend.registry import replaces


@replaces(trainer, "model_supports_jit", "model")
def _model_supports_jit(original):
    @functools.wraps(original)
    def model_supports_jit(model):
        return original(model) and not any(map(_multiplies_integers, model._flatten_layers()))

    return model_supports_jit


def _multiplies_integers(layer) -> bool:
    # These never multiply, and their own policy is whatever was global when they were made.
    if isinstance(layer, (keras.Sequential, keras.layers.InputLayer)):
        return False
    return decide(layer).format is not None
