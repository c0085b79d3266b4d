"""Fused functions: the same bits as separate steps and as eager execution, and nothing else new."""

import collections
import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from replicas import check_on_two
from tensorflow.python.eager import context
from tensorflow.python.framework import op_def_registry
from test_normalization import assert_same

import keras_dfp
from keras_dfp import DFPPolicy

# ---- What a function runs ------------------------------------------------------------------------


def live_nodes(concrete):
    """Yields the nodes that have an effect, of a concrete function and of those that it calls."""
    for definition in definitions(concrete.function_def):
        nodes = {node.name: node for node in definition.node_def}
        wanted = [*definition.ret.values(), *definition.control_ret.values()]
        for name, node in nodes.items():
            op = op_def_registry.get(node.op)
            if op.is_stateful and op.name not in ("ReadVariableOp", "Placeholder"):
                wanted.append(name)
        found = set()
        while wanted:
            name = wanted.pop().lstrip("^").split(":")[0]
            if name in nodes and name not in found:
                found.add(name)
                wanted += nodes[name].input
                yield nodes[name]


def definitions(definition, seen=None):
    seen = set() if seen is None else seen
    yield definition
    for node in definition.node_def:
        for attr in node.attr.values():
            for function in (attr.func, *attr.list.func):
                if function.name and function.name not in seen:
                    seen.add(function.name)
                    yield from definitions(context.context().get_function_def(function.name), seen)


def live_ops(concrete):
    return collections.Counter(node.op for node in live_nodes(concrete))


def edges(graph):
    return [(op.name, [t.name for t in op.inputs]) for op in graph.get_operations()]


# ---- Models and what they give -------------------------------------------------------------------


def randomize(model):
    """Gives every weight a value that lets something happen: clipped, negative, not centred."""
    rng = np.random.default_rng(2)
    for v in model.variables:
        if not v.dtype.startswith("float"):
            continue
        value = rng.standard_normal(v.shape) * (0.3 if len(v.shape) > 1 else 1.5)
        v.assign(np.abs(value) + 0.1 if "variance" in v.path else value)


def built(build, **options):
    keras.utils.set_random_seed(1)
    with keras_dfp.policy_scope(DFPPolicy(**options)):
        model = build()
    randomize(model)
    return model


def images(shape=(3, 8, 8, 3)):
    return tf.constant(np.random.default_rng(0).standard_normal(shape), tf.float32)


def loss_of(outputs):
    return tf.add_n([tf.reduce_sum(tf.sin(y)) for y in tf.nest.flatten(outputs)])


def training_step(model, loss_of=loss_of, training=True):
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = model(x, training=training)
            loss = loss_of(outputs)
        variables = model.trainable_variables
        dx, *gradients = tape.gradient(loss, [x, *variables])
        for v, g in zip(variables, gradients, strict=True):
            if g is not None:
                v.assign(v - 0.01 * g)
        return outputs, dx, gradients

    return step


def everything(model, step, x, steps=2):
    """Returns what some steps give, and leave behind."""
    keras.utils.set_random_seed(3)
    results = [step(x) for _ in range(steps)]
    return [results, [v.value for v in model.variables], model(x, training=False)]


def assert_all_same(actual, expected, what=""):
    tf.nest.assert_same_structure(actual, expected)
    for i, (a, b) in enumerate(
        zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True)
    ):
        assert_same(np.asarray(a), np.asarray(b), f"{what}, result {i}")


@contextlib.contextmanager
def as_written():
    """TensorFlow's optimizer of graphs adds in another order than eager execution, and we, do."""
    before = tf.config.optimizer.get_experimental_options().get("arithmetic_optimization", True)
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    yield
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": before})


def compare(build, x, eager=True, make_step=training_step, training=True, **options):
    """Trains fused, separately and eagerly, compares all bits, and returns the fused function."""
    model = built(build, **options)
    step = tf.function(make_step(model, training=training))
    with contextlib.nullcontext() if eager else as_written():
        fused = everything(model, step, x)
    other = built(build, **options, fused=False)
    separate_step = tf.function(make_step(other, training=training))
    with as_written():
        assert_all_same(fused, everything(other, separate_step, x), "separate steps")
    if eager:
        other = built(build, **options)
        assert_all_same(fused, everything(other, make_step(other, training=training), x), "eager")
    assert any(np.any(t) for t in tf.nest.flatten(fused[0][0][1:]) if t is not None)
    return step.get_concrete_function(x)


def conv(x, filters, size=3, **kwargs):
    return layers.Conv2D(filters, size, padding="same", use_bias=False, **kwargs)(x)


def bn(x, **kwargs):
    return layers.BatchNormalization(**kwargs)(x)


def relu(x):
    return layers.ReLU()(x)


def relu6(x):
    return layers.ReLU(max_value=6)(x)


def functional(body, shape=(8, 8, 3)):
    """A model that ends, as classifiers do, with a pooling and a Dense layer."""

    def build():
        image = keras.Input(shape)
        x = body(image)
        pool = {2: lambda x: x, 3: layers.GlobalAveragePooling1D(), 5: layers.GlobalMaxPooling3D()}
        x = pool.get(len(x.shape), layers.GlobalAveragePooling2D())(x)
        return keras.Model(image, layers.Dense(5)(x))

    return build


def post_activation(x, filters=8, identity_first=True):
    x = relu(bn(conv(x, filters)))
    for projected in (False, True):
        y = relu(bn(conv(x, filters, 1)))
        y = bn(conv(y, filters))
        shortcut = bn(conv(x, filters, 1)) if projected else x
        x = relu(layers.Add()([shortcut, y] if identity_first else [y, shortcut]))
    return x


def pre_activation(x):
    x = conv(x, 8)
    for _ in range(2):
        y = conv(relu(bn(x)), 8)
        x = layers.Add()([x, conv(relu(bn(y)), 8)])
    return relu(bn(x))


def linear_bottleneck(x):
    x = relu6(bn(conv(x, 8), momentum=0.9, epsilon=1e-5))
    y = relu6(bn(conv(x, 16, 1)))
    y = relu6(bn(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(y)))
    x = layers.Add()([x, bn(conv(y, 8, 1))])
    return relu6(bn(conv(x, 8, 1)))


def dense_block(x):
    x = conv(x, 8)
    for _ in range(2):
        y = conv(relu(bn(x)), 16, 1)
        y = conv(relu(bn(y)), 4)
        x = layers.Concatenate()([x, y])
    return layers.AveragePooling2D(2)(conv(relu(bn(x)), 8, 1))


def squeeze_excite(x):
    x = layers.Activation("swish")(bn(conv(x, 8)))
    s = layers.GlobalAveragePooling2D(keepdims=True)(x)
    s = layers.Conv2D(2, 1, activation="relu")(s)
    s = layers.Conv2D(8, 1, activation="sigmoid")(s)
    return layers.Add()([x, bn(conv(layers.Multiply()([x, s]), 8, 1))])


def pooled(x):
    x = layers.ZeroPadding2D(1)(relu(bn(conv(x, 8))))
    x = bn(conv(layers.MaxPooling2D()(x), 8))
    x = layers.Activation("swish")(layers.MaxPooling2D()(x))
    return layers.MaxPooling2D()(relu(layers.BatchNormalization()(conv(x, 8), training=False)))


def swishes(x):
    swish = layers.Activation("swish")
    x = swish(layers.Conv2D(8, 3, padding="same")(swish(x)))
    x = conv(swish(layers.Add()([x, bn(conv(x, 8))])), 8)
    y = swish(bn(x))
    x = layers.Concatenate()([conv(y, 8), layers.AveragePooling2D(3, 1, "same")(y), relu(y)])
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(swish(relu6(x)))
    return layers.Dense(8, activation="silu")(swish(layers.MaxPooling2D()(swish(bn(x)))))


def plain(x):
    x = layers.Conv2D(8, 3, activation="relu")(x)
    x = layers.Conv2D(8, 3, activation="relu", padding="same")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(layers.Conv2D(4, 3, activation="relu6", padding="same")(x))
    return layers.Dense(9, activation="relu")(x)


def dense_layers(x):
    x = layers.Flatten()(x)
    x = relu(bn(layers.Dense(16, use_bias=False)(x)))
    y = relu(bn(layers.Dense(16)(x)))
    return relu(layers.Add()([x, y]))


def one_dimensional(x):
    x = layers.Reshape((-1, 3))(x)
    x = relu(bn(layers.Conv1D(8, 3, padding="same")(x)))
    y = bn(layers.SeparableConv1D(8, 3, padding="same")(x))
    return relu(layers.Add()([x, y]))


def three_dimensional(x):
    x = layers.Reshape((4, 2, 8, 3))(x)
    x = relu(bn(layers.Conv3D(8, 3, padding="same")(x)))
    return relu(layers.Add()([x, bn(layers.Conv3D(8, 2, padding="same")(x))]))


def read_often(x):
    x = relu(bn(conv(x, 8)))
    branches = [bn(conv(x, 8, size)) for size in (1, 2, 3)]
    x = relu(layers.Add()([x, *branches]))
    y = layers.MaxPooling2D(3, 1, padding="same")(x)
    return layers.Concatenate()([relu(bn(conv(x, 8, 1))), relu(bn(conv(x, 4))), y, x])


def read_more_than_eight_times(x):
    x = relu(bn(conv(x, 8)))
    return layers.Concatenate()([relu(bn(conv(x, 8, 1))) for _ in range(10)])


def odd_channels(x):
    x = post_activation(x, 10)
    return post_activation(x, 1)


def unusual_norms(x):
    x = relu(bn(conv(x, 8), scale=False))
    x = relu(bn(conv(x, 8), center=False))
    x = relu(bn(conv(x, 8), scale=False, center=False, momentum=0.5))
    x = relu(bn(conv(x, 8), axis=1))
    x = relu(bn(conv(x, 8), synchronized=True))
    x = relu(bn(conv(x, 8), trainable=False))
    frozen = layers.BatchNormalization()
    frozen.trainable = False
    return relu(layers.Add()([frozen(conv(x, 8)), x]))


def same_twice(x):
    x = bn(conv(x, 8))
    x = relu(layers.Add()([x, x]))
    x = conv(relu(x), 8)
    return relu(relu6(bn(relu(bn(x)))))


def shared(x):
    convolution, norm = layers.Conv2D(8, 3, padding="same"), layers.BatchNormalization()
    x = conv(x, 8)
    for _ in range(2):
        x = relu(layers.Add()([x, norm(convolution(x))]))
    return x


def several_formats(x):
    """Readers of one activation, and steps of one chain, under different policies."""
    x = relu(bn(conv(x, 8)))
    y = [
        relu(bn(conv(x, 8, dtype=DFPPolicy(mantissa_bits=10)), dtype="float32")),
        relu(bn(conv(x, 8, dtype="float32"))),
        relu(bn(conv(x, 8, dtype=DFPPolicy(exponents="tensor", fused=False)))),
        bn(conv(x, 8), dtype=DFPPolicy(fused=False)),
    ]
    return relu(layers.Add()([*y, x]))


def other_dtypes(x):
    x = relu(bn(conv(x, 8), dtype="float64"))
    x = layers.Conv2D(8, 3, dtype="float64")(x)
    x = relu(bn(layers.Conv2D(8, 3)(x)))
    return bn(conv(x, 8, dtype="mixed_bfloat16"), dtype="mixed_bfloat16")


def over_time(x):
    x = layers.Reshape((2, 4, 8, 3))(x)
    block = keras.Sequential(
        [layers.Conv2D(8, 3), layers.BatchNormalization(), layers.ReLU(), layers.Conv2D(8, 1)]
    )
    x = layers.TimeDistributed(block)(x)
    x = layers.TimeDistributed(layers.BatchNormalization())(x)
    x = relu(x)
    return layers.GlobalMaxPooling3D()(x)


class ConvCell(layers.Layer):
    state_size = 8

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.input_conv = layers.Conv2D(8, 3, padding="same")
        self.state_conv = layers.Conv2D(8, 3, padding="same")
        self.add = layers.Add()

    def build(self, shape):
        self.input_conv.build(shape)
        self.state_conv.build((shape[0], 4, 8, 8))

    def get_initial_state(self, batch_size=None):
        return [ops.zeros((batch_size, 4, 8, 8))]

    def compute_output_shape(self, shape):
        return (shape[0], 8), [(shape[0], 4, 8, 8)]

    def call(self, x, states, training=False):
        y = self.add([self.input_conv(x), self.state_conv(states[0])])
        y = ops.relu(y)
        return ops.mean(y, (1, 2)), [y]


def recurrent(x):
    x = layers.Reshape((2, 4, 8, 3))(x)
    y = layers.RNN(ConvCell())(x)
    x = layers.ConvLSTM2D(4, 3, padding="same", activation="relu", recurrent_activation="relu")(x)
    x = layers.GlobalAveragePooling2D()(relu(bn(conv(x, 8))))
    return layers.Concatenate()([x, y])


class Residual(layers.Layer):
    """What residual blocks are made of; their batch norm is that of inference."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.convolution = layers.Conv2D(8, 3, padding="same")
        self.norm = layers.BatchNormalization()
        self.add = layers.Add()

    def build(self, shape):
        self.convolution.build(shape)
        self.norm.build(shape)

    def block(self, x, shortcut):
        return ops.relu(self.add([shortcut, self.norm(self.convolution(x), training=False)]))


class Branches(Residual):
    """A residual block in a branch, and one in a loop."""

    def call(self, x):
        big = ops.sum(x) > -1e9
        x = ops.cond(big, lambda: self.block(x, x), lambda: x)
        return ops.fori_loop(0, 2, lambda _, x: self.block(x, x), x)


def control_flow(x):
    return Branches()(relu(bn(conv(x, 8))))


class Block(Residual):
    """A residual block of two convolutions, which share their weights."""

    def call(self, x):
        return self.block(ops.relu(self.norm(self.convolution(x), training=False)), x)


def rematerialised(x):
    x = relu(bn(conv(x, 8)))
    with keras.RematScope("list_of_layers", layer_names=["first", "second", "third"]):
        x = layers.Conv2D(8, 3, padding="same", activation="relu", name="first")(x)
        x = Block(name="third")(Block(name="second")(x))
    return relu(bn(conv(x, 8)))


def merged_by_operators(x):
    x = relu(bn(conv(x, 8)))
    x = relu(x + bn(conv(x, 8)))
    return relu(bn(conv(x, 8)) + layers.Conv2D(8, 1)(x) + x)


def other_activations(x):
    x = layers.LeakyReLU()(bn(conv(x, 8)))
    x = layers.ReLU(max_value=3.0)(bn(conv(x, 8)))
    x = layers.ReLU(threshold=0.5)(bn(conv(x, 8)))
    x = layers.Activation("gelu")(bn(conv(x, 8)))
    return layers.Dropout(0.5, seed=1)(relu(bn(conv(x, 8))))


BODIES = {
    "post-activation": post_activation,
    "post-activation, shortcut last": lambda x: post_activation(x, 8, False),
    "pre-activation": pre_activation,
    "linear bottleneck": linear_bottleneck,
    "concatenation": dense_block,
    "swish": squeeze_excite,
    "pooled": pooled,
    "swishes": swishes,
    "biases": plain,
    "dense": dense_layers,
    "1D": one_dimensional,
    "3D": three_dimensional,
    "many readers": read_often,
    "ten readers": read_more_than_eight_times,
    "odd channels": odd_channels,
    "norms": unusual_norms,
    "same twice": same_twice,
    "shared": shared,
    "several formats": several_formats,
    "other dtypes": other_dtypes,
    "over time": over_time,
    "recurrent": recurrent,
    "control flow": control_flow,
    "remat": rematerialised,
    "operators": merged_by_operators,
    "other activations": other_activations,
}


# Some of TensorFlow's own ops round otherwise in a graph than they do eagerly.
NOT_AS_EAGER = ("recurrent", "other activations")


# Tests of these add little to the others.
SLOW = (
    "ten readers", "over time", "other activations", "other dtypes", "1D", "shared", "swish",
    "recurrent", "several formats", "same twice", "norms", "post-activation, shortcut last",
)  # fmt: skip


def marked(names, slow=SLOW):
    return [pytest.param(n, marks=[pytest.mark.slow] * (n in slow)) for n in names]


@pytest.mark.parametrize("name", marked(BODIES))
def test_bits(name):
    compare(functional(BODIES[name]), images(), eager=name not in NOT_AS_EAGER)


OPTIONS = {
    "8 bits": dict(mantissa_bits=8),
    "16 bits": dict(mantissa_bits=16),
    "truncate": dict(rounding="truncate"),
    "stochastic": dict(rounding="stochastic"),
    "stochastic, 9 bits": dict(rounding="stochastic", exponents="tensor", mantissa_bits=9),
    "spill": dict(accumulation="spill"),
    "one exponent": dict(exponents="tensor"),
    "paper": dict(name="dfp16_paper"),
    "forward alone": dict(products=["forward"]),
    "input gradient alone": dict(products=["input_gradient"]),
    "weight gradient alone": dict(products=["weight_gradient"]),
    "no weight gradient": dict(products=["forward", "input_gradient"]),
    "scope": dict(scope="all"),
}


def some_of_all(x):
    """One of each chain."""
    x = relu(bn(conv(x, 8)))
    x = relu(layers.Add()([x, bn(conv(x, 8))]))
    x = layers.Conv2D(6, 3, activation="relu6", padding="same")(x)
    return relu6(bn(conv(x, 8)))


@pytest.mark.parametrize(
    "name",
    marked(
        OPTIONS,
        (
            "8 bits",
            "truncate",
            "paper",
            "scope",
            "one exponent",
            "forward alone",
            "input gradient alone",
        ),
    ),
)
def test_options(name):
    options = OPTIONS[name]
    # The noise of a function is not that of eager execution.
    eager = options.get("rounding") != "stochastic"
    compare(functional(some_of_all), images(), eager=eager, **options)


@pytest.mark.parametrize("exponents", ["sample", "tensor"])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_unknown_sizes(n, exponents):
    def make_step(model, training):
        step = training_step(model, training=training)
        if tf.executing_eagerly() and make_step.eager:
            return step
        signature = [tf.TensorSpec((None, None, None, 3), tf.float32)]
        return tf.function(step, input_signature=signature)

    results = []
    for fused, eager in ((True, False), (False, False), (True, True)):
        make_step.eager = eager
        model = built(functional(some_of_all, (None, None, 3)), fused=fused, exponents=exponents)
        results.append(everything(model, make_step(model, True), images((n, 7, 9, 3))))
    assert_all_same(results[0], results[1], "separate steps")
    assert_all_same(results[0], results[2], "eager")


@pytest.mark.parametrize(
    "name", marked(["post-activation", "linear bottleneck", "biases", "norms"], ("biases", "norms"))
)
def test_gradients_in_inference(name):
    """With moving statistics, whose gradient is another one."""
    compare(functional(BODIES[name]), images(), training=False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_not_a_number(value, training):
    x = images().numpy()
    x[1, 2, 3, 1] = value
    x = tf.constant(x)
    # Without max pooling, before which TensorFlow's optimizer puts no ReLU: of NaNs it makes zeros.
    results = []
    for fused in (True, False):
        model = built(functional(some_of_all), fused=fused)
        step = tf.function(training_step(model, training=training))
        results.append([tf.function(model)(x), model(x), step(x)])
    assert_all_same(*results)
    alone = results[0][0].numpy()
    assert np.isnan(alone[1]).all() and np.isfinite(alone[[0, 2]]).all()


def test_huge_and_subnormal_values():
    x = images().numpy()
    x[0] *= 1e38
    x[1] *= 1e-40
    compare(functional(some_of_all), tf.constant(x), training=False)
    compare(functional(some_of_all), tf.constant(x[1:]), training=True)


# ---- That it happens -----------------------------------------------------------------------------


def live_ops_of(body, step_of=training_step, **options):
    model = built(functional(body), **options)
    step = tf.function(step_of(model))
    found = live_ops(step.get_concrete_function(images()))
    weights = sum(len(v.shape) > 1 for v in model.trainable_variables)
    return found, weights


def test_a_residual_network_is_fused():
    found, weights = live_ops_of(post_activation)
    assert not {"Relu", "ReluGrad", "AddN"} & set(found), found
    # The kernels, the image, what the pooling gives, the loss's gradient.
    assert found["DfpQuantize"] == weights + 3, found
    separate, _ = live_ops_of(post_activation, fused=False)
    assert separate["Relu"] and separate["ReluGrad"] and separate["DfpQuantize"] > weights + 3


@pytest.mark.parametrize("name", ["linear bottleneck", "biases", "pre-activation", "dense"])
def test_no_activation_is_left(name):
    found, _ = live_ops_of(BODIES[name])
    # A pooling, and its gradient, read floats that the product has clipped.
    assert not {"Relu", "Relu6"} & set(found), found
    assert "Relu6Grad" not in found or name == "biases", found


def test_what_was_pooled_is_not_kept():
    found, _ = live_ops_of(pooled)
    # Its padding, and its batch norm and ReLU: again in the backward pass.
    assert (found["MaxPoolGrad"], found["Pad"]) == (3, 2), found
    assert found["DfpNormalize"] == 4 + 3, found


def test_swish_is_one_pass_with_batch_norm():
    def body(x):
        for _ in range(3):
            x = layers.Activation("swish")(bn(conv(x, 8)))
        return conv(x, 8)

    found, _ = live_ops_of(body)
    assert not {"Sigmoid", "AddN"} & set(found), found
    # Forward, and again for the weight gradient; backward sums, and mantissas.
    assert (found["DfpNormalize"], found["DfpNormalizeGradient"]) == (6, 3), found


@pytest.mark.parametrize("first, second", [(relu6, relu), (relu, relu6), (relu6, relu6)])
def test_one_activation_after_another(first, second):
    """A product clips once: what it clips already is left to the second."""

    def body(x):
        x = second(first(layers.Conv2D(8, 3)(4.0 * x)))
        return layers.Conv2D(8, 1)(layers.MaxPooling2D()(x))

    x = 8 * images()
    fused, separate = (tf.function(built(functional(body), fused=f))(x) for f in (True, False))
    assert_same(fused.numpy(), separate.numpy(), "an inference")


def test_nothing_is_fused_that_should_not_be():
    """Neither under fused=False nor where layers stay float32."""

    def steps(found):
        return sum(found[name] for name in ("Relu", "Relu6", "ReluGrad", "Relu6Grad"))

    separate, _ = live_ops_of(read_often, fused=False)
    assert steps(separate) == 2 * 4 and separate["AddN"], separate

    def mixed(x):
        with keras_dfp.policy_scope("float32"):
            x = relu(bn(conv(relu(bn(conv(x, 8))), 8)))
        x = relu(bn(conv(x, 8)))
        with keras_dfp.policy_scope("float32"):
            return relu(bn(conv(relu(x), 8)))

    found, _ = live_ops_of(mixed)
    # The second ReLU comes before a product on integers; the fourth's mask is the third's.
    assert found["Relu"] >= 3 and found["ReluGrad"] >= 3, found


def test_floats_that_only_products_read_are_not_made():
    model = built(functional(post_activation))
    concrete = tf.function(lambda x: model(x, training=False)).get_concrete_function(images())
    wants = [node.attr["want_y"].b for node in live_nodes(concrete) if node.op == "DfpNormalize"]
    # The shortcuts read some; the pooling reads the last.
    assert len(wants) > 5 and sum(wants) < len(wants) - 2
    assert not {"Relu", "AddV2"} & set(live_ops(concrete))


def test_fit_runs_fused_functions(monkeypatch):
    from keras_dfp import fusion

    seen = collections.Counter()
    original = fusion._Rewriting.run

    def run(self):
        original(self)
        seen[len(self._edges) > 0] += 1

    monkeypatch.setattr(fusion._Rewriting, "run", run)
    model = built(functional(some_of_all))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images(), np.arange(3), verbose=0)
    assert seen[True]
    before = seen[True]
    model.predict(images(), verbose=0)
    assert seen[True] > before


# ---- That nothing is left behind -----------------------------------------------------------------


def test_a_function_s_graph_is_as_before():
    from keras_dfp import fusion

    def trace():
        model = built(functional(post_activation))
        step = tf.function(training_step(model))
        return step.get_concrete_function(images()).graph

    graph = trace()
    before = edges(graph)
    with fusion.fused(graph):
        during = edges(graph)
    after = edges(graph)
    assert during[: len(before)] != before and after[: len(before)] == before
    # What was added does nothing, reads what there was, and is read by nobody.
    names = {name for name, _ in before}
    added = {name for name, _ in after} - names
    assert added and not any(t.split(":")[0] in added for _, ins in before for t in ins)
    assert not any(op._is_stateful for op in graph.get_operations() if op.name in added)


def test_an_error_leaves_the_graph_as_before(monkeypatch):
    from keras_dfp import fusion

    model = built(functional(some_of_all))
    graph = tf.function(training_step(model)).get_concrete_function(images()).graph
    before = edges(graph)

    def fail(self):
        assert self._edges
        raise KeyError

    monkeypatch.setattr(fusion._Rewriting, "_place_tokens", fail)
    with pytest.raises(KeyError), fusion.fused(graph):
        pass
    assert edges(graph)[: len(before)] == before


# ---- Tapes of all kinds --------------------------------------------------------------------------


def both_and_eager(body, run, make=functional, same_eagerly=True, **options):
    """Compares what `run(model, function)` gives, where `function` is tf.function or nothing."""
    results = []
    for fused, function in ((True, tf.function), (False, tf.function), (True, lambda f: f)):
        model = built(make(body) if make else body, fused=fused, **options)
        plain = fused and same_eagerly
        with contextlib.nullcontext() if plain else as_written():
            results.append(run(model, function))
    for other, what in zip(results[1:], ("separate steps", "eager"), strict=False):
        if what != "eager" or same_eagerly:
            assert_all_same(results[0], other, what)
        else:
            for a, b in zip(tf.nest.flatten(results[0]), tf.nest.flatten(other), strict=True):
                most = np.max(np.abs(b))
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * most)
    flat = tf.nest.flatten(results[0])
    assert all(t is not None and np.any(t) for t in flat), [t is not None for t in flat]
    return results[0]


TAPED = ["post-activation", "pre-activation", "linear bottleneck", "biases", "many readers"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", marked(TAPED, ("pre-activation", "biases", "many readers")))
def test_tape_outside_of_the_function(name, training):
    """Then forward and backward are two functions."""

    def run(model, function):
        call = function(lambda x: model(x, training=training))
        x = images()
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            loss = loss_of(call(x))
        first = tape.gradient(loss, [x, *model.trainable_variables])
        return first, tape.gradient(loss, x)

    # TensorFlow adds up gradients in another order there.
    both_and_eager(BODIES[name], run, same_eagerly=name != "many readers")


def test_nested_functions():
    def run(model, function):
        inner = function(lambda x: model(x, training=True))

        @function
        def outer(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = loss_of(function(inner)(x)) + loss_of(inner(x * 2))
            return loss, tape.gradient(loss, [x, *model.trainable_variables])

        return outer(images())

    both_and_eager(some_of_all, run)


@pytest.mark.parametrize("kind", ["feature model", "inside"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_intermediate_results(kind, training):
    """As Grad-CAM asks for them."""

    def build():
        image = keras.Input((8, 8, 3))
        first = conv(image, 8)
        norm = bn(first)
        second = relu(norm)
        third = conv(second, 8)
        total = layers.Add()([second, bn(third)])
        fourth = relu(total)
        y = layers.Dense(4)(layers.GlobalAveragePooling2D()(relu(bn(conv(fourth, 8)))))
        return keras.Model(image, [first, norm, second, third, total, fourth, y])

    def run(model, function):
        def gradients(x):
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(x)
                *features, y = model(x, training=training)
                loss = loss_of(y)
                if kind == "inside":
                    loss += loss_of(features[1]) + loss_of(features[5])
            each = tape.gradient(loss, features)
            return each, tape.gradient(loss, features[2]), tape.gradient(loss, x)

        call = function(gradients)
        return call(images()), gradients(images())

    both_and_eager(build, run, make=None)


@pytest.mark.parametrize(
    "name", marked(["post-activation", "linear bottleneck", "biases"], ("post-activation",))
)
def test_gradient_penalty(name):
    def run(model, function):
        @function
        def step(x):
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    y = loss_of(model(x, training=True))
                dx = inner.gradient(y, x)
                loss = y + tf.reduce_sum(tf.square(dx))
            variables = model.trainable_variables
            return dx, loss, outer.gradient(loss, variables, unconnected_gradients="zero")[:-1]

        return step(images())

    # Stock TensorFlow's second derivatives sum in another order in a graph.
    results = both_and_eager(BODIES[name], run, same_eagerly=False)
    assert all(np.isfinite(t).all() for t in tf.nest.flatten(results))


def test_gradient_accumulation():
    def run(model, function):
        totals = [tf.Variable(tf.zeros(v.shape)) for v in model.trainable_variables]

        @function
        def accumulate(x):
            with tf.GradientTape() as tape:
                loss = loss_of(model(x, training=True))
            for total, g in zip(
                totals, tape.gradient(loss, model.trainable_variables), strict=True
            ):
                total.assign_add(g)

        for x in (images(), images((2, 8, 8, 3)), images((1, 8, 8, 3))):
            accumulate(x)
        return [tf.convert_to_tensor(t) for t in totals]

    both_and_eager(some_of_all, run)


def test_custom_loop_in_a_function():
    def run(model, function):
        @function
        def train(x):
            total = tf.constant(0.0)
            for _ in tf.range(3):
                with tf.GradientTape() as tape:
                    loss = loss_of(model(x, training=True))
                for v, g in zip(
                    model.trainable_variables,
                    tape.gradient(loss, model.trainable_variables),
                    strict=True,
                ):
                    v.assign(v - 0.01 * g)
                total += loss
            return total

        return train(images()), [v.value for v in model.variables]

    both_and_eager(some_of_all, run)


@pytest.mark.slow
def test_gradient_of_a_loop_around_the_model():
    def run(model, function):
        @function
        def step(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                total = tf.constant(0.0)
                for i in tf.range(3):
                    scaled = x * tf.cast(i + 1, tf.float32)
                    if i > 0:
                        total += loss_of(model(scaled, training=True))
                    else:
                        total += loss_of(model(scaled, training=False))
            return total, tape.gradient(total, [x, *model.trainable_variables])

        return step(images())

    both_and_eager(some_of_all, run, same_eagerly=False)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.stem = keras.Sequential(
            [layers.Conv2D(8, 3, padding="same"), layers.BatchNormalization(), layers.ReLU()]
        )
        self.body = functional(post_activation, (8, 8, 8))()
        self.norm = layers.BatchNormalization()
        self.conv = layers.Conv2D(8, 3, padding="same")
        self.build((None, 8, 8, 3))

    def call(self, x, training=False):
        x = self.stem(x, training=training)
        y = tf.nn.relu(self.norm(self.conv(x), training=training))
        y = tf.nn.relu6(x + self.norm(self.conv(y), training=training))
        y = ops.relu(ops.add(y, self.norm(self.conv(y), training=training)))
        y += x
        return self.body(tf.nn.relu(y), training=training)


def test_subclassed_and_nested_models():
    compare(Subclassed, images(), eager=False)


def test_masked_norm():
    def build():
        x = keras.Input((6, 4))
        y = layers.Masking()(x)
        y = layers.ReLU()(layers.BatchNormalization()(layers.Dense(8)(y)))
        y = layers.ReLU()(layers.BatchNormalization()(layers.Dense(8)(y)))
        return keras.Model(x, layers.GlobalAveragePooling1D()(layers.Dense(3)(y)))

    x = images((4, 6, 4)).numpy()
    x[1, 3:] = 0
    compare(build, tf.constant(x), eager=False)


class SumOfVectors(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3))

    def call(self, x):
        return ops.matmul(tf.add_n([x[0], x[1], x[0] * x[1]]), self.kernel)


def test_a_sum_of_vectors_is_left_alone():
    """Fused ops take rows of channels."""

    def build():
        return keras.Sequential([keras.Input((4,)), layers.BatchNormalization(), SumOfVectors()])

    compare(build, images((3, 4)))


# ---- Keras's own loops, saving -------------------------------------------------------------------


@pytest.mark.parametrize("single", [0, 1])
def test_a_sum_repeats_a_single_sample(single):
    """Of two inputs, each of any number of samples, one has a single sample."""
    inputs = [keras.Input((4, 4, 8)) for _ in range(2)]
    results = []
    for fused in (True, False):
        keras.utils.set_random_seed(0)
        with keras_dfp.policy_scope(DFPPolicy(fused=fused)):
            sides = [layers.BatchNormalization()(layers.Conv2D(8, 1)(x)) for x in inputs]
            y = layers.Conv2D(2, 1)(layers.ReLU()(layers.Add()(sides)))
        model = keras.Model(inputs, y)

        @tf.function(input_signature=[[tf.TensorSpec([None, 4, 4, 8])] * 2])
        def step(x, model=model):
            with tf.GradientTape() as tape:
                y = model(x, training=True)
                loss = tf.reduce_sum(tf.square(y))
            return y, tape.gradient(loss, model.trainable_variables)

        x = [images((1 if i == single else 3, 4, 4, 8)) for i in range(2)]
        results.append(tf.nest.flatten(step(x)))
    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected.numpy())


def test_fit_evaluate_predict():
    def run(fused, **kwargs):
        model = built(functional(post_activation), fused=fused)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss, metrics=["acc"], **kwargs)
        x, y = images((8, 8, 8, 3)).numpy(), np.arange(8) % 5
        history = model.fit(x, y, 3, epochs=2, shuffle=False, verbose=0).history
        return [
            [history[key] for key in sorted(history)],
            model.train_on_batch(x[:2], y[:2]),
            model.test_on_batch(x[:2], y[:2]),
            model.evaluate(x, y, 3, verbose=0),
            model.predict(x, 3, verbose=0),
            [v.value for v in model.variables],
        ]

    fused = run(True)
    assert_all_same(fused, run(False), "separate steps")
    assert_all_same(fused, run(True, run_eagerly=True), "eager")
    assert_all_same(fused, run(True, steps_per_execution=2), "two steps per execution")


@pytest.mark.slow
def test_gradient_accumulation_steps():
    def run(fused):
        model = built(functional(some_of_all), fused=fused)
        optimizer = keras.optimizers.Adam(0.01, gradient_accumulation_steps=2)
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        x, y = images((8, 8, 8, 3)).numpy(), np.arange(8) % 5
        model.fit(x, y, 2, shuffle=False, verbose=0)
        return [v.value for v in model.variables]

    assert_all_same(run(True), run(False))


def test_a_saved_model_goes_on(tmp_path):
    def run(fused):
        model = built(functional(some_of_all), fused=fused)
        everything(model, tf.function(training_step(model)), images())
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        return everything(again, tf.function(training_step(again)), images())

    assert_all_same(run(True), run(False))


SAVED = ["post-activation", "linear bottleneck", "biases", "control flow", "dense", "swishes"]


@pytest.mark.filterwarnings("ignore:keras_dfp. the SavedModel")
@pytest.mark.parametrize("name", marked(SAVED, ("dense", "swishes")))
def test_exported_models(name, tmp_path):
    """A SavedModel computes the same, and has the gradients of the model it was."""

    def gradients(call, variables):
        x = images()
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call(x)
            loss = loss_of(y)
        return [y, tape.gradient(loss, [x, *variables])]

    results = []
    for fused in (True, False):
        model = built(functional(BODIES[name]), fused=fused)
        path = str(tmp_path / str(fused))
        model.export(path, verbose=False)
        loaded = tf.saved_model.load(path)
        variables = {v.name.split(":")[0]: v for v in loaded.variables}
        variables = [variables[v.path] for v in model.trainable_variables]
        results.append(gradients(loaded.serve, variables))
        if name != "control flow":  # TensorFlow fails there, of loops that were loaded
            in_function = tf.function(lambda call=loaded.serve, v=variables: gradients(call, v))
            assert_all_same(in_function(), results[-1], "in a function")
        results.append(
            gradients(lambda x, model=model: model(x, training=False), model.trainable_variables)
        )
    for other in results[1:]:
        assert_all_same(results[0], other)
    assert all(np.any(t) for t in tf.nest.flatten(results[0]))


def functions_of(model, training):
    def call(x):
        return model(x, training=training)

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = loss_of(call(x))
        return tape.gradient(loss, x)

    return call, gradient


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("body", [some_of_all, swishes])
def test_exported_training_functions(body, training, tmp_path):
    """Of a function with gradients in it, and of one that normalises by the batch."""
    results = []
    for fused in (True, False):
        module = tf.Module()
        module.model = model = built(functional(body), fused=fused)

        call, gradient = functions_of(model, training)
        signature = [tf.TensorSpec((None, 8, 8, 3), tf.float32)]
        module.call = tf.function(call, input_signature=signature)
        module.gradient = tf.function(gradient, input_signature=signature)
        path = str(tmp_path / str(fused))
        tf.saved_model.save(module, path)
        loaded = tf.saved_model.load(path)
        x = images()
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = loss_of(loaded.call(x))
        results.append([loss, tape.gradient(loss, x), loaded.gradient(x), gradient(x)])
        refused = pytest.raises(NotImplementedError, match="Save it with .*fused=False")
        with refused if fused else contextlib.nullcontext():
            with tf.GradientTape() as tape:
                tape.watch(x)
                total = loss_of(loaded.gradient(x))
            assert np.any(tape.gradient(total, x))
    assert_all_same(*results)
    assert_all_same(results[0][2], results[0][3])


# ---- Large networks, two replicas ----------------------------------------------------------------

NETWORKS = ["MobileNetV2", "DenseNet121", "EfficientNetB0", "ResNet50", "ResNet50V2", "Xception"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_keras(name):
    def run(fused):
        keras.utils.set_random_seed(1)
        with keras_dfp.policy_scope(DFPPolicy(fused=fused)):
            network = getattr(keras.applications, name)
            size = 71 if name == "Xception" else 64
            model = network(weights=None, input_shape=(size, size, 3), classes=5)
        x = images((2, size, size, 3))
        step = tf.function(training_step(model))
        return step(x), tf.function(model)(x), [v.value for v in model.variables]

    with as_written():
        assert_all_same(run(True), run(False))


REPLICAS = """
import test_fusion as t
results = []
for fused in (True, False):
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = t.built(t.functional(t.some_of_all), fused=fused)
        model.compile("sgd", "mse")
    x = t.images((8, 8, 8, 3)).numpy()
    loss = model.fit(x, x[:, :5, 0, 0], 4, shuffle=False, verbose=0).history["loss"]
    results.append([loss, model.predict(x, 4, verbose=0), [v.numpy() for v in model.variables]])
t.assert_all_same(*results)
print("same")
"""


@pytest.mark.slow
def test_two_replicas():
    check_on_two(REPLICAS)
