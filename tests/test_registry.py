"""The plugin is in Keras as a whole or not at all, and leaves no trace."""

import dataclasses
import functools
import subprocess
import sys
import types
from pathlib import Path

import keras
import pytest

from keras_dfp import DFPPolicy, backend, internals
from keras_dfp.backend import registry

REGISTRY = tuple(registry.REGISTRY)


def each(condition=lambda replacement: True):
    return pytest.mark.parametrize("replacement", [*filter(condition, REGISTRY)], ids=str)


@pytest.fixture
def stock(monkeypatch):
    """Keras without the plugin; what a test does to Keras is undone before it comes back."""
    backend.uninstall()
    yield monkeypatch
    monkeypatch.undo()
    backend.install()


def everything():
    return {(r.owner, name): value for r in REGISTRY for name, value in vars(r.owner).items()}


def refuses(match):
    """Checks that installing raises an error that says what to do, and changes nothing."""
    before = everything()
    message = rf"keras_dfp does not know Keras {keras.__version__} with .*{match}.* Use Keras 3\.10"
    with pytest.raises(RuntimeError, match=message):
        backend.install()
    assert not backend.installed()
    assert everything() == before
    with pytest.raises(RuntimeError, match=match):
        DFPPolicy()


def test_uninstall_gives_keras_back_everything(stock):
    before = everything()
    assert not backend.installed()
    backend.install()
    backend.install()
    assert backend.installed()
    assert all(vars(r.owner)[r.name] is not before[r.owner, r.name] for r in REGISTRY)
    backend.uninstall()
    assert everything() == before
    assert DFPPolicy() == DFPPolicy("dfp16")
    with pytest.raises(ValueError, match="dfp16"):
        keras.DTypePolicy("dfp16")


@each()
def test_what_does_not_exist(stock, replacement):
    stock.delattr(replacement.owner, replacement.name)
    refuses(rf"{replacement.name} (does not exist|is inherited)")


@each(lambda r: isinstance(r.owner, type))
def test_what_is_inherited(stock, replacement):
    heir = type("Heir", (replacement.owner,), {})
    stock.setattr(registry, "REGISTRY", with_another(replacement, owner=heir))
    refuses(rf"Heir\.{replacement.name} is inherited")


def other(one_that_nobody_expects=1):
    """Stands for what a newer Keras may have under an old name, or where Keras may call it from."""
    return keras.src.backend.numpy.mean, other.__defaults__


@each(lambda r: r.parameters != ("...",))
def test_what_has_other_parameters(stock, replacement):
    wrap = {property: lambda f: property(f, f), classmethod: classmethod}.get(replacement.kind)
    changed = wrap(other) if wrap else other
    stock.setattr(replacement.owner, replacement.name, changed)
    refuses(rf"parameters of .*{replacement.name} are \(one_that_nobody_expects\)")


@each()
def test_what_is_something_else(stock, replacement):
    stock.setattr(replacement.owner, replacement.name, 1)
    refuses(rf"{replacement.name} is a int")


@each(lambda r: r.called_by is not None)
def test_what_keras_does_not_call(stock, replacement):
    stock.setattr(registry, "REGISTRY", with_another(replacement, called_by=other))
    refuses(rf"{replacement.name} is not what .*other calls")


@each()
def test_what_cannot_be_made(stock, replacement):
    def make(original):
        raise ZeroDivisionError

    stock.setattr(registry, "REGISTRY", with_another(replacement, make=make))
    before = everything()
    with pytest.raises(ZeroDivisionError):
        backend.install()
    assert not backend.installed()
    assert everything() == before


def with_another(replacement, **changes):
    changed = dataclasses.replace(replacement, **changes)
    return [changed if r is replacement else r for r in REGISTRY]


def test_a_module_that_keras_no_longer_looks_into(stock):
    copy = types.ModuleType("backend")
    vars(copy).update(vars(keras.src.backend))
    if isinstance(copy.rnn, types.ModuleType):
        copy.rnn = types.SimpleNamespace(rnn=copy.rnn.rnn)
    stock.setattr(keras.src.layers.rnn.rnn, "backend", copy)
    refuses(r"rnn is not what .*RNN\.inner_loop calls")


def test_a_caller_that_shows_no_code(stock):
    (matmul,) = [r for r in REGISTRY if r.name == "matmul"]
    wrapped = functools.wraps(matmul.called_by)(lambda *args: None)
    stock.setattr(registry, "REGISTRY", with_another(matmul, called_by=wrapped))
    registry.check()
    stock.setattr(registry, "REGISTRY", with_another(matmul, called_by=len))
    refuses("matmul is not what builtins.len calls")


def test_a_name_that_moved_away(stock):
    stock.setattr(internals, "missing", [])
    moved = internals.find("keras.src.backend.nowhere", "keras.src.backend:ops.nowhere")
    refuses("keras.src.backend.nowhere or keras.src.backend.ops.nowhere does not exist")
    assert not isinstance(1, moved)
    with pytest.raises(RuntimeError, match="does not know Keras .*nowhere does not exist"):
        _ = moved.function
    internals.missing.clear()
    assert internals.find("keras.src.backend.nowhere", "keras:layers.Dense") is keras.layers.Dense
    assert internals.defining(keras.Model, "fit") in keras.Model.__mro__
    assert internals.missing == []
    internals.defining(keras.Model, "nowhere")
    refuses(r"Model\.nowhere does not exist")


def test_float32_does_not_need_the_plugin(stock):
    stock.delattr(internals.nn, "conv")
    import keras_dfp

    with keras_dfp.policy_scope("float32"):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    keras_dfp.set_model_policy(model, "float32")
    config = keras.dtype_policies.serialize(keras.DTypePolicy("float32"))
    keras_dfp.set_policy(config)
    dfp16 = {"class_name": "DFPPolicy", "config": {}, "module": "keras_dfp", "registered_name":
             "keras_dfp>DFPPolicy"}  # fmt: skip
    for policy in ("dfp16", dfp16):
        for use in (keras_dfp.set_policy, lambda p: keras_dfp.set_model_policy(model, p)):
            with pytest.raises(RuntimeError, match=r"does not know Keras .*conv does not exist"):
                use(policy)
    assert keras.config.dtype_policy().name == "float32"


def run(code):
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_float32_program_on_an_unknown_keras():
    run("""
import sys, warnings
import keras
owner = getattr(keras.src.backend, "ops", keras.src.backend)
hidden, owner.nn = owner.nn, None
del owner.nn
with warnings.catch_warnings(record=True) as caught:
    import keras_dfp
owner.nn = hidden
(warning,) = [str(w.message) for w in caught if "keras_dfp" in str(w.message)]
assert f"does not know Keras {keras.__version__}" in warning, warning
assert "nn does not exist" in warning, warning
assert not keras_dfp.backend.installed()
model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(2, 3), keras.layers.Flatten(),
                          keras.layers.Dense(1)])
model.compile("sgd", "mse")
model.fit(keras.ops.ones((4, 8, 8, 1)), keras.ops.ones((4, 1)), verbose=0)
try:
    keras_dfp.set_policy("dfp16")
except RuntimeError as error:
    assert str(error) == warning
else:
    sys.exit("no error")
""")


@pytest.mark.slow
def test_uninstalled_the_package_leaves_no_trace():
    run("""
import sys, types
import keras
import tensorflow as tf
keras.layers.Dense(1)
from tensorflow.python.eager.polymorphic_function import atomic_function
def everything():
    owners = {name: module for name, module in sys.modules.items() if name.startswith("keras")}
    for module in [*owners.values()]:
        owners |= {f"{v.__module__}.{v.__qualname__}": v for v in vars(module).values()
                   if isinstance(v, type)}
    owners |= {"Tensor": tf.Tensor, "Variable": tf.Variable, "atomic_function": atomic_function}
    return owners, {(owner, name): value for owner, o in owners.items()
                    for name, value in vars(o).items()}
owners, before = everything()
import keras_dfp
registered = {(r.owner, r.name) for r in keras_dfp.backend.registry.REGISTRY}
known = {id(o) for o in owners.values()}
assert registered and all(id(owner) in known for owner, _ in registered)
keras_dfp.backend.uninstall()
after = {(owner, name): value for owner, o in owners.items() for name, value in vars(o).items()
         if (owner, name) in before or not isinstance(value, types.ModuleType)}
changed = [key for key in {**before, **after} if before.get(key) is not after.get(key)]
assert not changed, changed
""")
