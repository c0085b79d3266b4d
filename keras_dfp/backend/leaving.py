"""Models that leave for where keras_dfp is not: in float32, or saying what they need.

Model.export to ONNX, OpenVINO, LiteRT;     in float32, from the same weights: nothing there
TFLiteConverter.from_keras_model            has ops for integers. A warning says so.
tf.saved_model.save, hence Model.export     as it is; a warning says what whoever loads it
and ExportArchive                           needs, and the way out.
TFLiteConverter.from_saved_model,           refused if what is converted has ops of keras_dfp:
.from_concrete_functions; freezing          it is traced already.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import warnings
from collections.abc import Iterator

import keras
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from keras_dfp.backend.calling import current_export, exported_in_float32
from keras_dfp.backend.registry import replaces
from keras_dfp.internals import convert_to_constants, saved_model

_WAY_OUT = 'keras_dfp.set_model_policy(model, "float32")'


def _ops_in(graph_def) -> str:
    """Returns the names of keras_dfp's ops in a graph and its functions, `""` if it has none."""
    functions = (function.node_def for function in graph_def.library.function)
    nodes = itertools.chain(graph_def.node, *functions)
    return ", ".join(sorted({node.op for node in nodes if node.op.startswith("Dfp")}))


def _ops_in_saved_model(folder) -> str:
    file = os.path.join(os.fspath(folder), "saved_model.pb")
    if not tf.io.gfile.exists(file):
        return ""
    with tf.io.gfile.GFile(file, "rb") as stream:
        saved = saved_model_pb2.SavedModel.FromString(stream.read())
    return ", ".join(filter(None, (_ops_in(graph.graph_def) for graph in saved.meta_graphs)))


def _refusal(ops: str, what: str, target: str) -> str:
    return (
        f"{what} has ops of keras_dfp ({ops}), for which {target} has no kernels. For float32 with "
        f"the same weights, call {_WAY_OUT} before the model is first called: what was traced "
        "before, as by a tf.function, keeps its ops; and keras_dfp.ops always multiplies integers: "
        "write keras.ops."
    )


@contextlib.contextmanager
def _in_float32(model: keras.Model, target: str) -> Iterator[None]:
    """Lets a model be traced in float32 for `target`, and says so if its policy is another."""
    with exported_in_float32() as export:
        try:
            yield
        except Exception as error:
            # The converter's own words for an op that it does not know.
            ops = ", ".join(sorted(set(re.findall(r"\bDfp\w+", str(error)))))
            if export.refusal is None and ops:
                raise ValueError(_refusal(ops, f"Model '{model.name}'", target)) from error
            if export.refusal is None:
                raise
        if export.refusal is not None:
            raise export.refusal
    if export.layers:
        warnings.warn(
            f"keras_dfp: model '{model.name}' is written for {target} in float32, with the same "
            f"weights, as after {_WAY_OUT}: {target} has no kernels for the integers of a "
            f"DFPPolicy, which {len(export.layers)} layers have here. The model keeps its policy.",
            stacklevel=4,
        )


_TARGETS = {"onnx": "ONNX", "openvino": "OpenVINO", "litert": "LiteRT"}


@replaces(keras.Model, "export", "self filepath format ...")
def _export(original):
    @functools.wraps(original)
    def export(self, filepath, format="tf_saved_model", *args, **kwargs):
        if format not in _TARGETS:
            return original(self, filepath, format, *args, **kwargs)
        with _in_float32(self, _TARGETS[format]):
            return original(self, filepath, format, *args, **kwargs)

    return export


# Not `tf.saved_model.save`, which calls this: Python imports that module twice, when somebody,
# as Keras does, imports from `tensorflow.saved_model`.
@replaces(saved_model, "save_and_return_nodes", "obj export_dir ...")
def _save(original):
    @functools.wraps(original)
    def save(obj, export_dir, *args, **kwargs):
        result = original(obj, export_dir, *args, **kwargs)
        ops, export = _ops_in_saved_model(export_dir), current_export()
        if ops and export is not None:
            export.refuse(_refusal(ops, "The model", "what it is exported to"))
        if ops:
            warnings.warn(
                f"keras_dfp: the SavedModel {os.fspath(export_dir)} has ops of keras_dfp ({ops}): "
                "it loads only after `import keras_dfp`. For one that loads without, in float32 "
                f"with the same weights, call {_WAY_OUT} before exporting.",
                stacklevel=3,
            )
        return result

    return save


@replaces(convert_to_constants, "convert_variables_to_constants_v2", "func ...")
def _freeze(original):
    """Graphs are frozen for other runtimes than TensorFlow: by tf2onnx, for one."""

    @functools.wraps(original)
    def freeze(func, *args, **kwargs):
        _check_function(func, "what takes frozen graphs, as ONNX,")
        return original(func, *args, **kwargs)

    return freeze


def _check_function(function, target: str) -> None:
    """Raises ValueError if what a concrete function was traced to has ops of keras_dfp."""
    if ops := _ops_in(function.graph.as_graph_def()):
        what = f"The function {tf.compat.as_str(function.name)}"
        raise ValueError(_refusal(ops, what, target))


if hasattr(tf, "lite"):  # TensorFlow means to leave it to a package of its own.

    @replaces(tf.lite.TFLiteConverter, "from_keras_model", "cls model", kind=classmethod)
    def _from_keras_model(original):
        def from_keras_model(cls, model):
            converter = original.__func__(cls, model)
            convert = converter.convert

            @functools.wraps(convert)
            def convert_in_float32():
                with _in_float32(model, _TARGETS["litert"]):
                    return convert()

            converter.convert = convert_in_float32
            return converter

        return classmethod(functools.wraps(original.__func__)(from_keras_model))

    @replaces(
        tf.lite.TFLiteConverter, "from_saved_model", "cls saved_model_dir ...", kind=classmethod
    )
    def _from_saved_model(original):
        def from_saved_model(cls, saved_model_dir, *args, **kwargs):
            if ops := _ops_in_saved_model(saved_model_dir):
                what = f"The SavedModel {os.fspath(saved_model_dir)}"
                raise ValueError(_refusal(ops, what, _TARGETS["litert"]))
            return original.__func__(cls, saved_model_dir, *args, **kwargs)

        return classmethod(functools.wraps(original.__func__)(from_saved_model))

    @replaces(tf.lite.TFLiteConverter, "from_concrete_functions", "cls funcs ...", kind=classmethod)
    def _from_concrete_functions(original):
        def from_concrete_functions(cls, funcs, *args, **kwargs):
            for func in funcs:
                _check_function(func, _TARGETS["litert"])
            return original.__func__(cls, funcs, *args, **kwargs)

        return classmethod(functools.wraps(original.__func__)(from_concrete_functions))
