"""A sample's result does not depend on its batch, to the last bit.

That is the promise of `exponents="sample"` for every product. TensorFlow's own float32 ops make no
such promise. As measured on x86 with TensorFlow 2.21, they keep it nevertheless, except that

- functions that are approximated (exp, log, log1p, expm1, sigmoid, softplus, elu, selu, silu, mish,
  gelu, rsqrt, pow, sin, cos; the gradients of sqrt and erf, too) go through a tensor in packets of
  8 elements, and compute what remains at its end otherwise. A sample keeps its bits if it has a
  multiple of 8 elements. Layer, group and RMS normalization take the rsqrt of a tensor that has an
  element for each vector, so here it is the number of vectors that counts;
- sums and means over the middle axes (global average pooling, moments), of 16 elements or more,
  keep a sample's bits if the axis that remains has at most 8 channels or a multiple of 8;
- softmax without oneDNN (`TF_ENABLE_ONEDNN_OPTS=0`) divides by as many sums as there are vectors,
  and these come in packets of 8 as well; log_softmax and logsumexp always do;
- with oneDNN, the gradient of average pooling whose windows overlap is summed in an order that
  depends on the batch.

So the sizes of the models here are multiples of 16, and none of them ends in a softmax;
`test_what_the_models_need_of_tensorflow` says so if TensorFlow keeps less one day.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from kernels import ISAS, assert_same_bits, running

import keras_dfp
from keras_dfp import ops
from keras_dfp.number import DFPFormat

SAMPLES = 33
SIZES = (2, 3, 7, 8, 16, 33)


def samples(*shape, seed=0):
    """Random samples, of which no two have the same size."""
    x = np.random.default_rng([seed, *shape]).standard_normal((SAMPLES, *shape))
    scale = np.exp2(np.linspace(-3, 3, SAMPLES)).reshape(-1, *[1] * len(shape))
    return (x * np.random.default_rng(seed).permutation(scale)).astype(np.float32)


def with_gradient(function, shape):
    """Returns the function that returns y and, of a loss of each sample's own, dx."""

    @tf.function(input_signature=[tf.TensorSpec([None, *shape])], autograph=False)
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        weights = tf.random.stateless_normal(y.shape[1:], [1, 2])
        return y, tape.gradient(y, x, output_gradients=weights + tf.zeros_like(y))

    return step


def in_batches(function, x, size):
    """Returns the results of all samples, so many at a time."""
    batches = [function(tf.constant(x[i : i + size])) for i in range(0, len(x), size)]
    results = zip(*(tf.nest.flatten(batch) for batch in batches), strict=True)
    return [np.concatenate(parts) for parts in results]


def assert_same(actual, expected, what):
    for name, result, truth in zip(("y", "dx"), actual, expected, strict=False):
        assert_same_bits(result, truth, f"{name}, {what}")


def check_batches(function, x, alone=None):
    """Compares samples alone with the same samples in batches, in two orders."""
    alone = in_batches(function, x, 1) if alone is None else alone
    order = np.random.default_rng(5).permutation(len(x))
    for size in SIZES:
        assert_same(in_batches(function, x, size), alone, f"batches of {size}")
        permuted = [r[np.argsort(order)] for r in in_batches(function, x[order], size)]
        assert_same(permuted, alone, f"other batches of {size}")


def check_neighbours(function, x, alone=None):
    """Compares samples alone with the same samples beside others that are out of bounds."""
    alone = in_batches(function, x, 1) if alone is None else alone
    for bad in (1e4, 1e6, 1e30, np.nan, np.inf, -np.inf, 0):
        beside = x.copy()
        for i in range(1, len(x), 2):
            if abs(bad) < np.inf:
                beside[i] *= np.float32(bad)
            else:
                beside[i].flat[i % x[i].size] = bad
        kept = [r[::2] for r in in_batches(function, beside, len(x))]
        assert_same(kept, [r[::2] for r in alone], f"beside {bad}")


# ---- products alone ------------------------------------------------------------------------------

# What is computed of samples and weights, a sample's shape, and those of the weights.
PRODUCTS = {
    "matmul": (ops.matmul, (40,), (40, 19)),
    "matmul of sequences": (ops.matmul, (5, 33), (33, 17)),
    "conv": (lambda x, w: ops.conv(x, w, padding="same"), (6, 7, 5), (3, 3, 5, 18)),
    "conv strided": (lambda x, w: ops.conv(x, w, 2, "same"), (7, 7, 5), (3, 3, 5, 4)),
    "conv 1x1": (ops.conv, (3, 3, 20), (1, 1, 20, 17)),
    "conv grouped": (ops.conv, (5, 4, 8), (2, 2, 4, 6)),
    "conv dilated": (lambda x, w: ops.conv(x, w, dilation_rate=2), (7, 6, 3), (3, 2, 3, 5)),
    "conv channels first": (
        lambda x, w: ops.conv(x, w, data_format="channels_first"),
        (4, 5, 6),
        (3, 3, 4, 5),
    ),
    "conv 1d": (ops.conv, (11, 3), (4, 3, 5)),
    "conv 3d": (ops.conv, (3, 4, 3, 3), (2, 2, 2, 3, 4)),
    "conv_transpose": (lambda x, w: ops.conv_transpose(x, w, 2), (3, 4, 6), (3, 3, 4, 6)),
    "depthwise_conv": (ops.depthwise_conv, (5, 5, 18), (3, 3, 18, 1)),
    "depthwise_conv multiplied": (
        lambda x, w: ops.depthwise_conv(x, w, 2, "same"),
        (6, 5, 5),
        (3, 3, 5, 2),
    ),
    "separable_conv": (ops.separable_conv, (5, 5, 4), (3, 3, 4, 1), (1, 1, 4, 7)),
    "tensordot": (lambda x, w: ops.tensordot(x, w, 2), (6, 7), (6, 7, 8)),
    "weights first": (lambda x, w: ops.matmul(w, x), (6, 7), (5, 6)),
    "adjacency": (lambda x, w: ops.einsum("ot,btd->bod", w, x), (6, 7), (5, 6)),
    "mixing tokens": (lambda x, w: ops.einsum("btd,to->bod", x, w), (6, 7), (6, 5)),
    "bilinear": (lambda x, w: ops.einsum("bi,ijk,bj->bk", x, w, x), (7,), (7, 7, 3)),
    "matrices": (ops.matmul, (6, 6), (1, 6, 6)),
    "itself": (lambda x: ops.matmul(x, x), (6, 6)),
    "attention": (
        lambda x: ops.einsum("bnts,bsnh->btnh", ops.einsum("btnh,bsnh->bnts", x, x), x),
        (5, 2, 8),
    ),
}


def sample_product(name):
    """Returns a product of PRODUCTS as a function of x, and the shape of a sample."""
    function, shape, *weights = PRODUCTS[name]
    rng = np.random.default_rng(3)
    weights = [tf.constant(rng.standard_normal(w), tf.float32) for w in weights]
    return lambda x: function(x, *weights), shape


@pytest.mark.parametrize("accumulation", ["exact", "spill"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product(name, accumulation):
    function, shape = sample_product(name)
    x = samples(*shape)
    with ops.format_scope(DFPFormat(accumulation=accumulation)):
        step = with_gradient(function, shape)
        alone = in_batches(step, x, 1)
        check_batches(step, x, alone)
        check_neighbours(step, x, alone)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_on_every_instruction_set(name):
    function, shape = sample_product(name)
    x = samples(*shape)[:7]
    step = with_gradient(function, shape)
    alone = in_batches(step, x, 1)
    for isa in ISAS:
        for threads in (1, 2, 4):
            with running(isa, threads, small=0):
                assert_same(in_batches(step, x, 7), alone, f"{isa}, {threads} threads")
                assert_same(in_batches(step, x, 3), alone, f"{isa}, {threads} threads, batches")
        with running(isa, 1):
            assert_same(in_batches(step, x, 1), alone, f"{isa}, alone")


def test_one_exponent_for_the_tensor_makes_a_sample_depend_on_its_batch():
    """That is, these tests can fail."""
    function, shape = sample_product("conv")
    with ops.format_scope(DFPFormat(exponents="tensor")):
        step = with_gradient(function, shape)
        with pytest.raises(AssertionError, match="y, batches of 2"):
            check_batches(step, samples(*shape))


# ---- models --------------------------------------------------------------------------------------


def mlp():
    return [keras.Input((23,)), layers.Dense(32, "relu"), layers.Dense(16, "tanh"), layers.Dense(7)]


def cnn():
    return [
        keras.Input((12, 12, 3)),
        layers.Conv2D(16, 3, padding="same"),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.MaxPooling2D(2),
        layers.Conv2D(16, 3, padding="same", activation="leaky_relu"),
        layers.AveragePooling2D(2),
        layers.Conv2D(24, 2, activation="relu6"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(5),
    ]


def depthwise():
    return [
        keras.Input((11, 11, 3)),
        layers.Conv2D(16, 3, 2, activation="relu"),
        layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2),
        layers.BatchNormalization(),
        layers.SeparableConv2D(16, 3, padding="same", activation="relu"),
        layers.GlobalMaxPooling2D(),
        layers.Dense(5),
    ]


def waves():
    return [
        keras.Input((40, 3)),
        layers.Conv1D(16, 5, padding="causal", activation="gelu"),
        layers.Conv1DTranspose(8, 3, strides=2, padding="same", activation="sigmoid"),
        layers.MaxPooling1D(2),
        layers.SeparableConv1D(16, 3, dilation_rate=2, activation="relu"),
        layers.GlobalAveragePooling1D(),
        layers.Dense(5),
    ]


def volumes():
    return [
        keras.Input((6, 6, 4, 2)),
        layers.Conv3D(8, 3, padding="same", activation="relu"),
        layers.MaxPooling3D(2),
        layers.Conv3DTranspose(8, 2, activation="relu"),
        layers.GlobalAveragePooling3D(),
        layers.Dense(5),
    ]


def image_to_image():
    return [
        keras.Input((8, 8, 3)),
        layers.Conv2D(16, 3, strides=2, padding="same", activation="silu"),
        layers.Conv2DTranspose(16, 3, strides=2, padding="same", activation="elu"),
        layers.UpSampling2D(2),
        layers.Conv2D(3, 1),
    ]


def residual():
    inputs = keras.Input((10, 10, 3))
    x = layers.Conv2D(16, 3, padding="same")(inputs)
    for filters, stride in ((16, 1), (32, 2)):
        y = layers.ReLU()(layers.BatchNormalization()(x))
        shortcut = layers.Conv2D(filters, 1, stride)(y)
        y = layers.Conv2D(filters, 3, stride, padding="same")(y)
        y = layers.ReLU()(layers.BatchNormalization()(y))
        x = shortcut + layers.Conv2D(filters, 3, padding="same")(y)
    return inputs, layers.Dense(5)(layers.GlobalAveragePooling2D()(x))


def transformer():
    inputs = x = keras.Input((16, 32))
    for _ in range(2):
        attended = layers.MultiHeadAttention(2, 16)(x, x, use_causal_mask=True)
        x = layers.LayerNormalization()(x + attended)
        x = layers.LayerNormalization()(x + layers.Dense(32)(layers.Dense(64, "gelu")(x)))
    return inputs, layers.Dense(5)(layers.GlobalAveragePooling1D()(x))


def recurrent(layer):
    return lambda: [
        keras.Input((6, 9)),
        layer(16, return_sequences=True),
        layers.Bidirectional(layer(16)),
        layers.Dense(5),
    ]


MODELS = {
    "mlp": mlp,
    "cnn": cnn,
    "depthwise": depthwise,
    "1d": waves,
    "3d": volumes,
    "image to image": image_to_image,
    "residual": residual,
    "transformer": transformer,
    "LSTM": recurrent(layers.LSTM),
    "GRU": recurrent(layers.GRU),
    "SimpleRNN": recurrent(layers.SimpleRNN),
}


def build(make, policy="dfp16"):
    """Returns a model; nothing of it is at its initial value, as after training."""
    keras.utils.set_random_seed(1)
    with keras_dfp.policy_scope(policy):
        made = make()
        model = keras.Sequential(made) if isinstance(made, list) else keras.Model(*made)
    rng = np.random.default_rng(2)
    for variable in model.weights:
        if "kernel" not in variable.path and variable.dtype == "float32":
            variable.assign(variable + rng.uniform(0.1, 0.5, variable.shape))
    return model


def inference(model):
    return with_gradient(lambda x: model(x, training=False), model.input_shape[1:])


@pytest.mark.filterwarnings("ignore:keras_dfp")
@pytest.mark.parametrize("name", MODELS)
def test_a_model(name):
    model = build(MODELS[name])
    x = samples(*model.input_shape[1:])
    step = inference(model)
    alone = in_batches(step, x, 1)
    check_batches(step, x, alone)
    check_neighbours(step, x, alone)
    for size in (1, 7, 33):
        assert_same_bits(model.predict(x, batch_size=size, verbose=0), alone[0], f"predict {size}")


@pytest.mark.parametrize("policy", [{"accumulation": "spill"}, {"mantissa_bits": 9}], ids=str)
def test_a_model_under_another_policy(policy):
    model = build(cnn, keras_dfp.DFPPolicy(**policy))
    check_batches(inference(model), samples(12, 12, 3))


def test_a_model_on_every_instruction_set():
    model = build(depthwise)
    x = samples(11, 11, 3)[:5]
    step = inference(model)
    alone = in_batches(step, x, 1)
    for isa in ISAS:
        for threads in (1, 2, 4):
            with running(isa, threads, small=0):
                assert_same(in_batches(step, x, 5), alone, f"{isa}, {threads} threads")


def test_embedded_tokens():
    model = build(
        lambda: [
            keras.Input((16,), dtype="int32"),
            layers.Embedding(50, 16, mask_zero=True),
            layers.LSTM(16, return_sequences=True),
            layers.Dense(50),
        ]
    )
    tokens = np.random.default_rng(4).integers(1, 50, (SAMPLES, 16)).astype(np.int32)
    tokens[::3, 10:] = 0
    check_batches(tf.function(lambda x: model(x, training=False), reduce_retracing=True), tokens)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:keras_dfp")
@pytest.mark.parametrize("name", ["MobileNet", "MobileNetV2", "ResNet50", "ResNet50V2", "VGG16"])
def test_an_application(name):
    make = getattr(keras.applications, name)
    shape = (32, 32, 3)
    keras.utils.set_random_seed(1)
    with keras_dfp.policy_scope("dfp16"):
        model = make(weights=None, input_shape=shape, classes=16, classifier_activation=None)
    x = samples(*shape)
    step = inference(model)
    alone = in_batches(step, x, 1)
    for size in (2, 7, 33):
        assert_same(in_batches(step, x, size), alone, f"batches of {size}")
    check_neighbours(step, x, alone)


# ---- TensorFlow's part ---------------------------------------------------------------------------

# On multiples of 16 elements, vectors and channels.
STOCK = {
    "bias": (lambda x: tf.nn.bias_add(x, tf.linspace(-1.0, 1.0, x.shape[-1])), (6, 16)),
    "relu": (tf.nn.relu, (6, 16)),
    "exp": (tf.exp, (6, 16)),
    "rsqrt": (lambda x: tf.math.rsqrt(tf.abs(x) + 0.1), (6, 16)),
    "sigmoid": (tf.sigmoid, (6, 16)),
    "tanh": (tf.tanh, (6, 16)),
    "erf": (tf.math.erf, (6, 16)),
    "elu": (tf.nn.elu, (6, 16)),
    "silu": (keras.activations.silu, (6, 16)),
    "gelu": (keras.activations.gelu, (6, 16)),
    "softmax of attention": (tf.nn.softmax, (2, 16, 16)),
    "batch norm": (
        lambda x: tf.nn.batch_normalization(x, 0.3, 1.7, 0.2, 1.3, 1e-3),
        (6, 6, 16),
    ),
    "layer norm": (lambda x: keras.ops.layer_normalization(x), (16, 32)),
    "mean of pixels": (lambda x: tf.reduce_mean(x, [1, 2]), (7, 7, 48)),
    "mean of steps": (lambda x: tf.reduce_mean(x, 1), (20, 48)),
    "mean of features": (lambda x: tf.reduce_mean(x, -1), (5, 33)),
    "max pooling": (lambda x: tf.nn.max_pool2d(x, 3, 2, "SAME"), (7, 7, 16)),
    "average pooling": (lambda x: tf.nn.avg_pool2d(x, 2, 2, "SAME"), (7, 7, 16)),
}


@pytest.mark.parametrize("name", STOCK)
def test_what_the_models_need_of_tensorflow(name):
    function, shape = STOCK[name]
    check_batches(with_gradient(function, shape), samples(*shape))
