"""Recurrent loops: kernels are quantized once before them, unless the loop changes them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_dfp
from keras_dfp import native


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


class Cell(layers.Layer):
    """A cell of one unit; `step` says what comes out, and what happens to the weight `w`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.state_size = self.output_size = 1

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 1), initializer="ones", trainable=False)

    def product(self, x):
        return keras.ops.matmul(x, self.w)

    def call(self, x, states):
        h = self.step(x, states[0])
        return h, [h]


class AssignsAfterUse(Cell):
    def step(self, x, h):
        h = self.product(x)
        self.w.assign(0.5 * self.w)
        return h


class AssignsBeforeUse(Cell):
    def step(self, x, h):
        self.w.assign(0.5 * self.w)
        return self.product(x)


class AssignsBetweenUses(Cell):
    def step(self, x, h):
        h = self.product(x)
        self.w.assign(0.5 * self.w)
        return h + 4 * self.product(x)


class AssignsWhatItComputed(Cell):
    def step(self, x, h):
        h = self.product(x)
        self.w.assign(self.w + 0.25 * keras.ops.transpose(x[:1]) * h[:1])
        return h


class AssignsWithTensorFlow(Cell):
    def step(self, x, h):
        h = self.product(x)
        self.w.value.assign_sub(0.25 * self.w)
        return h


class Scatters(Cell):
    def step(self, x, h):
        h = self.product(x)
        self.w.value.scatter_nd_add([[0, 0]], [0.5])
        return h


class HasAVariable(Cell):
    """Its weight is TensorFlow's own, unknown to Keras."""

    def build(self, shape):
        self.raw = tf.Variable(tf.ones((shape[-1], 1)))

    def step(self, x, h):
        h = keras.ops.matmul(x, self.raw)
        self.raw.assign(0.5 * self.raw)
        return h


class AssignsInABranch(Cell):
    def step(self, x, h):
        h = self.product(x)
        tf.cond(
            tf.reduce_all(h > -1), lambda: self.w.value.assign(0.5 * self.w), lambda: self.w.value
        )
        return h


class UsesInABranch(Cell):
    def step(self, x, h):
        def branch():
            y = self.product(x)
            self.w.assign(0.5 * self.w)
            return y + 4 * self.product(x)

        return tf.cond(tf.reduce_all(x > -1), branch, lambda: h)


class AssignsInAFunction(Cell):
    @tf.function
    def halve(self):
        self.w.assign(0.5 * self.w)

    def step(self, x, h):
        h = self.product(x)
        self.halve()
        return h


class AssignsInALoop(Cell):
    def step(self, x, h):
        def body(i, y):
            y = y + self.product(x)
            self.w.assign(0.5 * self.w)
            return i + 1, y

        return tf.while_loop(lambda i, _: i < 2, body, (0, tf.zeros_like(h)))[1]


class HasAnRNN(Cell):
    """Every step is a loop of its own, whose cell assigns; so does this one."""

    def build(self, shape):
        super().build(shape)
        self.inner = layers.RNN(AssignsAfterUse(), dtype=self.dtype_policy)
        self.inner.build((None, 3, shape[-1]))

    def step(self, x, h):
        y = self.inner(keras.ops.stack([x, 2 * x, x], axis=1)) + self.product(x)
        self.w.assign(0.5 * self.w)
        self.inner.cell.w.assign(4 * self.inner.cell.w)
        return y


def stacked(**kwargs):
    return layers.StackedRNNCells([AssignsAfterUse(**kwargs), AssignsAfterUse(**kwargs)], **kwargs)


class Spectral(Cell):
    def build(self, shape):
        self.project = layers.SpectralNormalization(
            layers.Dense(1, use_bias=False, dtype=self.dtype_policy), dtype=self.dtype_policy
        )
        self.project.build(shape)

    def call(self, x, states, training=True):
        h = keras.ops.tanh(self.project(x, training=training) + 0.5 * states[0])
        return h, [h]


CHANGING = [
    AssignsAfterUse,
    AssignsBeforeUse,
    AssignsBetweenUses,
    AssignsWhatItComputed,
    AssignsWithTensorFlow,
    Scatters,
    HasAVariable,
    AssignsInABranch,
    UsesInABranch,
    AssignsInAFunction,
    AssignsInALoop,
    HasAnRNN,
    stacked,
    Spectral,
]


@pytest.mark.parametrize("mode", ["eager", "graph", "unrolled", "eager unrolled"])
@pytest.mark.parametrize("cell", CHANGING)
def test_a_loop_reads_what_it_has_assigned(cell, mode):
    x = tf.constant(np.abs(normal(2, 5, 3)))

    def outputs(policy):
        keras.utils.set_random_seed(0)
        made = cell(dtype=policy)
        layer = layers.RNN(
            made, return_sequences=True, unroll="unrolled" in mode, dtype=made.dtype_policy
        )
        layer.build(x.shape)
        call = layer if "eager" in mode else tf.function(layer)
        return np.stack([call(x), call(x)])

    expected = outputs("float32")
    assert np.ptp(expected[:, 0] / x[0].numpy().sum(-1, keepdims=True)) > 0.01
    np.testing.assert_allclose(outputs("dfp16"), expected, atol=1e-3 * np.max(np.abs(expected)))


class Plain(Cell):
    """A cell of the user's that assigns to nothing but its count of steps."""

    def build(self, shape):
        super().build(shape)
        self.steps = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def step(self, x, h):
        self.steps.assign_add(1.0)
        return self.product(x)


# What makes the layer; how many kernels it has; how many products it has in a step; how often
# Keras calls a step before the loop (stacked cells once more, in case they drop out).
CONSTANT = {
    "LSTM": (lambda: layers.LSTM(3), 2, 2, 1),
    "GRU": (lambda: layers.GRU(3), 2, 2, 1),
    "SimpleRNN": (lambda: layers.SimpleRNN(3), 2, 2, 1),
    "StackedRNNCells": (lambda: layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)]), 4, 4, 2),
    "a cell of the user's": (lambda: layers.RNN(Plain()), 1, 1, 1),
}


@pytest.mark.parametrize("kind", CONSTANT)
def test_what_a_loop_does_not_change_is_quantized_once(kind, monkeypatch):
    make, kernels, products, calls = CONSTANT[kind]
    with keras_dfp.policy_scope("dfp16"):
        layer = make()
    x = tf.constant(normal(2, 6, 4))
    layer(x)

    graph = tf.function(layer).get_concrete_function(tf.TensorSpec(x.shape)).graph
    (loop,) = [op for op in graph.get_operations() if op.type in ("While", "StatelessWhile")]
    library = {f.signature.name: f for f in graph.as_graph_def().library.function}
    nodes = [node.op for node in library[loop.get_attr("body").name].node_def]
    assert nodes.count("DfpQuantize") == nodes.count("DfpMatmul") == products
    outside = [op.inputs[0].op.type for op in graph.get_operations() if op.type == "DfpQuantize"]
    assert outside.count("ReadVariableOp") == calls * kernels

    quantized = []

    def counting(x, *args, quantize=native.quantize):
        quantized.append(isinstance(x, tf.Variable))
        return quantize(x, *args)

    monkeypatch.setattr(native, "quantize", counting)
    layer(x)
    assert quantized.count(True) == kernels
    assert quantized.count(False) == (calls + x.shape[1]) * products + (calls - 1) * kernels


def test_a_variable_that_changed_between_two_loops_is_quantized_again():
    layer = layers.RNN(Plain(dtype="dfp16"), dtype="dfp16")
    layer.build((None, 3, 2))

    @tf.function
    def twice(x):
        first = layer(x)
        layer.cell.w.assign(2 * layer.cell.w)
        return first, layer(x)

    x = normal(2, 3, 2)
    first, second = twice(x)
    layer.cell.w.assign([[1.0], [1.0]])
    np.testing.assert_array_equal(first, layer(x))
    layer.cell.w.assign([[2.0], [2.0]])
    np.testing.assert_array_equal(second, layer(x))


# ---- cells with a tf.function --------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="test_rnn")
class FunctionCell(layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = self.output_size = units

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], self.units))
        self.u = self.add_weight(shape=(self.units, self.units))

    @tf.function
    def step(self, x, h):
        return keras.ops.tanh(keras.ops.matmul(x, self.w) + keras.ops.matmul(h, self.u))

    def call(self, x, states):
        h = self.step(x, states[0])
        return h, [h]

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class NestedFunctionCell(FunctionCell):
    @tf.function
    def step(self, x, h):
        return super().step(x, h) + keras.ops.matmul(x, self.w)


class ReadsOutside(FunctionCell):
    """The function's weight is multiplied outside of it too."""

    def call(self, x, states):
        h = self.step(x, states[0]) + keras.ops.matmul(x, self.w)
        return h, [h]


class FunctionLSTM(layers.LSTMCell):
    @tf.function
    def call(self, *args, **kwargs):
        return super().call(*args, **kwargs)


FUNCTIONS = {
    "one": lambda: layers.RNN(FunctionCell(4)),
    "nested": lambda: layers.RNN(NestedFunctionCell(4)),
    "read outside": lambda: layers.RNN(ReadsOutside(4)),
    "LSTM": lambda: layers.RNN(FunctionLSTM(4)),
    "stacked": lambda: layers.RNN([FunctionCell(4), layers.GRUCell(3), FunctionLSTM(2)]),
    "unrolled": lambda: layers.RNN(FunctionCell(4), unroll=True),
    "Bidirectional": lambda: layers.Bidirectional(layers.RNN(FunctionCell(4))),
}


SLOW = ("stacked", "Bidirectional", "LSTM", "nested", "unrolled")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in FUNCTIONS]
)
def test_a_cell_with_a_function_runs_in_every_trace(kind):
    x, mask = normal(12, 5, 6), np.arange(5) < np.arange(1, 13)[:, None] % 6
    y = x[:, 0, :1]

    def results(policy):
        keras.utils.set_random_seed(0)
        with keras_dfp.policy_scope(policy):
            inputs, masks = keras.Input((5, 6)), keras.Input((5,), dtype="bool")
            model = keras.Model(
                [inputs, masks], layers.Dense(1)(FUNCTIONS[kind]()(inputs, mask=masks))
            )
        model.compile(keras.optimizers.SGD(0.1), "mse")
        found = []
        for batch in (12, 5):
            model.fit([x, mask], y, batch_size=batch, shuffle=False, verbose=0)
            found.append(model.evaluate([x, mask], y, batch_size=batch, verbose=0))
            found.append(model.predict([x, mask], batch_size=batch, verbose=0))
            found.append(model([x, mask]))
            model.make_train_function(force=True)
        return found + model.get_weights()

    for ours, stock in zip(results("dfp16"), results("float32"), strict=True):
        np.testing.assert_allclose(ours, stock, atol=3e-3)
