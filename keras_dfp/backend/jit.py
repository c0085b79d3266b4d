"""XLA: models whose layers, or optimizer, run on native ops fall back to `jit_compile=False`, with
Keras's warning."""

import functools

import keras

from keras_dfp.backend import recording
from keras_dfp.backend.calling import ATTENTION, decide, owns_weights
from keras_dfp.backend.inputs import known_inputs
from keras_dfp.backend.registry import replaces
from keras_dfp.internals import Functional, trainer


@replaces(trainer, "model_supports_jit", "model", called_by=keras.Model.jit_compile.fset)
def _model_supports_jit(original):
    @functools.wraps(original)
    def model_supports_jit(model):
        optimizer = getattr(model, "optimizer", None)
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        native = getattr(optimizer, "native", False)
        return original(model) and not native and not _multiplies_integers(model)

    return model_supports_jit


def _multiplies_integers(model) -> bool:
    answers = set(map(_may_multiply_integers, model._flatten_layers()))
    if None not in answers or True in answers:
        return True in answers
    # Only a trace can tell; models that need one are rare.
    inputs = known_inputs(model)
    if inputs is None:
        return True
    try:
        products = recording.trace(model, inputs)
    except recording.TraceError:
        return True
    return any(product.decision.format is not None for product in products)


def _may_multiply_integers(layer) -> bool | None:
    """Tells whether a layer's own products may run on integers; None if its `call` must show it."""
    # These never multiply, and their own policy is whatever was global when they were made.
    if isinstance(layer, (keras.Sequential, keras.layers.InputLayer)):
        return False
    # A functional model does only if it has nodes of keras.ops besides its layers.
    functional = type(layer) is Functional
    if functional and all(isinstance(op, keras.layers.Layer) for op in layer.operations):
        return False
    decision = decide(layer)
    if decision.format is None:
        return False
    if decision.scope == "all" or not layer.built:
        return True
    if owns_weights(layer) or isinstance(layer, ATTENTION):
        return True
    # Without weights it may call dot_product_attention, or multiply by another layer's variable.
    # Keras's own layers do not.
    if functional or isinstance(layer, keras.layers.Lambda):
        return None
    return False if type(layer).__module__.startswith("keras.src.") else None
