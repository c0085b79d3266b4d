"""What this package uses of Keras and TensorFlow that is not public: all of it, and where it is.

It moves from release to release: Keras 3.16 has the functions of its backend in `backend.ops`, and
`backend.rnn` is a module there. A name that is in none of its places does not break the import of
this package, which a program that stays float32 would suffer from: `missing` says what it is, and
`backend.registry` refuses to install the plugin.
"""

from __future__ import annotations

import importlib
import operator
import types
from typing import Any

import keras
import tensorflow as tf

# Of what was not found: in which places it was looked for.
missing: list[str] = []


def unknown(problem: str) -> RuntimeError:
    """Returns the error for a Keras, or a TensorFlow, that is not as this package expects it."""
    return RuntimeError(
        f"keras_dfp does not know Keras {keras.__version__} with TensorFlow {tf.__version__}: "
        f"{problem}. Nothing of Keras is replaced: float32 models run as ever, DFP policies are "
        "unavailable. Use Keras 3.10 to 3.16 with TensorFlow 2.16 to 2.22, or a newer keras_dfp."
    )


class _Missing(type):
    """The type of what stands for a name that was not found: nothing is an instance of it."""

    def __getattr__(cls, name):
        raise unknown(f"{cls.__doc__} does not exist")


def find(*places: str) -> Any:
    """Returns the first that exists of some modules, and attributes in modules (`module:a.b`)."""
    for place in places:
        module, _, names = place.partition(":")
        try:
            found = importlib.import_module(module)
            return operator.attrgetter(names)(found) if names else found
        except (ImportError, AttributeError):
            continue
    what = " or ".join(places).replace(":", ".")
    missing.append(what)
    return _Missing("Missing", (), {"__doc__": what})


def defining(cls: type, name: str) -> Any:
    """Returns the class, of those that `cls` inherits from, that defines an attribute."""
    for base in cls.__mro__:
        if name in vars(base):
            return base
    missing.append(f"{cls.__name__}.{name}")
    return _Missing("Missing", (), {"__doc__": missing[-1]})


# Where a class does something else than it did, and not merely in another place.
KERAS = tuple(map(int, keras.__version__.split(".")[:2]))

# ---- Keras ---------------------------------------------------------------------------------------

# In `keras.src.backend`, because that is where `keras.ops` looks: first as in Keras 3.16.
backend = find("keras.src.backend")
nn = find("keras.src.backend:ops.nn", "keras.src.backend:nn")
numpy = find("keras.src.backend:ops.numpy", "keras.src.backend:numpy")
core = find("keras.src.backend:ops.core", "keras.src.backend:core")
# `keras.remat` looks up `remat` there, `RNN.inner_loop` `rnn`.
remat_owner = find("keras.src.backend:ops", "keras.src.backend:core")
rnn = find("keras.src.backend:rnn")
rnn_owner = rnn if isinstance(rnn, types.ModuleType) else backend
sum_gradients = find("keras.src.backend.tensorflow.optimizer:TFOptimizer._all_reduce_sum_gradients")
inner_loop = find("keras.src.layers:RNN.inner_loop")
compute_output_spec = find("keras.src.backend:compute_output_spec")
cloning = find("keras.src.models.cloning")
dtype_policies = find("keras.src.dtype_policies")
dtype_policy = find("keras.src.dtype_policies.dtype_policy")
QuantizedDTypePolicy = find("keras.src.dtype_policies:QuantizedDTypePolicy")
functional = find("keras.src.models.functional")
Functional = find("keras.src.models.functional:Functional")
global_seed_generator = find("keras.src.random.seed_generator:global_seed_generator")
global_state = find("keras.src.backend.common.global_state")
current_path = find("keras.src.backend.common.name_scope:current_path")
image = find("keras.src.ops.image")
serialization_lib = find("keras.src.saving.serialization_lib")
saving_lib = find("keras.src.saving.saving_lib")
KerasSaveable = find("keras.src.saving.keras_saveable:KerasSaveable")
# What `save` and `load_model` call to turn a model into its config and back.
write_config = find(
    "keras.src.saving.saving_lib:_serialize_model_as_json",
    "keras.src.saving.saving_lib:_save_model_to_fileobj",
)
read_config = find(
    "keras.src.saving.saving_lib:_model_from_config",
    "keras.src.saving.saving_lib:_load_model_from_fileobj",
)
trainer = find("keras.src.trainers.trainer")
tf_trainer = find("keras.src.backend.tensorflow.trainer")
TFTrainer = find(
    "keras.src.backend.tensorflow.trainer:TensorFlowTrainer",
    "keras.src.backend.tensorflow.trainer:Trainer",
)
# `Trainer`, or `BaseTrainer`.
Trainer = defining(keras.Model, "compile")
Operation = defining(keras.Model, "_post_build")

# ---- TensorFlow ----------------------------------------------------------------------------------

atomic_function = find("tensorflow.python.eager.polymorphic_function.atomic_function")
from_func_graph = find(
    "tensorflow.python.eager.polymorphic_function.concrete_function"
    ":ConcreteFunction.from_func_graph"
)
convert_to_constants = find("tensorflow.python.framework.convert_to_constants")
control_flow_util = find("tensorflow.python.ops.control_flow_util")
_GRAPHS = "tensorflow.python.ops.control_flow_v2_func_graphs"
CondBranchFuncGraph = find(f"{_GRAPHS}:CondBranchFuncGraph")
ControlFlowFuncGraph = find(f"{_GRAPHS}:ControlFlowFuncGraph")
FuncGraph = find("tensorflow.python.framework.func_graph:FuncGraph")
get_read_write_resource_inputs = find(
    "tensorflow.python.framework.auto_control_deps_utils:get_read_write_resource_inputs"
)
context = find("tensorflow.python.eager.context:context")
op_callbacks = find("tensorflow.python.framework.op_callbacks")
saved_model = find("tensorflow.python.saved_model.save")
