"""Masked attention: what nobody sees, whatever it holds, changes no bit of the rest."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_dfp import DFPPolicy, backend, ops
from keras_dfp.attention import Seen

# Batch, queries, keys, heads, features of a head.
B, T, S, N, H = 3, 5, 7, 4, 8
PADDING = (0.0, -10.0, -999.0, 1e5, 1e30, np.nan)


def random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def valid(*lengths, size=S):
    """True for the first positions of each sample."""
    return np.arange(size) < np.array(lengths)[:, np.newaxis]


LENGTHS = valid(4, 7, 2)
CAUSAL = np.tril(np.ones((T, S), bool))
QUERIES = valid(3, 5, 1, size=T)[:, np.newaxis, :, np.newaxis]

MASKS = {
    "keys": LENGTHS[:, np.newaxis, np.newaxis],
    "keys of all samples": valid(4)[0],
    "keys and queries": LENGTHS[:, np.newaxis, np.newaxis] & QUERIES,
    "queries": np.broadcast_to(QUERIES, (B, 1, T, 1)),
    "causal": LENGTHS[:, np.newaxis, np.newaxis] & CAUSAL,
    "causal, keys at the end": LENGTHS[:, np.newaxis, np.newaxis, ::-1] & CAUSAL,
    "random": np.random.default_rng(0).random((B, 1, T, S)) < 0.3,
    "heads": LENGTHS[:, np.newaxis, np.newaxis] & valid(7, 5, 3, 7)[np.newaxis, :, np.newaxis],
    "nothing": np.zeros((1, 1, 1, 1), bool),
}


def differentiated(function, dy):
    """Returns a function that returns the output of `function`, and its gradients for `dy`."""

    def run(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = function(*inputs)
        return [y, *tape.gradient(y, inputs, tf.constant(dy))]

    return run


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("kind", MASKS)
def test_what_nobody_sees_changes_no_bit(kind, kv_heads):
    full = np.broadcast_to(MASKS[kind], (B, N, T, S))
    per_kv_head = full.reshape(B, kv_heads, -1, T, S).any((2, 3))
    seen, sees = per_kv_head.swapaxes(1, 2)[..., np.newaxis], full.any(3).swapaxes(1, 2)
    sees = sees[..., np.newaxis]
    q, k, v = random(B, T, N, H), random(B, S, kv_heads, H, seed=1), random(B, S, kv_heads, H)
    dy = np.where(sees, random(B, T, N, H, seed=2), 0)

    def attend(q, k, v):
        return ops.dot_product_attention(q, k, v, mask=MASKS[kind])

    def stock(q, k, v):
        k, v = (tf.repeat(x, N // kv_heads, axis=2) for x in (k, v))
        return keras.ops.dot_product_attention(q, k, v, mask=MASKS[kind])

    inputs = [tf.constant(x) for x in (q, k, v)]
    clean = differentiated(attend, dy)(*inputs)
    close(clean, differentiated(stock, dy)(*inputs), 5e-3)
    run = tf.function(differentiated(attend, dy))
    for padding in PADDING:
        padded = [np.where(sees, q, padding), *(np.where(seen, x, padding) for x in (k, v))]
        y, *gradients = run(*(tf.constant(x, tf.float32) for x in padded))
        same([np.where(sees, y, 0), *gradients], [np.where(sees, clean[0], 0), *clean[1:]])


@pytest.mark.parametrize("kind", MASKS)
def test_a_query_that_sees_nothing_gets_the_mean_of_all_values(kind):
    q, k, v = random(B, T, N, H), random(B, S, N, H, seed=1), random(B, S, N, H)
    v[2, 5] = 100.0
    arguments = {"mask": MASKS[kind], "is_causal": True}
    dy = random(B, T, N, H, seed=2)
    found, expected = (
        differentiated(lambda *x, f=f: f(*x, **arguments), dy)(*map(tf.constant, (q, k, v)))
        for f in (ops.dot_product_attention, keras.ops.dot_product_attention)
    )
    close(found, expected, 5e-3)


def test_a_mask_that_does_not_fit_is_refused():
    x = tf.ones((1, 2, 1, 2))
    with pytest.raises(ValueError, match=r"broadcastable to its 4-D logits; received .*1, 1, 2, 2"):
        ops.dot_product_attention(x, x, x, mask=np.ones((1, 1, 1, 2, 2), bool))
    with pytest.raises(ValueError, match="broadcastable"):
        Seen(tf.zeros((2, 2), tf.bool), "s")


# ---- layers --------------------------------------------------------------------------------------


class Subclass(layers.MultiHeadAttention):
    def _compute_attention(self, query, key, value, *args, **kwargs):
        return super()._compute_attention(2 * query, key, value, *args, **kwargs)


# Attention's own products run on integers; the projections, whose rows are another matter, do not.
ALONE = DFPPolicy(exclude=["query", "key", "value", "attention_output"])
MHA, GQA = layers.MultiHeadAttention, layers.GroupQueryAttention
MANY_HEADS = {
    "MultiHeadAttention": lambda p: MHA(2, 8, dtype=p),
    "MultiHeadAttention dropout": lambda p: MHA(2, 8, dropout=0.5, dtype=p),
    "MultiHeadAttention value_dim": lambda p: MHA(2, 8, value_dim=6, dropout=0.5, dtype=p),
    "subclass": lambda p: Subclass(2, 8, dropout=0.5, dtype=p),
    "GroupQueryAttention": lambda p: GQA(8, 4, 2, dtype=p),
    "GroupQueryAttention dropout": lambda p: GQA(8, 4, 2, dropout=0.5, dtype=p),
}
SOME_QUERIES = valid(3, 5, 1, size=T)
ARGUMENTS = {
    "value mask": {"value_mask": LENGTHS},
    "query and value mask": {"value_mask": LENGTHS, "query_mask": SOME_QUERIES},
    "attention mask": {"attention_mask": np.repeat(LENGTHS[:, np.newaxis], T, axis=1)},
    "numbers": {"attention_mask": LENGTHS[:, np.newaxis].astype("float32")},
    "causal": {"value_mask": LENGTHS, "use_causal_mask": True},
    "scores": {"value_mask": LENGTHS, "return_attention_scores": True},
}


def layer_results(make, policy, call, paddings):
    """Returns, for each padding of the values, output and gradients for queries and values."""
    keras.utils.set_random_seed(0)
    layer = make(policy)
    query, value = random(B, T, 16), random(B, S, 16, seed=1)
    run = differentiated(lambda *inputs: call(layer, *inputs), random(B, T, 16, seed=2))
    run(tf.constant(query), tf.constant(value))
    run = tf.function(run)
    padded = [np.where(LENGTHS[..., np.newaxis], value, np.float32(x)) for x in paddings]
    return [[x.numpy() for x in run(tf.constant(query), tf.constant(value))] for value in padded]


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("kind", MANY_HEADS)
def test_padding_changes_no_bit_of_many_heads(kind, arguments):
    def call(layer, query, value):
        result = layer(query, value, **ARGUMENTS[arguments])
        return result[0] if isinstance(result, tuple) else result

    # A query that sees nothing gets the mean of all, as from Keras; the others are untouched.
    queries = SOME_QUERIES if arguments.startswith("query") else np.ones((B, T), bool)
    # Beyond 1e9 the masks of earlier Keras versions, which subtract that, mask nothing.
    stock = layer_results(MANY_HEADS[kind], "float32", call, PADDING[:-2])
    clean, *others = layer_results(MANY_HEADS[kind], ALONE, call, PADDING)
    for y, dquery, dvalue in others:
        same(
            [y[queries], dquery, dvalue[LENGTHS]], [clean[0][queries], clean[1], clean[2][LENGTHS]]
        )
    for y, dquery, dvalue in stock:
        close([clean[0][queries], *clean[1:]], [y[queries], dquery, dvalue], 5e-3)


def test_padding_changes_no_bit_of_attention_over_several_axes():
    def results(policy, padding):
        keras.utils.set_random_seed(0)
        layer = MHA(2, 4, attention_axes=(2, 3), dtype=policy)
        query, value = random(2, 3, 2, 4, 8), random(2, 3, 2, 5, 8, seed=1)
        seen = random(2, 1, 2, 5, seed=2) > 0
        value = np.where(seen[..., np.newaxis], value, np.float32(padding))
        mask = np.broadcast_to(seen[:, :, np.newaxis, np.newaxis], (2, 3, 2, 4, 2, 5))
        return layer(query, value, attention_mask=mask).numpy()

    clean = results(ALONE, 0.0)
    for padding in PADDING:
        np.testing.assert_array_equal(results(ALONE, padding), clean)
    for padding in PADDING[:-2]:
        np.testing.assert_allclose(clean, results("float32", padding), atol=5e-3)


ONE_HEAD = {
    "Attention": lambda p: layers.Attention(dtype=p),
    "Attention scale": lambda p: layers.Attention(use_scale=True, dropout=0.5, dtype=p),
    "AdditiveAttention": lambda p: layers.AdditiveAttention(dtype=p),
}


@pytest.mark.parametrize("with_key", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ONE_HEAD)
def test_padding_changes_no_bit_of_one_head(kind, causal, with_key):
    if not causal and keras.__version__.startswith("3.10."):
        # 3.10 takes a mask of rank 2 for one of queries; there is no stock layer to agree with.
        pytest.skip("this Keras misreads the mask")

    def call(layer, query, value):
        inputs = [query, value, tf.identity(value)] if with_key else [query, value]
        masks = [None, tf.constant(LENGTHS)]
        return layer(inputs, mask=masks, use_causal_mask=causal)

    clean, *others = layer_results(ONE_HEAD[kind], ALONE, call, PADDING)
    for found in others:
        same(found, clean)
    for stock in layer_results(ONE_HEAD[kind], "float32", call, PADDING[:-2]):
        close(clean, stock, 5e-3)


def test_one_head_with_nothing_to_see_gets_what_keras_gives_it():
    x, mask = random(2, 4, 8), np.array([[False] * 4, [False, True, True, False]])
    x[1, 0] = 3.0

    def call(policy):
        layer = layers.Attention(dtype=policy)
        return layer([0.1 * x, x], mask=[None, mask], use_causal_mask=True).numpy()

    np.testing.assert_allclose(call("dfp16"), call("float32"), atol=1e-2)


def test_float32_layers_are_bit_identical_with_and_without_the_plugin():
    def call(layer, query, value):
        if isinstance(layer, layers.Attention):
            masks = [None, tf.constant(LENGTHS)]
            return layer([query, value], mask=masks, use_causal_mask=True)
        return layer(query, value, value_mask=LENGTHS)

    def results():
        kinds = (*MANY_HEADS.values(), *ONE_HEAD.values())
        return sum((layer_results(make, "float32", call, [-999.0])[0] for make in kinds), [])

    with_plugin = results()
    backend.uninstall()
    try:
        without = results()
    finally:
        backend.install()
    for a, b in zip(with_plugin, without, strict=True):
        assert a.tobytes() == b.tobytes()
