"""What a layer is called with: for `describe`, and for what has to know what a model multiplies."""

import functools
from typing import Any

import keras
import tensorflow as tf

from keras_dfp.backend import recording
from keras_dfp.backend.per_layer import PerLayer
from keras_dfp.backend.registry import replaces
from keras_dfp.internals import Functional

# From a layer to the shapes and dtypes of its last call, in the structure of its first argument;
# None where it had other tensors besides.
_last_calls = PerLayer()


def known_inputs(model: keras.layers.Layer) -> Any:
    """Returns the `KerasTensor`s that a model is called with, in their structure.

    Those of a functional model are its own; other models and layers are known by their last call.
    Returns `None` if there was none.
    """
    if isinstance(model, keras.Sequential) and model._functional:
        model = model._functional
    if isinstance(model, Functional):
        return model.input
    last_call = _last_calls.get(model)
    if last_call is None:
        return None
    return keras.tree.map_structure(lambda leaf: leaf and leaf.symbolic(), last_call)


def symbolic(x) -> keras.KerasTensor:
    """Returns the `KerasTensor` of an array, tensor or `KerasTensor`."""
    x = x if keras.utils.is_keras_tensor(x) else keras.ops.convert_to_tensor(x)
    return _Leaf(x).symbolic()


class _Leaf:
    def __init__(self, x):
        self.shape = x.shape
        self.dtype = x.dtype
        self.sparse = getattr(x, "sparse", isinstance(x, tf.SparseTensor))

    def symbolic(self) -> keras.KerasTensor:
        dtype = keras.backend.standardize_dtype(self.dtype)
        return keras.KerasTensor(self.shape, dtype, sparse=self.sparse)


@replaces(
    keras.layers.Layer, "_maybe_build", "self call_spec", called_by=keras.layers.Layer.__call__
)
def _remember_call(original):
    # Keras asks in every call whether the layer is to be built.
    @functools.wraps(original)
    def maybe_build(self, call_spec):
        if not recording.active():
            _last_calls[self] = _first_argument(call_spec)
        return original(self, call_spec)

    return maybe_build


def _first_argument(call_spec):
    tensors = call_spec.tensor_arguments_dict
    names = [name for name in tensors if not name.endswith("mask")]
    if names != call_spec.argument_names[:1]:
        return None
    return keras.tree.map_structure(lambda x: x if x is None else _Leaf(x), tensors[names[0]])
