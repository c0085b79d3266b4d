"""Keras 2 beside the plugin."""

import os
import subprocess
import sys

import keras
import pytest

import keras_dfp


@pytest.mark.slow
@pytest.mark.parametrize(("value", "warned"), [("1", True), ("0", False)])
def test_the_import_warns_where_tf_keras_is_keras_2(value, warned):
    result = subprocess.run(
        [sys.executable, "-c", "import keras_dfp"],
        env={**os.environ, "TF_USE_LEGACY_KERAS": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("whose models no policy of keras_dfp reaches" in result.stderr) == warned


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("set_model_policy", lambda model: keras_dfp.set_model_policy(model, "dfp16")),
        ("describe", keras_dfp.describe),
        ("audit", lambda model: keras_dfp.audit(model, [1.0])),
    ],
)
def test_what_is_no_model(name, call):
    message = f"{name}: model must be a Keras model .keras.Model.; got"
    with pytest.raises(TypeError, match=f"{message} builtins.str"):
        call("resnet50")
    with pytest.raises(TypeError, match=message):
        call(keras.layers.Dense)
    tf_keras = pytest.importorskip("tf_keras")
    with pytest.raises(TypeError, match=f"{message} tf_keras.*Sequential, of Keras 2"):
        call(tf_keras.Sequential())
