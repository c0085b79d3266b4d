"""DFPPolicy: the dtype policy that says which products of a layer run on integers, and how."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import types
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
from keras import dtype_policies

from keras_dfp import backend, internals, ops
from keras_dfp.backend.calling import SCOPES, Decision, float32_by_default, matches
from keras_dfp.backend.registry import replaces
from keras_dfp.internals import Functional, functional, global_state
from keras_dfp.number import PRODUCTS, DFPFormat

NAMES = ("dfp16", "dfp16_paper")


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPPolicy(dtype_policies.DTypePolicyMap):
    """A dtype policy under which convolutions and matrix products run on 16-bit integers.

    Variables, activations and everything that is not a product stay float32, and so do convolutions
    that only move data, as in `keras.ops.image.extract_patches`. The names can be used wherever
    Keras takes a dtype policy: `keras.config.set_dtype_policy("dfp16")`,
    `keras.layers.Dense(10, dtype="dfp16")`.

    A policy is immutable; `layer.dtype_policy = other` gives one layer another policy.

    Args:
        name: `"dfp16"`: the convolutions and matrix products of `scope`, exactly; or
            `"dfp16_paper"`, the recipe of Das et al. (2018): `accumulation="spill"` and
            `exponents="tensor"` always, and the first convolution and the last `Dense` layer stay
            FP32 (found in the order of the model's layers, the `Dense` among those of the first
            output, when the model is compiled or given to `set_model_policy`).
        mantissa_bits: Bits of a mantissa, sign included, 8 to 16.
        rounding: `"nearest"`, `"truncate"` or `"stochastic"`.
        accumulation: `"exact"` or `"spill"`.
        products: Which of `"forward"`, `"input_gradient"` and `"weight_gradient"` run on
            integers; the others run in FP32.
        exponents: `"sample"`: every sample (in matrix products, every row) has an exponent of its
            own, so that its result does not depend on the other samples of its batch; or
            `"tensor"`: one exponent for all of a tensor, as in the paper.
        fused: Whether, in a `tf.function` (and so in `fit`), batch norm, bias, residual sum, ReLU
            and quantizing run as one pass over memory, forward and backward. It changes no bit.
        scope: Which products run on integers. `"weights"`, the default: those of layers that have
            weights of their own, those with a variable as an operand, and those of attention
            (Keras's attention layers, and `dot_product_attention` anywhere). What other layers
            multiply (positions, distances, filter banks, Gram matrices) stays FP32. `"all"`: every
            product.
        exclude: Patterns of the layers that stay FP32.
        overrides: Dict from the pattern of a layer to what it has instead: a dict of the options
            above that differ, another DFPPolicy, `"dfp16"` or `"float32"`. The first pattern
            that matches counts; overrides go before `exclude` and before what Keras layers stay
            FP32 by default (preprocessing, the power iteration of `SpectralNormalization`).

    Convolutions that only move data, as in `keras.ops.image.extract_patches`, are never rounded.

    Patterns are shell-style (`*`, `?`, `[...]`) and match a layer's full path, such as
    `"encoder/attention/query"`, or its last component, `"query"`. `*` matches `/` too:
    `"encoder/*"` is everything inside `encoder`. A pattern that matches no layer is reported by a
    warning when the model is compiled, given to `set_model_policy` or described.

    Raises:
        ValueError: If an argument is not allowed; the message says what is.
        RuntimeError: With a Keras that keras_dfp does not know.

    Example:

    >>> policy = keras_dfp.DFPPolicy(exclude=["predictions"],
    ...                              overrides={"conv1*": {"mantissa_bits": 16}})
    >>> keras_dfp.set_policy(policy)
    """

    def __init__(
        self,
        name: str = "dfp16",
        *,
        mantissa_bits: int = 14,
        rounding: str = "nearest",
        accumulation: str = "exact",
        products: Iterable[str] = PRODUCTS,
        exponents: str = "sample",
        fused: bool = True,
        scope: str = "weights",
        exclude: Iterable[str] = (),
        overrides: Mapping[str, Any] | None = None,
    ):
        backend.check()
        if name not in NAMES:
            allowed = " or ".join(map(repr, NAMES))
            raise ValueError(f"The name of a DFPPolicy must be {allowed}; got {name!r}.")
        self._own_name = name
        self.format = DFPFormat(
            mantissa_bits=mantissa_bits,
            rounding=rounding,
            accumulation="spill" if name == "dfp16_paper" else accumulation,
            exponents="tensor" if name == "dfp16_paper" else exponents,
            products=products if isinstance(products, str) else tuple(products),
            fused=fused,
        )
        if scope not in SCOPES:
            raise ValueError(f"scope must be {' or '.join(map(repr, SCOPES))}; got {scope!r}.")
        self.scope = scope
        self.exclude = _patterns(exclude)
        self.overrides = {
            _pattern(pattern, "overrides"): self._override(pattern, value)
            for pattern, value in (overrides or {}).items()
        }
        super().__init__(
            default_policy="float32",
            policy_map={pattern: _policy_of(d) for pattern, d in self.overrides.items()},
        )

    def _override(self, pattern: str, value) -> Decision:
        """Returns the decision that an override stands for."""
        reason = f"overridden by pattern {pattern!r}"
        if isinstance(value, dict) and "class_name" not in value:
            options = [*(field.name for field in dataclasses.fields(DFPFormat)), "scope"]
            unknown = sorted(set(value) - set(options))
            if unknown:
                raise ValueError(
                    f"overrides[{pattern!r}] may change {', '.join(options)}; "
                    f"got {', '.join(unknown)}."
                )
            value = DFPPolicy(**{**_options(self.format), "scope": self.scope, **value})
        policy = dtype_policies.get(value)
        if isinstance(policy, DFPPolicy) and not policy.exclude and not policy.overrides:
            return Decision(policy.format, reason, policy.scope)
        if policy == keras.DTypePolicy("float32"):
            return Decision(None, reason)
        raise ValueError(
            f"overrides[{pattern!r}] must be a dict of options, 'float32', 'dfp16' or a DFPPolicy "
            f"without exclude and overrides; got {value!r}. Give the layer itself any other dtype."
        )

    @property
    def name(self) -> str:
        return self._own_name

    @property
    def _name(self) -> str:
        return self._own_name

    @_name.setter
    def _name(self, name):
        """Keras's DTypePolicyMap unnames the policies that it holds, when it is saved."""

    def decide(self, layer: keras.layers.Layer) -> Decision:
        """Returns how the products of a layer that has this policy run, and why."""
        path = layer.path or layer.name
        decision = self._decide_by_pattern(path)
        if decision is None:
            reason = float32_by_default(layer)
            decision = Decision(None, reason) if reason else Decision(self.format, "", self.scope)
        return decision

    def _decide_by_pattern(self, path: str) -> Decision | None:
        for pattern, decision in self.overrides.items():
            if matches(pattern, path):
                return decision
        for pattern in self.exclude:
            if matches(pattern, path):
                return Decision(None, f"excluded by pattern {pattern!r}")
        return None

    def unmatched_patterns(self, layers: Iterable[keras.layers.Layer]) -> list[str]:
        """Returns the patterns of this policy that match none of the layers."""
        paths = [layer.path or layer.name for layer in layers]
        return [
            pattern
            for pattern in (*self.exclude, *self.overrides)
            if not any(matches(pattern, path) for path in paths)
        ]

    def excluding(self, layer: keras.layers.Layer) -> DFPPolicy:
        """Returns this policy with one layer more that stays FP32."""
        config = self.get_config()
        # A layer's name may hold characters that are special in patterns.
        name = "".join(f"[{c}]" if c in "*?[" else c for c in layer.name)
        config["exclude"] = [*config["exclude"], name]
        return type(self)(**config)

    # A non-empty mapping is true, an empty one is false; but Keras and its users write
    # `dtype or default`.
    def __bool__(self) -> bool:
        return True

    def __getitem__(self, path: str) -> dtype_policies.DTypePolicy:
        decision = self._decide_by_pattern(path)
        return self if decision is None else _policy_of(decision)

    def __setitem__(self, path, policy):
        raise TypeError("A DFPPolicy is immutable; use layer.dtype_policy = ..., or overrides.")

    def __delitem__(self, path):
        raise TypeError("A DFPPolicy is immutable.")

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **_options(self.format),
            "scope": self.scope,
            "exclude": list(self.exclude),
            "overrides": {
                pattern: "float32" if d.format is None else {**_options(d.format), "scope": d.scope}
                for pattern, d in self.overrides.items()
            },
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(**config)

    def __eq__(self, other) -> bool:
        return type(other) is type(self) and other._key() == self._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self):
        return self.name, self.format, self.scope, self.exclude, tuple(self.overrides.items())

    def __repr__(self) -> str:
        default = type(self)(self.name).get_config()
        config = self.get_config().items()
        options = [f"{key}={value!r}" for key, value in config if value != default[key]]
        return f"DFPPolicy({', '.join([repr(self.name), *options])})"


DFPPolicy.__module__ = "keras_dfp"


def _options(fmt: DFPFormat) -> dict[str, Any]:
    return {**dataclasses.asdict(fmt), "products": list(fmt.products)}


def _policy_of(decision: Decision) -> dtype_policies.DTypePolicy:
    if decision.format is None:
        return keras.DTypePolicy("float32")
    return DFPPolicy(**_options(decision.format), scope=decision.scope)


def _pattern(pattern, argument: str) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"Patterns in {argument} must be non-empty strings; got {pattern!r}.")
    return pattern


def _patterns(exclude) -> tuple[str, ...]:
    if isinstance(exclude, str):
        raise ValueError(f"exclude must be a list of patterns; got the string {exclude!r}.")
    return tuple(_pattern(pattern, "exclude") for pattern in exclude)


def set_policy(policy: str | dtype_policies.DTypePolicy) -> None:
    """Sets the policy of the layers that are created from now on.

    The same as `keras.config.set_dtype_policy(policy)`. As with every Keras dtype policy:
    `keras.utils.clear_session()` resets it to float32, with a warning if it was a DFPPolicy;
    threads have their own; layers that exist already, or are loaded from a file, keep theirs
    (`set_model_policy` changes those).

    Args:
        policy: A `DFPPolicy`, its name (`"dfp16"`, `"dfp16_paper"`), or any policy of Keras
            (`"float32"`).

    Example:

    >>> keras_dfp.set_policy("dfp16")
    >>> model = keras.applications.ResNet50(weights=None)
    """
    keras.config.set_dtype_policy(with_plugin(policy))


def with_plugin(policy):
    """Returns a dtype policy, or its name; installs the plugin if it is a DFPPolicy."""
    if policy in NAMES:
        policy = DFPPolicy(policy)
    elif isinstance(policy, dict):
        policy = dtype_policies.deserialize(policy)
    if isinstance(policy, DFPPolicy):
        backend.install()
    return policy


@contextlib.contextmanager
def policy_scope(policy: str | dtype_policies.DTypePolicy) -> Iterator[None]:
    """Like `set_policy`, for the layers created inside the `with` block.

    Args:
        policy: As for `set_policy`.

    Example:

    >>> with keras_dfp.policy_scope("dfp16"):
    ...     hidden = keras.layers.Dense(128)
    >>> head = keras.layers.Dense(10)   # the policy from before
    """
    previous = keras.config.dtype_policy()
    set_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(previous)


def _global_format() -> DFPFormat | None:
    policy = keras.config.dtype_policy()
    return policy.format if isinstance(policy, DFPPolicy) else None


ops.default_format = _global_format


# Not `__new__`: a class that ever had one of its own cannot return to object's.
@replaces(keras.DTypePolicy, "__init__", "self name")
def _made_by_name(original):
    """Lets `keras.DTypePolicy("dfp16")`, hence every name given to Keras, be a DFPPolicy.

    Of a name that is nearly one, Keras's error tells what it might have been.
    """

    @functools.wraps(original)
    def init(self, name=None):
        if type(self) is keras.DTypePolicy and name in NAMES:
            self.__class__ = DFPPolicy
            self.__init__(name)
            return
        with _hinted(name):
            original(self, name)

    return init


@contextlib.contextmanager
def _hinted(name) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if hint := _hint(name):
            raise ValueError(f"{error} {hint}") from error
        raise


def _hint(name: str | None) -> str:
    """Returns what is right in place of a name that was meant as one of ours; or `""`."""
    own, colon, _ = (name or "").lower().strip().partition(":")
    close = difflib.get_close_matches(own, NAMES, n=1, cutoff=0.8)
    if "dfp" not in own and not close:
        return ""
    if colon:
        return (
            "Those of keras_dfp take no options in their name; in Python, give them to "
            "keras_dfp.DFPPolicy('dfp16', mantissa_bits=12)."
        )
    meant = f"Did you mean {close[0]!r}? " if close else ""
    return f"{meant}Those of keras_dfp are {' and '.join(map(repr, NAMES))}."


@replaces(internals.dtype_policy, "_get_quantized_dtype_policy_by_str", "policy")
def _quantized_by_name(original):
    """Lets a layer on integers be quantized by Keras as the float32 layer it is otherwise."""

    def by_name(policy):
        mode, separator, source = str(policy).partition("_from_")
        if source in NAMES:
            policy = f"{mode}{separator}float32"
        return original(policy)

    return by_name


@replaces(internals.QuantizedDTypePolicy, "__init__", "self mode source_name")
def _quantized_from_float32(original):
    @functools.wraps(original)
    def init(self, mode, source_name=None):
        if source_name is None and isinstance(keras.config.dtype_policy(), DFPPolicy):
            source_name = "float32"
        with _hinted(source_name):
            original(self, mode, "float32" if source_name in NAMES else source_name)

    return init


@replaces(global_state, "threading", kind=types.ModuleType, called_by=keras.utils.clear_session)
def _warn_when_the_policy_is_dropped(original):
    """Lets `clear_session` say that it drops a DFPPolicy: what follows would run in float32.

    Everybody has a name of their own for that function; what it does first, and nothing else in its
    module does, is to make new thread-local state.
    """

    def local():
        # Not `dtype_policy()`, which sets a policy where there is none.
        policy = global_state.get_global_attribute("dtype_policy")
        if isinstance(policy, DFPPolicy):
            warnings.warn(
                f"keras_dfp: clear_session() drops the global policy {policy}; layers made from "
                "now on are float32. Call keras_dfp.set_policy again after it, or make them under "
                "keras_dfp.policy_scope or with dtype=.",
                stacklevel=3,
            )
        return original.local()

    return types.SimpleNamespace(**{**vars(original), "local": local})


@replaces(keras.layers.Layer, "dtype_policy", "self value", kind=property)
def _assign_dtype_policy(original):
    """Lets `layer.dtype_policy = ...` replace a policy where a DFPPolicy comes or goes.

    Keras writes into the policy map that the layer has, and may share with other models.
    """

    def assign(layer, policy):
        policy = dtype_policies.get(policy)
        previous = layer._dtype_policy
        if isinstance(policy, DFPPolicy) and getattr(layer, "_is_quantized", False):
            raise ValueError(
                f"keras_dfp: layer '{layer.path or layer.name}' is quantized "
                f"({previous.name}), and its weights no longer float32: it cannot have the policy "
                f"{policy!r}. Set that on the model before it is quantized."
            )
        if isinstance(previous, DFPPolicy) or isinstance(policy, DFPPolicy):
            layer._dtype_policy = keras.DTypePolicy("float32")
        try:
            original.fset(layer, policy)
        except Exception:
            layer._dtype_policy = previous
            raise

    return property(original.fget, assign, doc=original.__doc__)


@replaces(
    internals.dtype_policies,
    "serialize",
    "dtype_policy",
    called_by=keras.layers.Layer.get_config,
)
def _name_the_package(original):
    """Saves policies so that a Keras without this package says which class it lacks."""

    @functools.wraps(original)
    def serialize(dtype_policy):
        config = original(dtype_policy)
        if isinstance(dtype_policy, DFPPolicy):
            # Keras refuses a class that has no module; one that has a module, it takes for one of
            # its own policies and fails later. The class is found by its registered name.
            config |= {"module": None, "class_name": "keras_dfp.DFPPolicy"}
        return config

    return serialize


_owners: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@replaces(Functional, "__init__", "self inputs outputs name kwargs")
def _share_functional_policy(original):
    """Gives a model of another one's nodes that one's policy: `keras.ops` nodes have none."""

    @functools.wraps(original)
    def init(self, inputs, outputs, name=None, **kwargs):
        original(self, inputs, outputs, name=name, **kwargs)
        nodes = [op for op in self.operations if not isinstance(op, keras.layers.Layer)]
        owners = [reference and reference() for reference in map(_owners.get, nodes)]
        policies = [owner and owner.dtype_policy for owner in owners]
        if nodes and None not in owners and all(policy == policies[0] for policy in policies):
            if policies[0] != self.dtype_policy and (
                isinstance(policies[0], DFPPolicy) or isinstance(self.dtype_policy, DFPPolicy)
            ):
                self.dtype_policy = policies[0]
        for node in nodes:
            _owners.setdefault(node, weakref.ref(self))

    return init


@replaces(Functional, "get_config", "self")
def _save_functional_policy(original):
    """Saves the policy of a functional model itself: its `keras.ops` nodes multiply under it."""

    @functools.wraps(original)
    def get_config(self):
        config = original(self)
        if isinstance(self.dtype_policy, DFPPolicy):
            config["dtype"] = internals.dtype_policies.serialize(self.dtype_policy)
        return config

    return get_config


@replaces(
    functional,
    "functional_from_config",
    "cls config custom_objects",
    called_by=keras.Model.from_config,
)
def _load_functional_policy(original):
    """Loads it again; a model saved in FP32 does not take a global DFPPolicy on."""

    @functools.wraps(original)
    def functional_from_config(cls, config, custom_objects=None):
        config = dict(config)
        dtype = config.pop("dtype", None)
        model = original(cls, config, custom_objects=custom_objects)
        if dtype is not None:
            model.dtype_policy = dtype
        elif isinstance(model.dtype_policy, DFPPolicy):
            model.dtype_policy = "float32"
        return model

    return functional_from_config
