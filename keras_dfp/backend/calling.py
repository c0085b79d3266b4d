"""Who multiplies, and how: the calling layer and what its policy says."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import threading
from collections.abc import Callable, Iterable, Iterator

import keras
import tensorflow as tf

from keras_dfp.backend.registry import replaces
from keras_dfp.internals import FuncGraph, current_path, global_state
from keras_dfp.number import DFPFormat

SCOPES = ("weights", "all")
ATTENTION = (
    keras.layers.Attention,  # AdditiveAttention is one
    keras.layers.MultiHeadAttention,
    keras.layers.GroupQueryAttention,
)
_STACK = "name_scope_stack"


@dataclasses.dataclass(frozen=True)
class Decision:
    """How a layer's products run: on integers in `format`, or in FP32 if that is `None`.

    `reason` says why, in words a user reads in `describe(model)`; it is empty where nothing but
    the layer's policy decided. `scope` says which products of the layer this is about: `"all"`,
    or those of `"weights"`, as `in_scope` tells them.
    """

    format: DFPFormat | None
    reason: str = ""
    scope: str = "all"


# ---- who is calling ------------------------------------------------------------------------------


def calling_layer() -> keras.layers.Layer | None:
    """Returns the layer whose `call` or `build` is running, the innermost of nested ones.

    Optimizers and metrics open name scopes too: what they multiply is no layer's.
    """
    for scope in reversed(global_state.get_global_attribute(_STACK) or ()):
        if scope.caller is not None:
            return scope.caller if isinstance(scope.caller, keras.layers.Layer) else None
    return None


def bind_caller(function: Callable) -> Callable:
    """Returns a function that runs as if called by the layer that is being called now.

    TensorFlow calls some functions in the backward pass, where no layer is being called any more;
    Keras's stack of name scopes is what tells the layer, and its policy.
    """
    scopes = list(global_state.get_global_attribute(_STACK) or ())

    @functools.wraps(function)
    def bound(*args, **kwargs):
        with _name_scopes(list(scopes)):
            return function(*args, **kwargs)

    return bound


class _Caller:
    """An entry of Keras's stack of name scopes that tells a layer and changes no path."""

    def __init__(self, layer):
        self.caller = layer
        self.override_parent, _, self.name = current_path().rpartition("/")


def _called_as(layer):
    return _name_scopes([*(global_state.get_global_attribute(_STACK) or ()), _Caller(layer)])


@contextlib.contextmanager
def _name_scopes(scopes) -> Iterator[None]:
    outer = global_state.get_global_attribute(_STACK)
    global_state.set_global_attribute(_STACK, scopes)
    try:
        yield
    finally:
        global_state.set_global_attribute(_STACK, outer)


# Where Keras runs a layer's `call` directly, the layer opens no name scope. Opening it would rename
# variables that are created inside, also those of float32 models.


@replaces(keras.layers.TimeDistributed, "call", "self inputs ...")
def _time_distributed(original):
    @functools.wraps(original)
    def call(self, *args, **kwargs):
        # TimeDistributed itself multiplies nothing.
        with _called_as(self.layer):
            return original(self, *args, **kwargs)

    return call


@replaces(
    keras.layers.Layer, "stateless_call", "self trainable_variables non_trainable_variables ..."
)
def _stateless_call(original):
    @functools.wraps(original)
    def stateless_call(self, *args, **kwargs):
        with _called_as(self):
            return original(self, *args, **kwargs)

    return stateless_call


# ---- what its policy says ------------------------------------------------------------------------


def matches(pattern: str, path: str) -> bool:
    """Tells whether a pattern matches the path of a layer, or its last part, the name."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in (path, path.rsplit("/", 1)[-1]))


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
    decision = policy.decide(layer)
    if decision.format is None or _float32.export is None:
        return decision
    _float32.export.take(layer)
    return Decision(None, "exported in float32")


class Export:
    """What happens while every layer runs in FP32, whatever its policy, because a model leaves.

    Attributes:
        layers: Those that would run on integers, by path.
        refusal: Why it cannot be done; Keras and TensorFlow may hide the exception.
    """

    def __init__(self):
        self.layers: dict[str, keras.layers.Layer] = {}
        self.refusal: ValueError | None = None

    def take(self, layer: keras.layers.Layer) -> None:
        path = layer.path or layer.name
        if _in_a_function_of_the_users():
            self.refuse(
                f"Cannot export layer '{path}' in float32: it is called in a tf.function of your "
                "own, which would keep what is traced now, for training too. Take tf.function "
                'away, or call keras_dfp.set_model_policy(model, "float32") before the model is '
                "first called."
            )
        self.layers[path] = layer

    def refuse(self, reason: str) -> None:
        self.refusal = ValueError(reason)
        raise self.refusal


class _Float32(threading.local):
    export: Export | None = None


_float32 = _Float32()


def current_export() -> Export | None:
    """Returns the `Export` of the `exported_in_float32` that this is inside of."""
    return _float32.export


@contextlib.contextmanager
def exported_in_float32() -> Iterator[Export]:
    """Lets every layer run in FP32 inside the `with` block, whatever its policy."""
    outer, _float32.export = _float32.export, Export()
    try:
        yield _float32.export
    finally:
        _float32.export = outer


def _in_a_function_of_the_users() -> bool:
    """Tells whether what is being traced is for a function inside the one that is exported."""
    functions, graph = 0, tf.compat.v1.get_default_graph()
    while isinstance(graph, FuncGraph):
        # Loops and branches have classes of their own.
        functions += type(graph) is FuncGraph
        graph = graph.outer_graph
    return functions > 1


def float32_by_default(layer: keras.layers.Layer) -> str:
    """Returns why a layer's products stay FP32 although its policy is a DFPPolicy, or `""`."""
    if isinstance(layer, keras.layers.SpectralNormalization):
        return "power iteration stays FP32 by default"
    if any(c.__module__.startswith("keras.src.layers.preprocessing") for c in type(layer).__mro__):
        return "preprocessing stays FP32 by default"
    return ""


def in_scope(
    decision: Decision, layer: keras.layers.Layer, operation: str, operands: Iterable, outer: bool
) -> Decision:
    """Returns what a decision about a layer says of one of its products.

    What a layer without weights multiplies (positions, distances, filters, patches) is often
    float32 on purpose, and so is an outer product (positions times frequencies, in a layer of any
    kind): the scope `"weights"` leaves them there, but for attention.

    Args:
        decision: What was decided for the layer.
        layer: The layer.
        operation: Name of the product.
        operands: What it multiplies.
        outer: Whether it sums over nothing.
    """
    if decision.scope == "all" or any(
        isinstance(x, (keras.Variable, tf.Variable)) for x in operands
    ):
        return decision
    if outer:
        return Decision(None, "an outer product sums over nothing; scope='all' takes it")
    if owns_weights(layer) or isinstance(layer, ATTENTION) or operation == "dot_product_attention":
        return decision
    return Decision(None, "the layer has no weights; scope='all' takes it")


def owns_weights(layer: keras.layers.Layer) -> bool:
    """Tells whether a layer has variables of its own, those of the layers inside it apart."""
    return bool(layer._trainable_variables or layer._non_trainable_variables)
