"""The policy of a whole model: set_model_policy, and what is settled once a model is complete."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator

import keras
from keras import dtype_policies

from keras_dfp.backend.registry import replaces
from keras_dfp.internals import Functional, Operation, Trainer, cloning
from keras_dfp.legacy import check_model
from keras_dfp.policy import DFPPolicy, with_plugin

_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2D,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3D,
    keras.layers.Conv3DTranspose,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)


def set_model_policy(model: keras.Model, policy: str | dtype_policies.DTypePolicy) -> None:
    """Gives all layers of a model a policy, in place; weights and optimizer stay as they are.

    Nested models, wrapped layers, cells and the layers inside layers are included. Layers that do
    not compute in floating point on float32 variables (of integers or strings, quantized ones)
    keep their policy. The model's compiled functions are dropped, so that the next `fit`,
    `evaluate` or `predict` traces it again; an outer model, or a function of your own, that has
    traced this model keeps what it traced.

    Args:
        model: Any Keras model; one loaded from a file, for instance.
        policy: A `DFPPolicy` or its name, or `"float32"` to take it back.

    Raises:
        TypeError: If it is no Keras model; one of `tf_keras`, for instance.
        ValueError: If `policy` is neither, or if no layer of the model has float32 variables.

    Example:

    >>> model = keras.models.load_model("trained_in_float32.keras")
    >>> keras_dfp.set_model_policy(model, "dfp16")
    """
    check_model("set_model_policy", model)
    if policy is not None:  # which Keras takes for the global one
        policy = dtype_policies.get(with_plugin(policy))
    if not isinstance(policy, DFPPolicy) and policy != keras.DTypePolicy("float32"):
        raise ValueError(
            f"set_model_policy: policy must be a DFPPolicy or 'float32'; got {policy!r}."
        )
    layers = list(layers_in_order(model))
    changed = [layer for layer in layers if _has_float32_variables(layer)]
    if not changed:
        raise ValueError(
            f"set_model_policy: no layer of model '{model.name}' has float32 variables "
            f"(its dtype policy is '{model.dtype_policy.name}')."
        )
    for layer in changed:
        layer.dtype_policy = policy
    for layer in layers:
        if isinstance(layer, Trainer):
            layer.train_function = layer.test_function = layer.predict_function = None
    settle(model)


def layers_in_order(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """Yields a layer and all inside it, each once, in the order of the model."""
    seen = set()

    def walk(layer):
        if id(layer) not in seen:
            seen.add(id(layer))
            yield layer
            for inner in layer._flatten_layers(include_self=False, recursive=False):
                yield from walk(inner)

    return walk(layer)


def first_and_last(model: keras.Model) -> dict[keras.layers.Layer, str]:
    """Returns the first convolution and the last Dense of a model, with what they are.

    In a functional model of several outputs, the last Dense is that of the first output: the others
    may be auxiliary.
    """
    layers = list(layers_in_order(model))
    convolutions = [layer for layer in layers if isinstance(layer, _CONVOLUTIONS)]
    if isinstance(model, Functional) and len(model.outputs) > 1:
        layers = list(layers_in_order(keras.Model(model.inputs, model.outputs[0])))
    denses = [layer for layer in layers if isinstance(layer, keras.layers.Dense)]
    return {
        **dict.fromkeys(convolutions[:1], "first convolution"),
        **dict.fromkeys(denses[-1:], "last dense layer"),
    }


def warn_of_unmatched_patterns(model: keras.Model) -> None:
    """Warns of patterns in the policies of a model's layers that match no layer."""
    layers = list(layers_in_order(model))
    policies = dict.fromkeys(
        layer.dtype_policy for layer in layers if isinstance(layer.dtype_policy, DFPPolicy)
    )
    unmatched = [p for policy in policies for p in policy.unmatched_patterns(layers)]
    if unmatched:
        warnings.warn(
            f"keras_dfp: no layer of model '{model.name}' matches "
            f"{', '.join(map(repr, dict.fromkeys(unmatched)))}. Patterns are compared with a "
            "layer's full path and with its last component; describe(model) lists the paths.",
            stacklevel=3,
        )


def _has_float32_variables(layer) -> bool:
    return (
        layer.variable_dtype == "float32"
        and keras.backend.is_float_dtype(layer.compute_dtype)
        and layer.quantization_mode is None
    )


def settle(model: keras.Model) -> None:
    """Does what needs the whole model: once it is compiled and built, in whichever order."""
    for layer in first_and_last(model):
        policy = layer.dtype_policy
        if not isinstance(policy, DFPPolicy) or policy.name != "dfp16_paper":
            continue
        if not policy.decide(layer).reason:
            layer.dtype_policy = policy.excluding(layer)
    warn_of_unmatched_patterns(model)
    if model.compiled and model.jit_compile:
        # Keras asks whether the model supports it, and falls back with a warning, when the value
        # changes.
        model.jit_compile = False
        model.jit_compile = True


@replaces(cloning, "_clone_sequential_model", "model clone_function input_tensors")
def _clone_sequential_policy(original):
    @functools.wraps(original)
    def clone(model, *args, **kwargs):
        new = original(model, *args, **kwargs)
        _follow_all(new, model)
        return new

    return clone


def _follow_all(clone: keras.Model, model: keras.Model) -> None:
    """Gives layers inside a clone's layers the policies that no config tells.

    Unless the layer around them is meant to have another one.
    """
    copies = {layer.name: layer for layer in clone.layers}
    for layer in model.layers:
        copy = copies.get(layer.name)
        if copy is not None and copy.dtype_policy == layer.dtype_policy:
            _follow(copy, layer)


def _follow(copy: keras.layers.Layer, layer: keras.layers.Layer) -> None:
    """Gives the layers inside a copy the policies of those inside of what it was copied from."""
    inner, copies = list(layers_in_order(layer)), list(layers_in_order(copy))
    if [type(each) for each in inner] != [type(each) for each in copies]:
        return
    for old, new in zip(inner, copies, strict=True):
        policies = old.dtype_policy, new.dtype_policy
        if old is not new and policies[0] != policies[1]:
            if any(isinstance(policy, DFPPolicy) for policy in policies):
                new.dtype_policy = old.dtype_policy


@replaces(cloning, "_clone_functional_model", "model clone_function input_tensors ...")
def _clone_functional_policy(original):
    """Gives a clone the policy of the model itself: its `keras.ops` nodes multiply under it."""

    @functools.wraps(original)
    def clone(model, *args, **kwargs):
        new = original(model, *args, **kwargs)
        _follow_all(new, model)
        if isinstance(model.dtype_policy, DFPPolicy) or isinstance(new.dtype_policy, DFPPolicy):
            if new.dtype_policy != model.dtype_policy:
                new.dtype_policy = model.dtype_policy
                if new.compiled:
                    settle(new)
        return new

    return clone


@replaces(Trainer, "compile", "self ...")
def _settle_when_compiled(original):
    @functools.wraps(original)
    def compile(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.built:
            settle(self)

    return compile


@replaces(Operation, "_post_build", "self", called_by=keras.layers.Layer.__new__)
def _settle_when_built(original):
    @functools.wraps(original)
    def post_build(self):
        original(self)
        if isinstance(self, Trainer) and self.compiled:
            settle(self)

    return post_build
