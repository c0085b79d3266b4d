"""Train any Keras model on 16-bit integers, on ordinary CPUs, to float32 accuracy.

>>> import keras, keras_dfp
>>> keras_dfp.set_policy("dfp16")
>>> model = keras.applications.ResNet50(weights=None)    # any model, built as always
>>> model.compile("sgd", "sparse_categorical_crossentropy")

Importing the package installs the plugin in Keras's TensorFlow backend; it changes nothing until a
layer runs under a `DFPPolicy`. `keras_dfp.backend.uninstall()` takes it out again. With a Keras
that it does not know, it warns and installs nothing; making a `DFPPolicy` raises then.
"""

import warnings as _warnings

from keras_dfp import requirements as requirements  # first: it says what is missing

# isort: split
from keras_dfp import source_tree as source_tree  # then: it finds packages for the others

# isort: split
from keras_dfp import backend, callbacks, layers, ops, optimizers, reference, zoo
from keras_dfp import saving as saving
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
    "callbacks",
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
