"""Models that leave: float32 where there are no integers, and what is said about it."""

import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import convert_to_constants

import keras_dfp

WAY_OUT = r'keras_dfp\.set_model_policy\(model, "float32"\)'
X = np.random.default_rng(0).normal(size=(3, 6, 6, 3)).astype("float32")
SPEC = tf.TensorSpec((None, 6, 6, 3), tf.float32)


def functional():
    x = inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(4, 3, padding="same", use_bias=False)(x)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    x = keras.layers.Add()([x, keras.layers.Conv2D(4, 1)(x)])
    x = keras.layers.Reshape((36, 4))(x)
    x = keras.layers.MultiHeadAttention(2, 4)(x, x)
    x = keras.layers.Dense(6, name="excluded")(keras.layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, keras.layers.Dense(5, activation="softmax", name="other")(x))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.conv, self.dense = keras.layers.Conv2D(4, 3), keras.layers.Dense(2)

    def call(self, x):
        return self.dense(keras.ops.mean(self.conv(x), (1, 2)))


class InAFunction(Subclassed):
    @tf.function
    def call(self, x):
        return self.dense(keras.ops.mean(self.conv(x), (1, 2)))


class OnOurOps(Subclassed):
    def call(self, x):
        return keras_dfp.ops.matmul(super().call(x), tf.ones((2, 3)))


def loaded(folder):
    policy = keras_dfp.DFPPolicy(exclude=["excluded"], overrides={"other": {"mantissa_bits": 8}})
    with keras_dfp.policy_scope(policy):
        functional().save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


def subclassed(kind=Subclassed):
    with keras_dfp.policy_scope("dfp16"):
        model = kind()
    model(X)
    return model


def in_float32(model):
    """Returns what stock Keras computes from the weights of a model."""
    policies = [layer.dtype_policy for layer in model._flatten_layers()]
    keras_dfp.set_model_policy(model, "float32")
    result = model(X, training=False).numpy()
    for layer, policy in zip(model._flatten_layers(), policies, strict=True):
        layer.dtype_policy = policy
    return result


def run_lite(content):
    interpreter = tf.lite.Interpreter(model_content=content)
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], X.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], X)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def export_litert(model, folder):
    model.export(folder / "model.tflite", format="litert", verbose=False)
    return run_lite((folder / "model.tflite").read_bytes())


def convert_keras_model(model, folder):
    return run_lite(tf.lite.TFLiteConverter.from_keras_model(model).convert())


def export_onnx(model, folder):
    pytest.importorskip("tf2onnx")
    runtime = pytest.importorskip("onnxruntime")
    model.export(str(folder / "model.onnx"), format="onnx", verbose=False)
    session = runtime.InferenceSession(folder / "model.onnx")
    return session.run(None, {session.get_inputs()[0].name: X})[0]


def export_openvino(model, folder):
    openvino = pytest.importorskip("openvino")
    model.export(str(folder / "model.xml"), format="openvino", verbose=False)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino.compile_model(folder / "model.xml", "CPU", exact)(X)[0]


@pytest.mark.parametrize(
    "make", [loaded, lambda folder: subclassed()], ids=["loaded", "subclassed"]
)
@pytest.mark.parametrize(
    "export", [export_litert, convert_keras_model, export_onnx, export_openvino]
)
def test_what_has_no_integers_gets_float32(export, make, tmp_path):
    model = make(tmp_path)
    before = model(X).numpy()
    with pytest.warns(UserWarning, match=WAY_OUT) as caught:
        result = export(model, tmp_path)
    (said,) = [w for w in caught if "keras_dfp" in str(w.message)]
    assert said.filename == __file__
    np.testing.assert_allclose(result, in_float32(model), atol=2e-6)
    # The model itself is as it was.
    np.testing.assert_array_equal(model(X), before)
    assert np.any(before != in_float32(model))


def export_saved_model(model, folder):
    model.export(folder, verbose=False)


def archive(model, folder):
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", model.__call__, [SPEC])
    archive.write_out(folder, verbose=False)


SAVE = [export_saved_model, archive, tf.saved_model.save]


@pytest.mark.parametrize("save", SAVE)
def test_a_saved_model_says_what_it_needs(save, tmp_path):
    model = subclassed()
    with pytest.warns(UserWarning, match=f"import keras_dfp.*{WAY_OUT}"):
        save(model, str(tmp_path / "integers"))
    keras_dfp.set_model_policy(model, "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(model, str(tmp_path / "float32"))


@pytest.mark.slow
def test_a_saved_model_is_loaded_elsewhere(tmp_path):
    model = loaded(tmp_path)
    expected = [model(X, training=False).numpy()]
    with pytest.warns(UserWarning, match="import keras_dfp"):
        model.export(tmp_path / "integers", verbose=False)
    keras_dfp.set_model_policy(model, "float32")
    model.export(tmp_path / "float32", verbose=False)
    expected.append(model(X, training=False).numpy())
    np.save(tmp_path / "x.npy", X)
    program = """
import numpy as np, tensorflow as tf
x = np.load("x.npy")
loaded = tf.saved_model.load("float32")
np.save("float32.npy", loaded.serve(x))
try:
    tf.saved_model.load("integers")
except Exception as error:
    assert "Dfp" in str(error), error
else:
    raise AssertionError("it loads without keras_dfp")
import keras_dfp
loaded = tf.saved_model.load("integers")
np.save("integers.npy", loaded.serve(x))
"""
    (tmp_path / "load.py").write_text(program)
    subprocess.run([sys.executable, "load.py"], cwd=tmp_path, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "integers.npy"), expected[0])
    np.testing.assert_allclose(np.load(tmp_path / "float32.npy"), expected[1], atol=1e-6)


def test_what_is_traced_already_is_refused(tmp_path):
    model = subclassed()
    function = tf.function(model, input_signature=[SPEC]).get_concrete_function()
    with pytest.warns(UserWarning, match="import keras_dfp"):
        export_saved_model(model, str(tmp_path / "saved"))
    refused = f"has ops of keras_dfp \\(.*DfpQuantize.*{WAY_OUT}"
    with pytest.raises(ValueError, match=refused):
        tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=refused):
        tf.lite.TFLiteConverter.from_concrete_functions([function], model)
    with pytest.raises(ValueError, match=refused):
        # What tf2onnx, say, begins with.
        convert_to_constants.convert_variables_to_constants_v2(function)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (InAFunction, f"it is called in a tf.function of your own.*{WAY_OUT}"),
        (OnOurOps, "has ops of keras_dfp .*DfpMatmul.*write keras.ops"),
    ],
)
@pytest.mark.parametrize("export", [export_litert, convert_keras_model, export_onnx])
def test_what_cannot_be_float32_is_refused(export, kind, message, tmp_path):
    model = subclassed(kind)
    before = model(X).numpy()
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path)
    np.testing.assert_array_equal(model(X), before)
