"""Policies that no config tells are saved all the same: those of the layers inside others.

A subclassed model, or layer, makes layers in `__init__` or `build`, and its config seldom tells
their dtypes: Keras makes them under the policy that happens to be set when the file is loaded. So
whatever Keras serializes, a model or a layer, is given a record of such policies beside its config,
if it has a DFPPolicy anywhere; a Keras without this package skips it. It is loaded under the first
policy of the record, and then its layers get what they had.

A pickle is such a file, which worker processes may load that have not imported this package.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
import zipfile

import keras
from keras import dtype_policies

from keras_dfp import internals
from keras_dfp.backend.registry import replaces
from keras_dfp.internals import KerasSaveable, saving_lib, serialization_lib
from keras_dfp.model_policy import layers_in_order, settle
from keras_dfp.policy import DFPPolicy, policy_scope

_RECORD = "keras_dfp_policies"


class _Serializing(threading.local):
    # The layers, by id, whose config tells their policy; None outside of all serializing.
    told: set[int] | None = None


_serializing = _Serializing()


@replaces(serialization_lib, "serialize_keras_object", "obj", called_by=keras.Sequential.get_config)
@replaces(saving_lib, "serialize_keras_object", "obj", called_by=internals.write_config)
def _add_record(original):
    @functools.wraps(original)
    def serialize_keras_object(obj):
        if not isinstance(obj, keras.layers.Layer):
            return original(obj)
        outermost = _serializing.told is None
        if outermost:
            _serializing.told = set()
        try:
            config = original(obj)
            if "dtype" in (config["config"] or {}):
                _serializing.told.add(id(obj))
            if outermost and (record := _record(obj, _serializing.told)):
                config[_RECORD] = record
            return config
        finally:
            if outermost:
                _serializing.told = None

    return serialize_keras_object


def _record(root: keras.layers.Layer, told: set[int]) -> dict | None:
    """Returns the policies that no config tells, and whose they are; None without a DFPPolicy."""
    layers = list(layers_in_order(root))
    hidden = [(i, layer) for i, layer in enumerate(layers) if id(layer) not in told]
    if not hidden or not any(isinstance(layer.dtype_policy, DFPPolicy) for layer in layers):
        return None
    policies = []
    for _, layer in hidden:
        if layer.dtype_policy not in policies:
            policies.append(layer.dtype_policy)
    return {
        "policies": [internals.dtype_policies.serialize(policy) for policy in policies],
        # Names are made up anew in another session; places and classes are not.
        "layers": [
            [i, type(layer).__name__, layer.name, policies.index(layer.dtype_policy)]
            for i, layer in hidden
        ],
    }


@replaces(
    serialization_lib,
    "deserialize_keras_object",
    "config ...",
    called_by=keras.Sequential.from_config,
)
def _load_record(original):
    @functools.wraps(original)
    def deserialize_keras_object(config, *args, **kwargs):
        record = config.get(_RECORD) if isinstance(config, dict) else None
        if record is None:
            return original(config, *args, **kwargs)
        policies = [dtype_policies.get(policy) for policy in record["policies"]]
        with policy_scope(policies[0]):
            root = original(config, *args, **kwargs)
        _give_back(root, policies, record["layers"])
        return root

    return deserialize_keras_object


@replaces(saving_lib, "deserialize_keras_object", "config ...", called_by=internals.read_config)
def _load_file(original):
    """A file without a record holds no DFPPolicy that its configs do not tell: none is taken on."""
    load_record = _load_record(original)

    @functools.wraps(original)
    def deserialize_keras_object(config, *args, **kwargs):
        no_policy = contextlib.nullcontext()
        if isinstance(keras.config.dtype_policy(), DFPPolicy):
            no_policy = policy_scope("float32")
        with no_policy:
            return load_record(config, *args, **kwargs)

    return deserialize_keras_object


@replaces(keras.layers.Layer, "__new__", "cls args kwargs")
def _record_dtype_by_name(original):
    """Lets a layer without `get_config` be saved although it is given a DFPPolicy.

    As it is by `from_config`. Keras keeps the arguments of such a layer for its config, if all are
    numbers and strings; the `dtype` in it `Layer.get_config` replaces by the policy itself.
    """

    @functools.wraps(original)
    def new(cls, *args, **kwargs):
        if isinstance(kwargs.get("dtype"), DFPPolicy):
            kwargs["dtype"] = kwargs["dtype"].name
        return original(cls, *args, **kwargs)

    return staticmethod(new)


@replaces(KerasSaveable, "__reduce__", "self")
def _import_first(original):
    """Lets a process that unpickles a model import this package, if the model needs it."""

    @functools.wraps(original)
    def reduce(self):
        load, (file,) = original(self)
        with zipfile.ZipFile(file) as archive:
            needed = b"keras_dfp" in archive.read("config.json")
        return (_load_with_plugin, (load, file)) if needed else (load, (file,))

    return reduce


def _load_with_plugin(load, file):
    """Is found here, when a model is unpickled: so the package is there that has to be."""
    return load(file)


def _give_back(root, policies, places) -> None:
    """Gives the layers of a loaded model the policies that they were saved with."""
    layers = dict(enumerate(layers_in_order(root)))
    lost, changed = [], False
    for i, class_name, name, policy in places:
        layer = layers.get(i)
        if layer is None or type(layer).__name__ != class_name:
            lost.append(f"{name} ({policies[policy].name})")
        elif layer.dtype_policy != policies[policy]:
            layer.dtype_policy = policies[policy]
            changed = True
    if changed and isinstance(root, keras.Model) and root.compiled and root.built:
        settle(root)
    if lost:
        warnings.warn(
            f"keras_dfp: '{root.name}' is made of other layers than when it was saved, so that "
            f"not all have the policy they had: {', '.join(lost)}. Layers whose config does not "
            f"tell their dtype have '{policies[0].name}' now; "
            "keras_dfp.describe shows it, and keras_dfp.set_model_policy changes it.",
            stacklevel=2,
        )
