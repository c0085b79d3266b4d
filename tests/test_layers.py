"""DFPDense and its kin: stock layers, under the policy unless they are told otherwise."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_dfp import DFPPolicy, describe, layers, set_model_policy

SEQUENCE, IMAGE, VOLUME = (6, 4), (6, 6, 4), (4, 4, 4, 4)
# Stock class, arguments, shape of a sample.
LAYERS = [
    ("Conv1D", (3, 3), SEQUENCE),
    ("Conv2D", (3, 3), IMAGE),
    ("Conv3D", (3, 2), VOLUME),
    ("DepthwiseConv1D", (3,), SEQUENCE),
    ("DepthwiseConv2D", (3,), IMAGE),
    ("Conv1DTranspose", (3, 3), SEQUENCE),
    ("Conv2DTranspose", (3, 3), IMAGE),
    ("Conv3DTranspose", (3, 2), VOLUME),
    ("SeparableConv1D", (3, 3), SEQUENCE),
    ("SeparableConv2D", (3, 3), IMAGE),
    ("Dense", (3,), SEQUENCE),
    ("EinsumDense", ("btd,dh->bth", (None, 3)), SEQUENCE),
    ("MultiHeadAttention", (2, 3), SEQUENCE),
    ("LSTM", (3,), SEQUENCE),
    ("GRU", (3,), SEQUENCE),
]


def model_of(layer, shape):
    x = keras.Input(shape)
    return keras.Model(x, layer(x, x) if "Attention" in type(layer).__name__ else layer(x))


def run(model, shape):
    """The output, and the gradients of the weights, of one batch."""

    x = np.random.default_rng(0).standard_normal((5, *shape)).astype("float32")
    with tf.GradientTape() as tape:
        y = model(x)
        loss = tf.reduce_sum(tf.sin(y))
    return [y, *tape.gradient(loss, [w.value for w in model.trainable_weights])]


def assert_equal_bits(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name, args, shape", LAYERS, ids=[name for name, *_ in LAYERS])
def test_is_the_stock_layer_under_the_policy(name, args, shape, tmp_path):
    cls, stock = getattr(layers, f"DFP{name}"), getattr(keras.layers, name)
    model = model_of(cls(*args), shape)
    reference = model_of(stock(*args, dtype="dfp16"), shape)
    reference.set_weights(model.get_weights())
    expected = run(reference, shape)
    assert_equal_bits(run(model, shape), expected)
    # And not the one of float32.
    set_model_policy(reference, "float32")
    assert not np.array_equal(run(reference, shape)[0], expected[0])

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    for other in (loaded, copy):
        assert type(other.layers[-1]) is cls
        assert other.layers[-1].dtype_policy == DFPPolicy()
        assert_equal_bits(run(other, shape), expected)


@pytest.mark.parametrize("name", ["Dense", "MultiHeadAttention", "LSTM"])
def test_a_policy_that_is_given_wins(name):
    args = next(args for known, args, _ in LAYERS if known == name)
    cls = getattr(layers, f"DFP{name}")
    coarse = DFPPolicy(mantissa_bits=9)
    for given, expected in [("float32", keras.DTypePolicy("float32")), (coarse, coarse)]:
        keras.config.set_dtype_policy("dfp16_paper")
        model = model_of(cls(*args, dtype=given), SEQUENCE)
        keras.config.set_dtype_policy("float32")
        layer = cls.from_config(model.layers[-1].get_config())
        assert model.layers[-1].dtype_policy == layer.dtype_policy == expected
        formats = {row["format"] for row in describe(model).rows}
        assert formats == {None if given == "float32" else coarse.format}


def test_the_global_policy_counts_where_it_is_on_integers():
    options = DFPPolicy(mantissa_bits=12, exponents="tensor", exclude=["head"])
    keras.config.set_dtype_policy(options)
    assert layers.DFPDense(2).dtype_policy == options
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert layers.DFPDense(2).dtype_policy == DFPPolicy()


def test_a_file_names_the_class():
    config = keras.saving.serialize_keras_object(layers.DFPConv2D(3, 3))
    assert config["registered_name"] == "keras_dfp>DFPConv2D"
    assert config["config"]["dtype"]["class_name"] == "keras_dfp.DFPPolicy"
