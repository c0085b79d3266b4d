"""Who multiplies, and how: the calling layer and what its policy says."""

from __future__ import annotations

import dataclasses

import keras
from keras.src.backend.common import global_state

from keras_dfp.number import DFPFormat


@dataclasses.dataclass(frozen=True)
class Decision:
    """How a layer's products run: on integers in `format`, or in FP32 if that is `None`.

    `reason` says why, in words a user reads in `describe(model)`; it is empty where nothing but
    the layer's policy decided.
    """

    format: DFPFormat | None
    reason: str = ""


def calling_layer() -> keras.layers.Layer | None:
    """Returns the layer whose `call` or `build` is running, the innermost of nested ones.

    Optimizers and metrics open name scopes too: what they multiply is no layer's.
    """
    for scope in reversed(global_state.get_global_attribute("name_scope_stack") or ()):
        if scope.caller is not None:
            return scope.caller if isinstance(scope.caller, keras.layers.Layer) else None
    return None


def decide(layer: keras.layers.Layer | None) -> Decision:
    """Asks a layer's dtype policy how the layer's products run.

    A policy that has an opinion has a method `decide(layer) -> Decision`, as `DFPPolicy` does.
    """
    if layer is None:
        return Decision(None, "outside of any layer")
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap) and not hasattr(policy, "decide"):
        policy = policy[layer.path or layer.name]
    if not hasattr(policy, "decide"):
        return Decision(None, f"policy {policy.name}")
    return policy.decide(layer)


def float32_by_default(layer: keras.layers.Layer) -> str:
    """Returns why a layer's products stay FP32 although its policy is a DFPPolicy, or `""`."""
    if isinstance(layer, keras.layers.SpectralNormalization):
        return "power iteration stays FP32 by default"
    if any(c.__module__.startswith("keras.src.layers.preprocessing") for c in type(layer).__mro__):
        return "preprocessing stays FP32 by default"
    return ""
