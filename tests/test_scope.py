"""DFPPolicy(scope=...): which products of a layer are taken; and what never is: moving data."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from keras.src.ops import image

import keras_dfp
from keras_dfp import DFPFormat, DFPPolicy
from keras_dfp.backend import recording

NO_WEIGHTS = "the layer has no weights; scope='all' takes it"


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def decisions(layer, *args, **kwargs):
    with recording.record() as products:
        layer(*args, **kwargs)
    return [(p.operation, p.decision.format is not None, p.decision.reason) for p in products]


def both(layer, *args):
    """What an eager call and a traced one decide, which must be the same."""
    layer(*args)
    eager = decisions(layer, *args)
    graph = decisions(tf.function(layer), *map(tf.constant, args))
    assert graph == eager
    return eager


class Gram(layers.Layer):
    """Multiplies, and has no weights."""

    def call(self, x):
        return ops.matmul(x, ops.transpose(x))


class GramAndGain(Gram):
    def build(self, shape):
        self.gain = self.add_weight(shape=(), name="gain")

    def call(self, x):
        return self.gain * super().call(x)


class Rotary(layers.Layer):
    """The angles of rotary embeddings, in float32 on purpose."""

    def call(self, x):
        half = x.shape[-1] // 2
        frequency = ops.power(10000.0, -ops.arange(half, dtype="float32") / half)
        position = ops.arange(x.shape[1], dtype="float32")
        return ops.einsum("t,f->tf", position, frequency) + 0 * x[0, :, :half]


class Tied(keras.Model):
    """Has no weights of its own, and multiplies by those of its embedding."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = layers.Embedding(7, 4)

    def call(self, x):
        return ops.einsum("bte,ve->btv", self.embedding(x), self.embedding.embeddings)


class ByHand(layers.Layer):
    def call(self, x):
        return ops.dot_product_attention(x, x, x)


# ------------------------------------------------------------------------------- scope="weights"


def test_a_layer_without_weights_stays_float32():
    x = normal(3, 4)
    assert both(Gram(dtype="dfp16"), x) == [("matmul", False, NO_WEIGHTS)]
    np.testing.assert_array_equal(Gram(dtype="dfp16")(x), Gram(dtype="float32")(x))


def test_positions_are_exact():
    x = np.ones((1, 4096, 8), "float32")
    angles = np.arange(4096)[:, None] * 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(Rotary(dtype="dfp16")(x), angles, rtol=1e-5)


def test_a_layer_with_weights_of_its_own_is_taken_whole():
    assert both(GramAndGain(dtype="dfp16"), normal(3, 4)) == [("matmul", True, "")]


def test_weights_of_inner_layers_do_not_count():
    class Block(Gram):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = layers.Dense(4, dtype=self.dtype_policy)

        def call(self, x):
            return super().call(self.dense(x))

    assert both(Block(dtype="dfp16"), normal(3, 4)) == [
        ("matmul", True, ""),
        ("matmul", False, NO_WEIGHTS),
    ]


def test_a_variable_as_an_operand_counts():
    with keras_dfp.policy_scope("dfp16"):
        model = Tied()
    x = np.ones((2, 3), "int32")
    assert both(model, x) == [("einsum", True, "")]
    with keras_dfp.policy_scope("dfp16"):
        table = keras.Variable(normal(4, 3))
        inputs = keras.Input((4,))
        functional = keras.Model(inputs, ops.matmul(inputs, table))
    assert both(functional, normal(2, 4)) == [("matmul", True, "")]


ATTENTION = {
    "MultiHeadAttention": lambda: layers.MultiHeadAttention(2, 4, dropout=0.1, dtype="dfp16"),
    "GroupQueryAttention": lambda: layers.GroupQueryAttention(4, 4, 2, dtype="dfp16"),
    "Attention": lambda: layers.Attention(dtype="dfp16"),
    "AdditiveAttention": lambda: layers.AdditiveAttention(use_scale=False, dtype="dfp16"),
    "a subclass": lambda: type("Mine", (layers.Attention,), {})(dtype="dfp16"),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_counts(kind):
    layer, x = ATTENTION[kind](), normal(2, 5, 4)
    args = (x, x) if kind.endswith("HeadAttention") or kind.startswith("Group") else ([x, x],)
    found = decisions(layer, *args)
    assert found and all(on_integers for _, on_integers, _ in found)


def test_dot_product_attention_counts_in_any_layer():
    x = normal(2, 5, 2, 4)
    assert both(ByHand(dtype="dfp16"), x) == [("dot_product_attention", True, "")]
    with keras_dfp.policy_scope("dfp16"):
        inputs = keras.Input(x.shape[1:])
        model = keras.Model(inputs, ops.dot_product_attention(inputs, inputs, inputs))
    assert both(model, x) == [("dot_product_attention", True, "")]


def test_nodes_of_functional_models_stay_float32():
    with keras_dfp.policy_scope("dfp16"):
        inputs = keras.Input((3, 4))
        model = keras.Model(inputs, ops.matmul(inputs, ops.transpose(inputs, (0, 2, 1))))
    (row,) = keras_dfp.describe(model).rows
    assert (row["format"], row["reason"]) == (None, NO_WEIGHTS)


def test_keras_dfp_ops_called_directly_always_run_on_integers():
    layer = layers.Lambda(lambda x: keras_dfp.ops.matmul(x, tf.transpose(x)), dtype="dfp16")
    assert [found[1] for found in decisions(layer, normal(3, 4))] == [True]


# ------------------------------------------------------------------------- scope="all", overrides


def test_scope_all_takes_everything():
    policy = DFPPolicy(scope="all")
    assert both(Gram(dtype=policy), normal(3, 4)) == [("matmul", True, "")]
    assert decisions(layers.Dot(-1, dtype=policy), [normal(2, 4)] * 2) == [("matmul", True, "")]


@pytest.mark.parametrize(
    ("override", "taken"),
    [
        ({}, None),
        ({"mantissa_bits": 16}, None),
        ({"scope": "all"}, True),
        ({"scope": "weights"}, False),
        ("dfp16", False),
        (DFPPolicy(), False),
        (DFPPolicy(scope="all"), True),
        (DFPPolicy(scope="weights"), False),
        ("float32", False),
    ],
    ids=str,
)
@pytest.mark.parametrize("scope", ["weights", "all"])
def test_an_override_changes_the_scope_if_it_says_so(scope, override, taken):
    taken = scope == "all" if taken is None else taken
    policy = DFPPolicy(scope=scope, overrides={"gram": override})
    restored = DFPPolicy.from_config(policy.get_config())
    assert restored == policy
    for p in (policy, restored):
        assert [f[1] for f in decisions(Gram(name="gram", dtype=p), normal(3, 4))] == [taken]
        other = decisions(Gram(name="other", dtype=p), normal(3, 4))
        assert [found[1] for found in other] == [scope == "all"]


# --------------------------------------------------------------------------------------- operators


class Operator(layers.Layer):
    def __init__(self, multiply, **kwargs):
        super().__init__(**kwargs)
        self.multiply = multiply

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], shape[-1]), name="w")

    def call(self, x):
        return self.multiply(x, self.w)


OPERATORS = {
    "tensor @ Variable": lambda x, w: (x @ w, ops.matmul(x, w)),
    "Variable @ tensor": lambda x, w: (w @ x, ops.matmul(w, x)),
    "tensor @ tensor": lambda x, w: (x @ x, ops.matmul(x, x)),
    "tensor @ tf.Variable": lambda x, w: (x @ w.value, ops.matmul(x, w)),
    "tf.Variable @ tensor": lambda x, w: (w.value @ x, ops.matmul(w, x)),
    "tf.Variable @ tf.Variable": lambda x, w: (w.value @ w.value, ops.matmul(w, w)),
    "array @ tensor": lambda x, w: (np.eye(4, dtype="f") @ x, ops.matmul(np.eye(4, dtype="f"), x)),
    "batches": lambda x, w: (tf.stack([x, x]) @ w, ops.matmul(tf.stack([x, x]), w)),
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_the_operator_is_keras_ops_matmul(kind):
    layer, x = Operator(OPERATORS[kind], dtype="dfp16"), normal(4, 4)
    assert both(layer, x) == [("matmul", True, "")] * 2
    np.testing.assert_array_equal(*layer(x))
    float32 = Operator(OPERATORS[kind], dtype="float32")
    assert both(float32, x)[0] == ("matmul", False, "policy float32")


def test_the_operator_trains():
    layer = Operator(lambda x, w: x @ w, dtype="dfp16")
    x, dy = normal(4, 4), normal(4, 4, seed=1)
    with tf.GradientTape() as tape:
        y = layer(x)
    np.testing.assert_allclose(
        tape.gradient(y, layer.w.value, output_gradients=dy), x.T @ dy, atol=5e-3
    )


def test_the_operator_outside_of_layers_is_tensorflows():
    x = tf.constant(normal(5, 5))
    np.testing.assert_array_equal(x @ x, tf.matmul(x, x))
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        x @ tf.ones(5)


# --------------------------------------------------------------------------------- moving data


class Patches(layers.Layer):
    def __init__(self, extract, own=False, **kwargs):
        super().__init__(**kwargs)
        self.extract, self.own = extract, own

    def build(self, shape):
        if self.own:
            self.gain = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        return self.extract(x)


MOVEMENTS = {
    "extract_patches": (lambda x: ops.image.extract_patches(x, 3), (2, 9, 9, 3)),
    "overlapping": (
        lambda x: ops.image.extract_patches(x, (3, 2), 1, padding="same"),
        (2, 8, 8, 1),
    ),
    "unbatched": (lambda x: ops.image.extract_patches(x, 4, dilation_rate=1), (8, 8, 2)),
    "patches and operator": (
        lambda x: ops.image.extract_patches(x, 4)[..., :2] @ tf.ones((2, 1)),
        (2, 8, 8, 2),
    ),
}
if hasattr(ops.image, "extract_patches_3d"):
    MOVEMENTS["extract_patches_3d"] = (
        lambda x: ops.image.extract_patches_3d(x, 2),
        (2, 4, 4, 4, 3),
    )
if hasattr(image, "_extract_patches_2d"):
    MOVEMENTS["three sizes"] = (
        lambda x: ops.image.extract_patches(x, (2, 2, 2)),
        (2, 4, 4, 4, 1),
    )


@pytest.mark.parametrize("own", [False, True], ids=["without weights", "with weights"])
@pytest.mark.parametrize("scope", ["weights", "all"])
@pytest.mark.parametrize("kind", [kind for kind in MOVEMENTS if "operator" not in kind])
def test_moving_data_changes_no_bit(kind, scope, own):
    extract, shape = MOVEMENTS[kind]
    rng = np.random.default_rng(0)
    x = (10 ** rng.uniform(-6, 6, shape)).astype("float32")
    truth = np.array(extract(x))
    assert set(truth.ravel()) <= {0, *x.ravel()}
    layer = Patches(extract, own, dtype=DFPPolicy(scope=scope))
    for call in (layer, tf.function(layer)):
        np.testing.assert_array_equal(call(x), truth)
    (row,) = keras_dfp.describe(layer, inputs=x).rows
    assert row["format"] is None and "moves data" in row["reason"]
    layer.dtype_policy = DFPPolicy(overrides={layer.name: "dfp16"})
    np.testing.assert_array_equal(layer(x), truth)


def test_what_follows_moved_data_is_multiplied_as_always():
    extract, shape = MOVEMENTS["patches and operator"]
    found = decisions(Patches(extract, own=True, dtype="dfp16"), normal(*shape))
    assert [f[:2] for f in found] == [("extract_patches", False), ("matmul", True)]


OUTER = {
    "einsum": lambda t, f: ops.einsum("t,f->tf", t, f),
    "einsum of batches": lambda t, f: ops.einsum("bt,bf->btf", t[None], f[None])[0],
    "matmul": lambda t, f: ops.matmul(t[:, None], f[None]),
    "tensordot": lambda t, f: ops.tensordot(t, f, axes=0),
    "operator": lambda t, f: t[:, None] @ f[None],
}


@pytest.mark.parametrize("scope", ["weights", "all"])
@pytest.mark.parametrize("kind", OUTER)
def test_an_outer_product_is_left_to_float32(kind, scope):
    """Positions times frequencies, in a layer that has weights too."""

    class Rotary(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1], 6))

        def call(self, x):
            angles = OUTER[kind](ops.arange(5.0), ops.power(1e4, -ops.arange(6.0) / 6))
            return ops.matmul(x, self.w) + angles

    layer = Rotary(dtype=DFPPolicy(scope=scope))
    found = [f[:2] for f in decisions(layer, normal(2, 5, 4))]
    operation = "matmul" if kind == "operator" else kind.split()[0]
    assert sorted(found) == sorted([("matmul", True), (operation, scope == "all")])


def test_what_is_no_tensor_is_left_to_keras():
    class Lists(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(2, 2))

        def call(self, x):
            return ops.matmul([[1.0, 2.0]], tf.ones((2, 2))) + ops.dot(2.0, x)

    np.testing.assert_array_equal(Lists(dtype="dfp16")(tf.ones((1, 2))), [[5, 5]])


def test_implicit_outer_products():
    class Implicit(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(2, 2))

        def call(self, x):
            return ops.einsum("i,j", x[0], x[0]) + ops.einsum("ij,jk", x, x)

    found = [f[1] for f in decisions(Implicit(dtype="dfp16"), normal(2, 2))]
    assert found == [False, True]


def test_layers_need_not_be_hashable():
    class Equal(layers.Dense):
        def __eq__(self, other):
            return True

    for policy in ("float32", "dfp16"):
        assert Equal(3, dtype=policy)(normal(2, 4)).shape == (2, 3)


def test_a_single_feature_times_a_variable_is_no_outer_product():
    assert [f[:2] for f in decisions(layers.Dense(3, dtype="dfp16"), normal(8, 1))] == [
        ("matmul", True)
    ]


def test_patches_as_a_node_of_a_functional_model():
    with keras_dfp.policy_scope(DFPPolicy(scope="all")):
        inputs = keras.Input((8, 8, 1))
        model = keras.Model(inputs, ops.image.extract_patches(inputs, 4))
    x = np.random.default_rng(0).integers(0, 40000, (1, 8, 8, 1)).astype("float32")
    truth = x.reshape(1, 2, 4, 2, 4, 1).transpose(0, 1, 3, 2, 4, 5).reshape(1, 2, 2, 16)
    np.testing.assert_array_equal(model(x), truth)


# --------------------------------------------------------------------------------------------- XLA


def compiled(*inner, policy="dfp16"):
    with keras_dfp.policy_scope(policy):
        model = keras.Sequential(
            [keras.Input((5, 4)), *(make() for make in inner), layers.Dense(1, dtype="float32")]
        )
    model.compile("sgd", "mse", jit_compile=True)
    return model


@pytest.mark.parametrize(
    "inner",
    [
        lambda: layers.ReLU(),
        lambda: Rotary(),
        lambda: layers.Dropout(0.1),
        lambda: layers.Lambda(lambda x: ops.matmul(x, ops.transpose(x, (0, 2, 1)))),
    ],
)
def test_layers_that_multiply_nothing_on_integers_leave_xla_alone(inner):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = compiled(inner)
    assert model.jit_compile


def attention_node():
    inputs = keras.Input((5, 4))
    x = ops.reshape(inputs, (-1, 5, 1, 4))
    return keras.Model(inputs, ops.reshape(ops.dot_product_attention(x, x, x), (-1, 5, 4)))


@pytest.mark.parametrize(
    "inner",
    [
        lambda: layers.Lambda(lambda x: ops.dot_product_attention(*[x[:, :, None]] * 3)[:, :, 0]),
        lambda: Operator(lambda x, w: x @ w),
        attention_node,
    ],
)
def test_integers_never_reach_xla(inner):
    with pytest.warns(UserWarning, match="jit_compile"):
        model = compiled(inner)
    assert not model.jit_compile
    model.fit(normal(4, 5, 4), np.ones((4, 5, 1)), verbose=0)


def test_a_subclassed_model_that_multiplies_by_a_variable_never_reaches_xla():
    with keras_dfp.policy_scope("dfp16"):
        model = Tied()
    model.embedding.dtype_policy = "float32"
    model(np.ones((2, 3), "int32"))
    with pytest.warns(UserWarning, match="jit_compile"):
        model.compile("sgd", "mse", jit_compile=True)
    assert [row["format"] for row in keras_dfp.describe(model).rows] == [DFPFormat()]
