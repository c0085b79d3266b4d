"""Train any Keras model on 16-bit integers, on ordinary CPUs, to float32 accuracy.

>>> import keras, keras_dfp
>>> keras_dfp.set_policy("dfp16")
>>> model = keras.applications.ResNet50(weights=None)    # any model, built as always
>>> model.compile("sgd", "sparse_categorical_crossentropy")

Importing the package installs the plugin in Keras's TensorFlow backend; it changes nothing until a
layer runs under a `DFPPolicy`. `keras_dfp.backend.uninstall()` takes it out again. With a Keras
that it does not know, it warns and installs nothing; making a `DFPPolicy` raises then.
"""

import importlib.util as _importlib
import warnings as _warnings

if _importlib.find_spec("tensorflow") is None:
    raise ImportError(
        "keras_dfp needs TensorFlow, which is not installed. Install it with "
        "`pip install tensorflow-cpu` or `pip install tensorflow`."
    )

import keras as _keras

if _keras.backend.backend() != "tensorflow":
    raise ImportError(
        "keras_dfp works with Keras's TensorFlow backend, but Keras runs on "
        f"{_keras.backend.backend()!r}. Set KERAS_BACKEND=tensorflow in the environment, or "
        '"backend": "tensorflow" in ~/.keras/keras.json, before Keras is imported.'
    )

from keras_dfp import source_tree as source_tree  # first: it finds packages for the others

# isort: split
from keras_dfp import backend, layers, ops, optimizers, reference, zoo
from keras_dfp.audit import Audit, audit
from keras_dfp.info import info
from keras_dfp.legacy import warn_of_legacy_keras as _warn_of_legacy_keras
from keras_dfp.model_policy import set_model_policy
from keras_dfp.number import DFPFormat, DFPTensor, quantize
from keras_dfp.policy import DFPPolicy, policy_scope, set_policy
from keras_dfp.report import describe
from keras_dfp.version import __version__

__all__ = [
    "Audit",
    "DFPFormat",
    "DFPPolicy",
    "DFPTensor",
    "__version__",
    "audit",
    "backend",
    "describe",
    "info",
    "layers",
    "ops",
    "optimizers",
    "policy_scope",
    "quantize",
    "reference",
    "set_model_policy",
    "set_policy",
    "zoo",
]

try:
    backend.install()
except RuntimeError as _error:
    # Not an error yet: a program that stays in float32 goes on.
    _warnings.warn(str(_error), stacklevel=2)
_warn_of_legacy_keras()
