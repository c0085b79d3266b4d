"""The plugin: it reaches every layer that multiplies, changes nothing else, and can be removed."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from keras.src.trainers import trainer

import keras_dfp
from keras_dfp import DFPFormat, DFPPolicy, backend, ops
from keras_dfp.backend import recording


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


# ------------------------------------------------------------------------ every layer is reached


class OpsMatmul(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3), name="kernel")

    def call(self, x):
        with keras.name_scope("inner"):
            return keras.ops.matmul(x, self.kernel)


class OpsTensordot(OpsMatmul):
    def call(self, x):
        return keras.ops.tensordot(x, self.kernel, axes=1)


class OpsDot(OpsMatmul):
    def call(self, x):
        return keras.ops.dot(x, self.kernel)


class OpsOperator(OpsMatmul):
    def call(self, x):
        return x @ self.kernel


vector, sequence = normal(2, 4), normal(2, 8, 4)
image, volume = normal(2, 8, 8, 4), normal(2, 6, 6, 6, 4)

# What makes the layer from a policy, and what it is called with.
LAYERS = {
    "Dense": (lambda p: layers.Dense(3, dtype=p), vector),
    "EinsumDense": (
        lambda p: layers.EinsumDense("abc,cd->abd", output_shape=(None, 5), dtype=p),
        sequence,
    ),
    "Conv1D": (lambda p: layers.Conv1D(3, 3, dtype=p), sequence),
    "Conv1D causal": (lambda p: layers.Conv1D(3, 3, padding="causal", dtype=p), sequence),
    "Conv2D": (lambda p: layers.Conv2D(3, 3, strides=2, padding="same", dtype=p), image),
    "Conv2D dilated": (lambda p: layers.Conv2D(3, 3, dilation_rate=2, dtype=p), image),
    "Conv2D groups": (lambda p: layers.Conv2D(4, 3, groups=2, dtype=p), image),
    "Conv3D": (lambda p: layers.Conv3D(3, 3, dtype=p), volume),
    "DepthwiseConv1D": (lambda p: layers.DepthwiseConv1D(3, dtype=p), sequence),
    "DepthwiseConv2D": (lambda p: layers.DepthwiseConv2D(3, dtype=p), image),
    "Conv1DTranspose": (lambda p: layers.Conv1DTranspose(3, 3, dtype=p), sequence),
    "Conv2DTranspose": (lambda p: layers.Conv2DTranspose(3, 3, strides=2, dtype=p), image),
    "Conv3DTranspose": (lambda p: layers.Conv3DTranspose(3, 3, dtype=p), volume),
    "SeparableConv1D": (lambda p: layers.SeparableConv1D(3, 3, dtype=p), sequence),
    "SeparableConv2D": (lambda p: layers.SeparableConv2D(3, 3, dtype=p), image),
    "MultiHeadAttention": (
        lambda p: layers.MultiHeadAttention(2, 4, dtype=p),
        (sequence, sequence),
    ),
    "MultiHeadAttention dropout": (
        lambda p: layers.MultiHeadAttention(2, 4, dropout=0.1, dtype=p),
        (sequence, sequence),
    ),
    "GroupQueryAttention": (
        lambda p: layers.GroupQueryAttention(4, 4, 2, dtype=p),
        (sequence, sequence),
    ),
    "Attention": (lambda p: layers.Attention(use_scale=True, dtype=p), ([sequence, sequence],)),
    "LSTM": (lambda p: layers.LSTM(3, dtype=p), sequence),
    "GRU": (lambda p: layers.GRU(3, dtype=p), sequence),
    "SimpleRNN": (lambda p: layers.SimpleRNN(3, dtype=p), sequence),
    "ConvLSTM1D": (lambda p: layers.ConvLSTM1D(3, 3, dtype=p), normal(2, 5, 8, 4)),
    "Bidirectional": (lambda p: layers.Bidirectional(layers.GRU(3, dtype=p), dtype=p), sequence),
    "Dot": (
        lambda p: layers.Dot(axes=-1, dtype=DFPPolicy(scope="all") if p == "dfp16" else p),
        ([vector, vector],),
    ),
    "TimeDistributed": (
        lambda p: layers.TimeDistributed(layers.Dense(3, dtype=p), dtype=p),
        sequence,
    ),
    "SpectralNormalization": (
        lambda p: layers.SpectralNormalization(layers.Dense(3, dtype=p), dtype=p),
        vector,
    ),
    "keras.ops.matmul": (lambda p: OpsMatmul(dtype=p), vector),
    "keras.ops.tensordot": (lambda p: OpsTensordot(dtype=p), vector),
    "keras.ops.dot": (lambda p: OpsDot(dtype=p), vector),
}


def call(layer, inputs):
    return layer(*inputs) if isinstance(inputs, tuple) else layer(inputs)


def loss_and_gradients(layer, inputs):
    inputs = tf.nest.map_structure(tf.constant, inputs)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = call(layer, inputs)
        loss = tf.reduce_sum(tf.sin(outputs) * outputs)
    sources = [v.value for v in layer.trainable_variables] + tf.nest.flatten(inputs)
    return outputs, tape.gradient(loss, sources)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_run_on_integers_forward_and_backward(kind):
    keras.utils.set_random_seed(0)
    make, inputs = LAYERS[kind]
    layer, float32 = make("dfp16"), make("float32")
    call(layer, inputs)
    call(float32, inputs)
    float32.set_weights(layer.get_weights())

    with recording.record() as products:
        call(layer, inputs)
    assert {p.decision.format for p in products} == {DFPFormat()}
    with recording.record() as products:
        call(float32, inputs)
    assert {p.decision.format for p in products} == {None}

    outputs, gradients = loss_and_gradients(layer, inputs)
    expected_outputs, expected_gradients = loss_and_gradients(float32, inputs)
    assert not np.array_equal(outputs, expected_outputs)
    np.testing.assert_allclose(outputs, expected_outputs, atol=3e-3)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert gradient is not None
        # The bias of an attention key has no gradient but rounding errors.
        scale = max(np.max(np.abs(expected)), 0.1)
        np.testing.assert_allclose(gradient, expected, atol=1e-2 * scale)

    graph_outputs, graph_gradients = tf.function(lambda: loss_and_gradients(layer, inputs))()
    np.testing.assert_allclose(graph_outputs, outputs, atol=1e-6)
    for gradient, expected in zip(graph_gradients, gradients, strict=True):
        np.testing.assert_allclose(
            gradient, expected, atol=1e-3 * max(np.max(np.abs(expected)), 0.1)
        )


def decisions(layer, *args, **kwargs):
    with recording.record() as products:
        layer(*args, **kwargs)
    return [(p.operation, p.decision.format is not None, p.decision.reason) for p in products]


def test_the_innermost_layer_decides():
    inner, outer = layers.Dense(4, dtype="float32"), OpsMatmul(dtype="dfp16")
    block = keras.Sequential([keras.Input((4,)), inner, outer], name="block")
    block.dtype_policy = "dfp16_paper"
    assert decisions(block, vector) == [
        ("matmul", False, "policy float32"),
        ("matmul", True, ""),
    ]


def test_optimizers_multiply_in_float32():
    class Multiplying(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            gradient = keras.ops.matmul(gradient, keras.ops.eye(4))
            super().update_step(gradient, variable, learning_rate)

    layer = layers.Dense(4, use_bias=False, dtype="dfp16")
    layer.build((None, 4))
    optimizer = Multiplying(0.01)
    optimizer.build(layer.trainable_variables)
    with keras_dfp.policy_scope("dfp16"), recording.record() as products:
        optimizer.apply([tf.ones((4, 4))])
    assert [p.decision.format for p in products] == [None]


# ------------------------------------------------------------------------- what stays float32


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_other_dtypes_stay_with_keras(dtype):
    model = keras.Sequential([layers.Dense(3, dtype=dtype)])
    assert decisions(model, vector)[0][1:] == (False, f"policy {dtype}")


def test_operands_that_are_not_float32_stay_with_keras():
    layer = layers.Lambda(lambda x: keras.ops.matmul(*x), dtype="dfp16")
    layer.autocast = False
    integers = tf.ones((2, 2), tf.int32)
    assert decisions(layer, [integers, integers]) == [("matmul", False, "an operand is int32")]
    doubles = tf.ones((2, 2), tf.float64)
    assert decisions(layer, [doubles, doubles]) == [("matmul", False, "an operand is float64")]
    sparse = tf.sparse.from_dense(tf.ones((2, 2)))
    assert decisions(layers.Dense(2, dtype="dfp16"), sparse) == [
        ("matmul", False, "an operand is a SparseTensor")
    ]


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (lambda: layers.RandomSharpness(0.5), np.abs(image)),
        (lambda: layers.STFTSpectrogram(frame_length=32, frame_step=16), normal(2, 64, 1)),
        (lambda: layers.MelSpectrogram(fft_length=32, sequence_stride=16), normal(2, 64)),
    ],
)
def test_preprocessing_stays_float32(layer, inputs):
    with keras_dfp.policy_scope("dfp16"):
        found = decisions(layer(), inputs, training=True)
    assert found and {f[1:] for f in found} == {(False, "preprocessing stays FP32 by default")}


def test_preprocessing_runs_on_integers_if_a_pattern_says_so():
    policy = DFPPolicy(overrides={"sharpen": {"scope": "all"}})
    layer = layers.RandomSharpness(0.5, name="sharpen", dtype=policy)
    assert [found[1] for found in decisions(layer, np.abs(image), training=True)] == [True]


def test_the_power_iteration_stays_float32():
    layer = layers.SpectralNormalization(layers.Dense(3, dtype="dfp16"), dtype="dfp16")
    found = decisions(layer, vector, training=True)
    assert found[-1] == ("matmul", True, "")
    assert {f[1:] for f in found[:-1]} == {(False, "power iteration stays FP32 by default")}


# ---------------------------------------------------------------------- installing, removing


def every_product():
    """A model that multiplies in every way Keras does."""
    images = keras.Input((8, 8, 4))
    x = layers.Conv2D(4, 3, padding="same")(images)
    x = layers.Conv2D(4, 3, groups=2, padding="same")(x)
    x = layers.DepthwiseConv2D(3, padding="same")(x)
    x = layers.SeparableConv2D(4, 3, padding="same")(x)
    x = layers.Conv2DTranspose(4, 3, padding="same")(x)
    x = layers.Reshape((64, 4))(x)
    x = layers.MultiHeadAttention(2, 4)(x, x)
    x = layers.MultiHeadAttention(2, 4, dropout=0.1)(x, x)
    x = layers.LSTM(4, return_sequences=True)(x)
    x = layers.TimeDistributed(layers.Dense(4))(x)
    x = CustomGradient()(OpsOperator()(OpsTensordot()(OpsDot()(x))))
    x = keras.ops.image.extract_patches(layers.Reshape((8, 8, 3))(x), 2)
    x = layers.Reshape((16, 12))(x)
    x = keras.ops.matmul(x, keras.ops.transpose(x, (0, 2, 1)))
    return keras.Model(images, layers.Dense(2)(layers.Flatten()(x)))


def train_and_predict():
    keras.utils.set_random_seed(0)
    model = every_product()
    model.compile(keras.optimizers.SGD(0.01), "mse")
    model.fit(normal(8, 8, 8, 4), np.ones((8, 2)), batch_size=4, shuffle=False, verbose=0)
    return [model.predict(normal(4, 8, 8, 4), verbose=0), *model.get_weights()]


def test_float32_is_bit_identical_with_and_without_the_plugin():
    with_plugin = train_and_predict()
    backend.uninstall()
    try:
        without = train_and_predict()
    finally:
        backend.install()
    for a, b in zip(with_plugin, without, strict=True):
        assert a.tobytes() == b.tobytes()


# --------------------------------------------------------------------------------------- XLA


def test_jit_compile_falls_back_with_one_warning():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, dtype="dfp16")])
    with pytest.warns(UserWarning, match="jit_compile") as caught:
        model.compile("sgd", "mse", jit_compile=True)
        model.fit(vector, vector[:, :2], verbose=0)
        model.predict(vector, verbose=0)
    assert len([w for w in caught if "jit_compile" in str(w.message)]) == 1
    assert not model.jit_compile


def test_jit_compile_falls_back_when_the_policy_comes_later():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    model.compile("sgd", "mse", jit_compile=True)
    assert model.jit_compile
    with pytest.warns(UserWarning, match="jit_compile") as caught:
        keras_dfp.set_model_policy(model, "dfp16")
        model.fit(vector, vector[:, :2], verbose=0)
    assert len([w for w in caught if "jit_compile" in str(w.message)]) == 1


def test_jit_compile_is_left_alone_in_float32():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.compile("sgd", "mse", jit_compile=True)
    assert model.jit_compile
    assert trainer.model_supports_jit(model)


def test_a_jit_compiled_function_of_the_user_raises_and_names_the_layer():
    layer = layers.Dense(2, dtype="dfp16", name="head")
    layer.build((None, 4))
    with pytest.raises(RuntimeError, match="(?s)layer 'head'.*jit_compile"):
        tf.function(lambda x: layer(x), jit_compile=True)(tf.constant(vector))
    layer.dtype_policy = "float32"
    tf.function(lambda x: layer(x), jit_compile=True)(tf.constant(vector))


# ----------------------------------------------------------------- recomputation, loops, steps


def block_gradients(remat, policy):
    keras.utils.set_random_seed(3)
    with keras.RematScope(mode="full" if remat else None):
        hidden, head = layers.Dense(8, "tanh", dtype=policy), layers.Dense(2, dtype=policy)
    inputs = keras.Input((4,))
    block = keras.Model(inputs, head(hidden(inputs)))

    @tf.function
    def gradients(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(block(x) ** 2)
        return tape.gradient(loss, [v.value for v in block.trainable_variables])

    with recording.record() as products:
        result = gradients(tf.constant(vector))
    return result, [p for p in products if p.layer is not None]


def test_rematerialisation_recomputes_under_the_same_policy():
    policy = DFPPolicy(mantissa_bits=9)
    expected, once = block_gradients(False, policy)
    gradients, twice = block_gradients(True, policy)
    assert len(twice) > len(once)
    assert {p.decision.format for p in twice} == {policy.format}
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_remat_function_of_the_user_recomputes_under_the_same_policy():
    class Remat(OpsMatmul):
        def call(self, x):
            return keras.remat(lambda x: keras.ops.matmul(x, x))(x)

    layer = Remat(dtype="dfp16")
    with tf.GradientTape() as tape, recording.record() as products:
        x = tf.constant(vector[:, :2])
        tape.watch(x)
        y = layer(x)
    with recording.record() as recomputed:
        tape.gradient(y, x)
    assert [p.layer for p in products] == [layer]
    assert [p.decision.format for p in recomputed if p.layer is layer] == [DFPFormat()]


@keras.ops.custom_gradient
def multiply_and_halve_gradients(x, w):
    def gradient(dy):
        flat, dy2 = keras.ops.reshape(x, (-1, x.shape[-1])), keras.ops.reshape(dy, (-1, 3))
        dx = keras.ops.matmul(dy2, keras.ops.transpose(w))
        dw = keras.ops.matmul(keras.ops.transpose(flat), dy2)
        return keras.ops.reshape(dx, keras.ops.shape(x)) / 2, dw / 2

    return keras.ops.matmul(x, w), gradient


class CustomGradient(OpsMatmul):
    def call(self, x):
        return multiply_and_halve_gradients(x, 1.0 * self.kernel)


@pytest.mark.parametrize("policy", ["dfp16", "float32", DFPPolicy(mantissa_bits=9)], ids=str)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_gradients_of_the_user_follow_the_policy_of_their_layer(policy, graph):
    layer, x, dy = CustomGradient(dtype=policy), tf.constant(vector), normal(2, 3, seed=1)
    layer.build(x.shape)

    def gradients(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        with recording.record() as products:
            return tape.gradient(y, [x, layer.kernel.value], output_gradients=dy), products

    found = []

    def step(x):
        result, products = gradients(x)
        found.extend(p for p in products if p.layer is layer)
        return result

    dx, dw = (tf.function(step) if graph else step)(x)
    fmt = getattr(layer.dtype_policy, "format", None)
    assert [(p.operation, p.decision.format) for p in found] == [("matmul", fmt)] * 2
    w = layer.kernel.numpy()
    if fmt is None:
        np.testing.assert_allclose(dx, dy @ w.T / 2, rtol=1e-5)
        np.testing.assert_allclose(dw, vector.T @ dy / 2, rtol=1e-5)
    else:
        with ops.format_scope(fmt):
            np.testing.assert_array_equal(dx, ops.matmul(dy, w.T) / 2)
            np.testing.assert_array_equal(dw, ops.matmul(vector.T, dy) / 2)
    (row,) = keras_dfp.describe(layer, inputs=x).rows
    assert (row["operations"], row["format"]) == ({"matmul": 3}, fmt)


def test_gradients_of_the_user_are_called_as_keras_calls_them():
    scale = keras.Variable(2.0)

    @keras.ops.custom_gradient
    def scaled(x):
        def gradient(dy, variables=None):
            return dy * 3.0, [tf.reduce_sum(dy) for _ in variables]

        return x * scale, gradient

    @keras.ops.custom_gradient
    def refuses(x):
        return x * scale, lambda dy: dy

    x = tf.ones(2)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = scaled(x)
    dx, ds = tape.gradient(y, [x, scale.value])
    np.testing.assert_array_equal(dx, [3, 3])
    assert ds == 2
    with pytest.raises(TypeError, match="must accept keyword argument 'variables'"):
        refuses(x)
    layer = layers.Lambda(scaled, dtype="dfp16")
    assert keras_dfp.describe(layer, inputs=x).rows == []


# ------------------------------------------------------- layers that Keras calls without a name


def timed(layer, **kwargs):
    return layers.TimeDistributed(layer, **kwargs)


@pytest.mark.parametrize("steps", [8, None], ids=["unrolled", "vectorised"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("outer", "inner"), [("dfp16", "float32"), ("float32", "dfp16")])
def test_the_layer_inside_time_distributed_decides(outer, inner, depth, steps):
    dense = layers.Dense(3, dtype=inner, name="inner")
    layer = dense
    for _ in range(depth):
        layer = timed(layer, dtype=outer)
    shape = (2, 8, 4) if depth == 1 else (2, 5, 8, 4)
    inputs = keras.Input((*shape[1:-2], steps, 4), batch_size=2)
    (row,) = keras_dfp.describe(layer, inputs=inputs).rows
    assert row["layer"] == "Dense" and row["path"].endswith("inner")
    assert row["format"] == (DFPFormat() if inner == "dfp16" else None)
    x = normal(*shape)
    expected = (ops.matmul if inner == "dfp16" else keras.ops.matmul)(x, dense.kernel.value)
    if steps:
        np.testing.assert_allclose(layer(x), expected, atol=1e-3 if inner == "dfp16" else 1e-6)


def test_patterns_reach_the_layer_inside_time_distributed():
    policy = DFPPolicy(exclude=["stem"], overrides={"head": {"mantissa_bits": 16}})
    with keras_dfp.policy_scope(policy):
        model = keras.Sequential(
            [
                keras.Input((5, 4)),
                timed(layers.Dense(4, name="stem")),
                timed(keras.Sequential([layers.Dense(4, name="body")])),
                timed(layers.Dense(4, name="head")),
            ]
        )
    found = {row["path"].split("/")[-1]: row["format"] for row in keras_dfp.describe(model).rows}
    assert found == {"stem": None, "body": DFPFormat(), "head": DFPFormat(16)}


def test_the_power_iteration_inside_time_distributed_stays_float32():
    layer = timed(layers.SpectralNormalization(layers.Dense(3, dtype="dfp16")), dtype="dfp16")
    layer.layer.dtype_policy = "dfp16"
    rows = keras_dfp.describe(layer, inputs=keras.Input((2, 6))).rows
    assert [(row["layer"], row["format"] is not None) for row in rows] == [
        ("SpectralNormalization", False),
        ("Dense", True),
    ]


def test_time_distributed_renames_no_variable():
    class Block(layers.Layer):
        def __init__(self):
            super().__init__(name="block")
            self.late = layers.Dense(2, name="late")

        def build(self, shape):
            self.built = True

        def call(self, x):
            return self.late(x)

    def paths():
        layer = timed(Block(), name="timed")
        layer(vector[None])
        return [v.path for v in layer.variables]

    with_plugin = paths()
    backend.uninstall()
    try:
        assert paths() == with_plugin
    finally:
        backend.install()


def test_a_stateless_call_follows_the_policy():
    layer = layers.Dense(3, dtype="dfp16")
    layer.build((None, 4))
    with recording.record() as products:
        y, _ = layer.stateless_call(layer.trainable_variables, [], vector)
    assert [(p.layer, p.decision.format) for p in products] == [(layer, DFPFormat())]
    np.testing.assert_array_equal(y, layer(vector))


def test_recurrent_kernels_are_quantized_once_before_the_loop():
    layer = layers.LSTM(3, dtype="dfp16")
    layer.build((None, 8, 4))
    graph = tf.function(layer).get_concrete_function(tf.TensorSpec((2, 8, 4))).graph
    (loop,) = [op for op in graph.get_operations() if op.type in ("While", "StatelessWhile")]
    library = {f.signature.name: f for f in graph.as_graph_def().library.function}
    nodes = [node.op for node in library[loop.get_attr("body").name].node_def]
    # The inputs and the state change from step to step, the two kernels do not.
    assert nodes.count("DfpMatmul") == 2
    assert nodes.count("DfpQuantize") == 2
    quantized = [op.inputs[0] for op in graph.get_operations() if op.type == "DfpQuantize"]
    assert [x.op.type for x in quantized].count("ReadVariableOp") == 2


@pytest.mark.parametrize("steps", [1, 4])
def test_steps_per_execution(steps):
    def weights(steps):
        keras.utils.set_random_seed(1)
        with keras_dfp.policy_scope("dfp16"):
            inputs = keras.Input((8, 4))
            model = keras.Model(inputs, layers.Dense(2)(layers.LSTM(4)(inputs)))
        model.compile(keras.optimizers.SGD(0.1), "mse", steps_per_execution=steps)
        x = normal(16, 8, 4)
        model.fit(x, x[:, 0, :2], batch_size=2, shuffle=False, verbose=0)
        return model.get_weights()

    for a, b in zip(weights(1), weights(steps), strict=True):
        np.testing.assert_array_equal(a, b)


def attend(x):
    return layers.Attention(use_scale=True)([layers.Dense(2)(x), layers.Dense(2)(x), x])


SHAPELESS = {
    "dense": (lambda x: layers.Dense(2)(x), (6,)),
    "dense of sequences": (lambda x: layers.Dense(2)(x), (3, 6)),
    "conv1d": (lambda x: layers.Conv1D(2, 3)(x), (6, 2)),
    "conv2d": (lambda x: layers.Conv2D(2, 3)(x), (5, 5, 2)),
    "conv3d": (lambda x: layers.Conv3D(2, 3)(x), (4, 4, 4, 2)),
    "channels first": (lambda x: layers.Conv2D(2, 3, data_format="channels_first")(x), (2, 5, 5)),
    "depthwise": (lambda x: layers.DepthwiseConv2D(3)(x), (5, 5, 2)),
    "separable": (lambda x: layers.SeparableConv2D(2, 3)(x), (5, 5, 2)),
    "transposed 1d": (lambda x: layers.Conv1DTranspose(2, 3)(x), (6, 2)),
    "transposed 2d": (lambda x: layers.Conv2DTranspose(2, 3)(x), (5, 5, 2)),
    "transposed 3d": (lambda x: layers.Conv3DTranspose(2, 3)(x), (4, 4, 4, 2)),
    "einsum": (lambda x: layers.EinsumDense("abc,cd->abd", output_shape=(6, 4))(x), (6, 3)),
    "attention": (attend, (4, 2)),
    "multi-head": (lambda x: layers.MultiHeadAttention(2, 3)(x, x), (6, 3)),
    "dot": (lambda x: layers.Dot(axes=2)([layers.Dense(3)(x), x]), (6, 3)),
    "lstm": (lambda x: layers.LSTM(4, return_sequences=True)(x), (6, 3)),
    "batch norm": (lambda x: layers.BatchNormalization()(layers.Conv2D(2, 3)(x)), (5, 5, 2)),
}


@pytest.mark.parametrize("make, shape", SHAPELESS.values(), ids=SHAPELESS)
def test_fit_where_only_python_knows_a_shape(make, shape):
    def in_python(x):
        # As what looks words up does: the shape is set, and lost in a function's graph.
        y = tf.numpy_function(lambda x: x, [x], tf.float32)
        y.set_shape(x.shape)
        return y

    class AsItCame(layers.Layer):
        def call(self, x):
            return tf.custom_gradient(lambda x: (in_python(x), in_python))(x)

    x = np.random.default_rng(0).standard_normal((4, *shape)).astype(np.float32)
    trained = []
    for around in (AsItCame(), layers.Identity()):
        keras.utils.set_random_seed(0)
        inputs = keras.Input(shape)
        model = keras.Model(inputs, layers.Flatten()(around(make(around(inputs)))))
        keras_dfp.set_model_policy(model, "dfp16")
        model.compile("sgd", "mse")
        model.fit(x, np.zeros((4, *model.output_shape[1:])), batch_size=2, shuffle=False, verbose=0)
        trained.append(model.get_weights())
    for ours, known in zip(*trained, strict=True):
        np.testing.assert_array_equal(ours, known)


def conv(x, w):
    return keras.ops.conv(x, w, 1, "valid", data_format="channels_last")


@pytest.mark.parametrize(
    "operation, x_shape, w_shape, rank",
    [
        (keras.ops.matmul, (3, 4), (4, 2), None),
        (lambda x, w: x @ w, (3, 4), (4, 2), None),
        (lambda x, w: keras.ops.tensordot(x, w, 1), (3, 4), (4, 2), None),
        (lambda x, w: keras.ops.einsum("...b,bc->...c", x, w), (3, 4), (4, 2), None),
        (lambda x, w: conv(w, x), (3, 3, 2, 4), (2, 5, 5, 2), 4),
    ],
    ids=["matmul", "operator", "tensordot", "einsum", "kernel"],
)
def test_what_nobody_knows_the_shape_of_is_left_to_keras(operation, x_shape, w_shape, rank):
    class Multiplies(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=w_shape)

        def call(self, x):
            x = tf.numpy_function(lambda x: x, [x], tf.float32)
            x.set_shape(None if rank is None else [None] * rank)
            return operation(x, self.w)

    x = normal(*x_shape)
    layer = Multiplies(dtype="dfp16")
    layer.build(x_shape)
    with recording.record() as products:
        y = tf.function(layer)(x)
    np.testing.assert_allclose(y, operation(tf.constant(x), layer.w), rtol=1e-6)
    assert "is not known; set_shape tells it" in products[0].decision.reason


def test_keras_dfp_ops_take_the_global_format():
    with keras_dfp.policy_scope(DFPPolicy(mantissa_bits=9)):
        assert ops.current_format() == DFPFormat(9)
    assert ops.current_format() == DFPFormat()
