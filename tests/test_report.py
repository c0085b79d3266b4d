"""describe(model): every layer that multiplies, how, and why."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_dfp
from keras_dfp import DFPFormat, DFPPolicy, backend


def summary(model, *args, **kwargs):
    rows = keras_dfp.describe(model, *args, **kwargs).rows
    return [(row["path"].split("/")[-1], row["operations"], row["format"]) for row in rows]


class RawMatmul(layers.Layer):
    """A custom layer that passes by Keras for one of its two products."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3), name="kernel")

    def call(self, x):
        return tf.matmul(x, self.kernel) + keras.ops.matmul(x, self.kernel)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="subclassed")
        self.convolution = layers.Conv1D(4, 3, name="convolution")
        self.recurrent = layers.LSTM(3, name="recurrent")

    def call(self, x):
        return self.recurrent(self.convolution(x))


def test_rows():
    with keras_dfp.policy_scope(DFPPolicy(products=["forward"], exclude=["head"])):
        inputs = keras.Input((8, 8, 3))
        x = layers.Conv2D(4, 3, name="stem")(inputs)
        x = layers.BatchNormalization()(x)
        x = layers.ReLU()(x)
        x = layers.Dense(2, name="hidden", dtype="float32")(layers.Flatten()(x))
        model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    report = keras_dfp.describe(model)
    assert report.rows == [
        {
            "path": "stem",
            "layer": "Conv2D",
            "operations": {"conv": 1},
            "products": ("forward",),
            "format": DFPFormat(products=("forward",)),
            "reason": "",
            "inputs": ("float: input",),
            "bytes": 2 * 8 * 8 * 3,
        },
        {
            "path": "hidden",
            "layer": "Dense",
            "operations": {"matmul": 1},
            "products": (),
            "format": None,
            "reason": "policy float32",
            "inputs": (),
            "bytes": 0,
        },
        {
            "path": "head",
            "layer": "Dense",
            "operations": {"matmul": 1},
            "products": (),
            "format": None,
            "reason": "excluded by pattern 'head'",
            "inputs": (),
            "bytes": 0,
        },
    ]
    assert report.others == {"BatchNormalization": 1, "ReLU": 1, "Flatten": 1}


def test_the_table():
    with keras_dfp.policy_scope("dfp16"):
        model = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(2, name="a"),
                layers.Dense(2, name="b"),
                layers.ReLU(),
            ],
            name="net",
        )
    model.get_layer("b").dtype_policy = "float32"
    report = keras_dfp.describe(model)
    assert str(report) == (
        "layer  class  products  runs on                          input         why\n"
        "-----  -----  --------  -------------------------------  ------------  --------------\n"
        "net/a  Dense  1 matmul  INT16 (14 bits, nearest, exact)  float: input\n"
        "net/b  Dense  1 matmul  FP32                                           policy float32\n"
        f"1 of 2 run on integers (kernels: {report.kernels}).\n"
        "No products: 1 ReLU.\n"
        "Kept for the backward pass, per sample: 16 bytes.\n"
        "  That is 8 bytes of int16 operands of products, 8 bytes of float32 inputs of batch norm "
        "and ReLU.\n"
        "  Not counted: what other layers keep (pooling, swish, layers in FP32)."
    )


# ------------------------------------------------------------------- what the operands come from


def conv(x, **options):
    return layers.Conv2D(8, 3, padding="same", **{"use_bias": False, **options})(x)


def relu_of_batch_norm(x):
    return layers.ReLU()(layers.BatchNormalization()(x))


def residual(x, max_value=None):
    y = layers.BatchNormalization()(conv(x))
    return layers.ReLU(max_value)(layers.Add()([conv(x), y]))


BEFORE = {
    "float: input": lambda x: x,
    "float: product": conv,
    "float: fused=False": lambda x: relu_of_batch_norm(conv(x)),
    "batch norm": lambda x: layers.BatchNormalization()(conv(x)),
    "batch norm, ReLU": lambda x: relu_of_batch_norm(conv(x)),
    "batch norm, ReLU (after bias)": lambda x: relu_of_batch_norm(conv(x, use_bias=True)),
    "batch norm, ReLU (after concatenation)": lambda x: relu_of_batch_norm(
        layers.Concatenate()([x, conv(x)])
    ),
    "bias": lambda x: conv(x, use_bias=True),
    "bias, ReLU": lambda x: conv(x, use_bias=True, activation="relu"),
    "ReLU": lambda x: conv(x, activation="relu"),
    "ReLU6": lambda x: layers.ReLU(6)(conv(x)),
    "ReLU (after max pooling)": lambda x: layers.ReLU()(layers.MaxPooling2D()(x)),
    "ReLU (after BatchNormalization)": lambda x: layers.ReLU()(
        layers.BatchNormalization(dtype="float32")(x)
    ),
    "batch norm, residual sum, ReLU": residual,
    "batch norm, residual sum, ReLU6": lambda x: residual(x, 6),
    "residual sum": lambda x: layers.Add()([conv(x), conv(x)]),
    "float: max pooling": lambda x: layers.MaxPooling2D()(x),
    "float: average pooling": lambda x: layers.AveragePooling2D(2)(x),
    "float: concatenation": lambda x: layers.Concatenate()([x, x]),
    "float: padding": lambda x: layers.ZeroPadding2D()(x),
    "float: reshape": lambda x: layers.Reshape((64, 2, -1))(layers.ReLU()(x)),
    "bias, SiLU": lambda x: conv(x, use_bias=True, activation="silu"),
    "batch norm, SiLU": lambda x: layers.Activation("swish")(layers.BatchNormalization()(conv(x))),
    "float: gelu": lambda x: layers.Activation("gelu")(x),
    "float: difference": lambda x: x - 1.0,
    "residual sum (after input)": lambda x: x + x,
    "float: sigmoid": lambda x: layers.Activation("sigmoid")(x),
    "float: Multiply": lambda x: layers.Multiply()([x, x]),
    "float: Dropout": lambda x: layers.Dropout(0.5)(x),
    "float: LayerNormalization": lambda x: layers.LayerNormalization()(x),
    "float: LocalResponseNormalization": lambda x: keras_dfp.layers.LocalResponseNormalization()(x),
}


@pytest.mark.parametrize("words", BEFORE)
def test_what_an_operand_comes_from(words):
    with keras_dfp.policy_scope(DFPPolicy(fused="fused=False" not in words)):
        inputs = keras.Input((16, 16, 4))
        x = BEFORE[words](inputs)
        model = keras.Model(inputs, layers.Conv2D(2, 1, name="last")(x))
    report = keras_dfp.describe(model)
    (row,) = [row for row in report.rows if row["path"] == "last"]
    assert row["inputs"] == (words,)
    assert words in str(report)


def test_layers_that_read_one_activation():
    with keras_dfp.policy_scope("dfp16"):
        inputs = keras.Input((8, 8, 4))
        x = relu_of_batch_norm(conv(inputs))
        model = keras.Model(inputs, [conv(x, name="a"), conv(x, name="b")])
    report = keras_dfp.describe(model)
    _, a, b = report.rows
    assert a["inputs"] == b["inputs"] == ("batch norm, ReLU",)
    assert (a["bytes"], b["bytes"]) == (2 * 8 * 8 * 8, 0)
    assert report.kept["mantissas"] == 2 * 8 * 8 * (4 + 8)


def test_an_activation_in_two_formats():
    inputs = keras.Input((8, 8, 4))
    x = layers.ReLU(dtype="dfp16")(inputs)
    outputs = [conv(x, dtype=DFPPolicy(mantissa_bits=bits)) for bits in (14, 10)]
    a, b = keras_dfp.describe(keras.Model(inputs, outputs)).rows
    assert a["inputs"] == ("ReLU (after input)",)
    assert b["inputs"] == ("float: quantized in another format too",)
    assert a["bytes"] == b["bytes"] == 2 * 8 * 8 * 4


def test_products_of_two_activations():
    layer = layers.MultiHeadAttention(2, 4, dtype="dfp16")
    inputs = keras.Input((5, 8))
    rows = {
        row["path"].split("/")[-1]: row
        for row in keras_dfp.describe(keras.Model(inputs, layer(inputs, inputs))).rows
    }
    assert rows["query"]["inputs"] == rows["key"]["inputs"] == ("float: input",)
    attention = rows[layer.name]
    assert attention["inputs"] == ("float: EinsumDense", "float: softmax")
    # Query, key and value; the weights of two heads.
    assert attention["bytes"] == 2 * (3 * 5 * 8 + 2 * 5 * 5)


def test_a_float32_forward_pass():
    layer = layers.Dense(2, dtype=DFPPolicy(products=["weight_gradient"]))
    (row,) = keras_dfp.describe(layer, input_shape=(None, 4)).rows
    assert (row["inputs"], row["bytes"]) == (("float: forward in FP32",), 0)


def test_the_operands_of_a_loop():
    layer = layers.LSTM(3, dtype="dfp16")
    report = keras_dfp.describe(layer, input_shape=(None, 5, 4))
    (row,) = report.rows
    assert row["inputs"] == ("float: step of a sequence", "float: state of a loop")
    assert row["bytes"] is None
    assert report.kept == {"mantissas": 0, "floats": 0, "masks": 0, "unknown": 2}
    assert "per sample: 0 bytes and 2 tensors of unknown size." in str(report)


# --------------------------------------------------------------------------------- batch norm


def normalizations(*norms):
    inputs = keras.Input((4, 4, 8))
    x = layers.Conv2D(8, 1, dtype="dfp16")(inputs)
    for norm in norms:
        x = norm(x)
    report = keras_dfp.describe(keras.Model(inputs, x))
    return [(row["native"], row["reason"], row["bytes"]) for row in report.normalizations], report


NATIVE = 4 * 4 * 4 * 8


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (True, "", NATIVE)),
        (dict(trainable=False), (True, "", NATIVE)),
        (dict(synchronized=True), (True, "synchronized", NATIVE)),
        (dict(axis=1), (False, "axis 1 is not the last", 0)),
        (dict(dtype="float32"), (False, "policy float32", 0)),
        (
            dict(dtype=DFPPolicy(exclude=["norm"]), name="norm"),
            (False, "excluded by pattern 'norm'", 0),
        ),
    ],
    ids=["native", "frozen", "synchronized", "axis", "float32", "excluded"],
)
def test_batch_norm(options, expected):
    (row,), report = normalizations(layers.BatchNormalization(**{"dtype": "dfp16", **options}))
    assert row == expected
    lines = str(report).splitlines()
    assert f"Batch norm: {int(expected[0])} of 1 on the native op." in lines
    if expected[1]:
        (line,) = [line for line in lines if f"({expected[1]})" in line]
        assert line.startswith("  TensorFlow's stat" if expected[0] else "  Keras's own")


def test_batch_norm_with_a_mask():
    x = keras.Input((4, 8))
    y = layers.BatchNormalization(dtype="dfp16")(layers.Masking()(x))
    (row,) = keras_dfp.describe(keras.Model(x, layers.Dense(2, dtype="dfp16")(y))).normalizations
    assert (row["native"], row["reason"]) == (True, "a mask")


def test_many_batch_norms_of_one_reason_are_one_line():
    names = [f"n{i}" for i in range(5)]
    found = [layers.BatchNormalization(name=name, dtype="float32") for name in names]
    _, report = normalizations(*found)
    assert "  Keras's own (policy float32): n0, n1, n2 and 2 more" in str(report).splitlines()


# ----------------------------------------------------------------- kept for the backward pass


@pytest.mark.parametrize("batch", [None, 2])
def test_bytes_kept(batch):
    with keras_dfp.policy_scope("dfp16"):
        inputs = keras.Input((8, 8, 4), batch_size=batch)
        x = relu_of_batch_norm(conv(inputs))
        x = layers.ReLU()(layers.Add()([layers.BatchNormalization()(conv(x)), x]))
        x = layers.MaxPooling2D()(x)
        x = conv(x, use_bias=True, activation="relu")
        x = layers.Dense(3)(layers.GlobalAveragePooling2D()(x))
    report = keras_dfp.describe(keras.Model(inputs, x))
    image = 8 * 8 * 8
    assert report.kept == {
        "mantissas": 2 * (8 * 8 * 4 + image + image // 4 + 8),
        "floats": 4 * (image + image + image // 4),
        "masks": image // 8,
        "unknown": 0,
    }
    assert report.kept["mantissas"] == sum(row["bytes"] for row in report.rows)
    assert [row["bytes"] for row in report.normalizations] == [4 * image] * 2
    assert "  That is 1.81 kB of int16 operands of products, 4.61 kB of float32 inputs" in str(
        report
    )


@pytest.mark.parametrize("max_value", [None, 6])
def test_a_residual_relu_without_bits_keeps_its_result(max_value):
    filters = 4 if max_value is None else 8
    with keras_dfp.policy_scope("dfp16"):
        inputs = keras.Input((4, 4, filters))
        y = layers.Conv2D(filters, 1, use_bias=False)(inputs)
        model = keras.Model(inputs, layers.ReLU(max_value)(layers.Add()([y, inputs])))
    kept = keras_dfp.describe(model).kept
    assert (kept["floats"], kept["masks"]) == (4 * 4 * 4 * filters, 0)


def test_a_reshape_that_joins_samples_with_positions():
    class Join(layers.Layer):
        def call(self, x):
            return keras.ops.reshape(x, (-1, 4))

    model = keras.Sequential([keras.Input((3, 4)), Join(), layers.Dense(2, dtype="dfp16")])
    (row,) = keras_dfp.describe(model).rows
    assert row["bytes"] == 2 * 3 * 4


def test_bytes_of_unknown_shapes():
    layer = layers.Conv2D(2, 3, dtype="dfp16")
    report = keras_dfp.describe(layer, input_shape=(None, None, None, 3))
    assert report.rows[0]["bytes"] is None and report.kept["unknown"] == 1
    assert "per sample: 0 bytes and 1 tensor of unknown size." in str(report)


def test_float32_models_keep_what_keras_keeps():
    layer = layers.Conv2D(2, 3, activation="relu")
    report = keras_dfp.describe(layer, input_shape=(None, 8, 8, 3))
    assert set(report.kept.values()) == {0}
    assert "Kept" not in str(report)


def test_raw_tensorflow_in_a_custom_layer_shows_as_float32():
    model = keras.Sequential([keras.Input((4,)), RawMatmul(name="raw", dtype="dfp16")])
    assert summary(model) == [
        ("raw", {"MatMul": 1}, None),
        ("raw", {"matmul": 1}, DFPFormat()),
    ]
    reason = "calls TensorFlow's MatMul directly; to run it on integers, write keras.ops.matmul"
    assert reason in str(keras_dfp.describe(model))


RAW_PRODUCTS = {
    "einsum": lambda x, w: tf.einsum("bi,io->bo", x, w),
    "conv": lambda x, w: tf.nn.conv1d(x[:, None], w[None], 1, "VALID"),
    "matmul": lambda x, w: tf.tensordot(x, w, 1),
    "depthwise_conv": lambda x, w: tf.nn.depthwise_conv2d(
        x[:, None, None], w[None, None], [1] * 4, "VALID"
    ),
}


@pytest.mark.parametrize("name", RAW_PRODUCTS)
def test_raw_tensorflow_is_told_what_to_write_instead(name):
    class Raw(RawMatmul):
        def call(self, x):
            return RAW_PRODUCTS[name](x, self.kernel)

    (row,) = keras_dfp.describe(Raw(dtype="dfp16"), input_shape=(None, 4)).rows
    assert row["format"] is None and row["reason"].endswith(f"write keras.ops.{name}")
    (row,) = keras_dfp.describe(Raw(dtype="float32"), input_shape=(None, 4)).rows
    assert row["reason"] == "policy float32"


def test_a_tensorflow_function_does_not_hide_what_it_multiplies():
    square = tf.function(lambda x: tf.matmul(x, x))
    model = keras.Sequential([keras.Input((4,)), layers.Lambda(square, name="square")])
    for _ in range(2):
        assert summary(model, input_shape=(4, 4)) == [("square", {"MatMul": 1}, None)]


def test_a_tensorflow_function_that_needs_autograph():
    @tf.function
    def square(x):
        if tf.reduce_sum(x) > 0:
            x = -x
        return tf.matmul(x, x)

    class Square(layers.Layer):
        def call(self, x):
            return square(x)

    assert summary(Square(name="square"), input_shape=(4, 4)) == [("square", {"MatMul": 1}, None)]


def test_keras_dfp_ops_in_a_custom_layer_show_as_integers():
    layer = layers.Lambda(lambda x: keras_dfp.ops.matmul(x, tf.transpose(x)), name="mine")
    (row,) = keras_dfp.describe(keras.Sequential([keras.Input((4,)), layer])).rows
    assert (row["format"], row["reason"]) == (DFPFormat(), "calls keras_dfp.ops")


def test_layers_inside_layers_and_loops_are_counted_once():
    with keras_dfp.policy_scope("dfp16"):
        inputs = keras.Input((5, 4))
        shared = layers.Dense(4, name="shared")
        x = shared(shared(inputs))
        x = layers.MultiHeadAttention(2, 4, dropout=0.1, name="attention")(x, x)
        model = keras.Model(inputs, layers.LSTM(3)(x))
    assert [found[:2] for found in summary(model)] == [
        ("shared", {"matmul": 2}),
        ("query", {"einsum": 1}),
        ("key", {"einsum": 1}),
        ("value", {"einsum": 1}),
        ("attention", {"einsum": 2}),
        ("attention_output", {"einsum": 1}),
        ("lstm_cell", {"matmul": 2}),
    ]


def test_dictionaries_of_inputs():
    inputs = {name: keras.Input((3,), name=name) for name in ("a", "b")}
    product = layers.Dot(axes=-1, dtype=DFPPolicy(scope="all"), name="dot")(
        [inputs["a"], inputs["b"]]
    )
    assert summary(keras.Model(inputs, product)) == [("dot", {"matmul": 1}, DFPFormat())]


def test_preprocessing_says_why():
    model = keras.Sequential(
        [layers.RandomSharpness(0.5, dtype="dfp16"), layers.Conv2D(2, 3, dtype="dfp16")]
    )
    rows = keras_dfp.describe(model, input_shape=(None, 8, 8, 3)).rows
    assert [row["reason"] for row in rows] == ["preprocessing stays FP32 by default", ""]


def test_paper_recipe_says_why():
    with keras_dfp.policy_scope("dfp16_paper"):
        model = keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                layers.Conv2D(2, 3),
                layers.Conv2D(2, 3),
                layers.Flatten(),
                layers.Dense(2),
            ]
        )
    model.compile("sgd", "mse")
    assert [row["reason"] for row in keras_dfp.describe(model).rows] == [
        "first convolution stays FP32 under dfp16_paper",
        "",
        "last dense layer stays FP32 under dfp16_paper",
    ]


# ---------------------------------------------------------------------------- subclassed models

EXPECTED = [
    ("convolution", {"conv": 1}, DFPFormat()),
    ("lstm_cell", {"matmul": 2}, DFPFormat()),
]


@pytest.fixture
def subclassed():
    with keras_dfp.policy_scope("dfp16"):
        return Subclassed()


def test_a_subclassed_model_that_was_called(subclassed):
    subclassed(np.ones((2, 8, 4), "float32"))
    assert summary(subclassed) == EXPECTED


class Mixed(keras.Model):
    """Takes what is not float32, in a structure."""

    def __init__(self):
        super().__init__()
        self.hidden, self.gate = layers.Dense(4, name="hidden"), layers.Dense(4, name="gate")
        self.head = layers.Dense(1, name="head")

    def call(self, x, mask=None):
        return self.head(self.hidden(x["a"]) + self.gate(x["b"]))


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "float16", "float64"])
def test_a_subclassed_model_runs_on_the_dtypes_it_was_fitted_on(dtype):
    keras_dfp.set_policy("dfp16")
    model = Mixed()
    x = {"a": np.ones((4, 3), dtype), "b": np.ones((4, 3), "float32")}
    model.compile("sgd", "mse")
    model.fit(x, np.ones((4, 1)), verbose=0)
    found = keras_dfp.describe(model)
    assert found == keras_dfp.describe(model, inputs=x)
    hidden = DFPFormat() if dtype.startswith("float") else None
    assert [row["format"] for row in found.rows] == [hidden, DFPFormat(), DFPFormat()]
    # Describing other inputs does not count as a call.
    keras_dfp.describe(model, inputs={**x, "a": x["b"]})
    assert keras_dfp.describe(model) == found
    # A later call does.
    model({**x, "a": x["b"]})
    assert all(row["format"] for row in keras_dfp.describe(model).rows)


def test_sparse_inputs_are_remembered_as_sparse():
    layer = layers.Dense(2, dtype="dfp16")
    x = tf.sparse.from_dense(np.eye(3, dtype="float32"))
    layer(x)
    (row,) = keras_dfp.describe(layer).rows
    assert (row["format"], row["reason"]) == (None, "an operand is a SparseTensor")
    assert keras_dfp.describe(layer, inputs=x).rows == [row]


def test_a_model_that_was_only_built_is_taken_to_be_float32_and_says_so(subclassed):
    subclassed.build((None, 8, 4))
    with pytest.warns(UserWarning, match="takes its inputs to be float32.*pass inputs="):
        assert summary(subclassed) == EXPECTED


def test_a_sequential_model_casts_its_inputs():
    model = keras.Sequential([layers.Dense(2, dtype="dfp16", name="dense")])
    model.compile("sgd", "mse")
    x = np.ones((4, 3), "int64")
    model.fit(x, np.ones((4, 2)), verbose=0)
    assert summary(model) == summary(model, x) == [("dense", {"matmul": 1}, DFPFormat())]


def test_a_subclassed_model_with_an_input_shape(subclassed):
    assert summary(subclassed, input_shape=(None, 8, 4)) == EXPECTED


@pytest.mark.parametrize(
    "inputs",
    [np.ones((2, 8, 4), "float32"), tf.ones((2, 8, 4)), keras.Input((8, 4))],
    ids=["array", "tensor", "Input"],
)
def test_a_subclassed_model_with_inputs(subclassed, inputs):
    assert summary(subclassed, inputs) == EXPECTED


def test_a_subclassed_model_whose_inputs_are_not_known(subclassed):
    with pytest.raises(ValueError, match="'subclassed' are not known.*input_shape="):
        keras_dfp.describe(subclassed)


def test_inputs_the_model_does_not_take(subclassed):
    with pytest.raises(ValueError, match="'subclassed' cannot be called with inputs"):
        keras_dfp.describe(subclassed, input_shape=(None, 8, 8, 4))


def test_describing_changes_nothing(subclassed):
    subclassed(np.ones((2, 8, 4), "float32"))
    subclassed.compile("sgd", "mse")
    weights = subclassed.get_weights()
    keras_dfp.describe(subclassed)
    for before, after in zip(weights, subclassed.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert subclassed.losses == []


def test_without_the_plugin():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    backend.uninstall()
    try:
        with pytest.raises(RuntimeError, match="not installed"):
            keras_dfp.describe(model)
    finally:
        backend.install()
