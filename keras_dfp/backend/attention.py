"""Attention layers: what their masks hide from everybody is hidden from the exponents too.

Where they call `keras.ops.dot_product_attention`, `keras_dfp.ops` looks after its mask. They also
multiply in other ways, on which mask and values do not meet.
"""

import functools
import string

import tensorflow as tf
from keras import layers

from keras_dfp.attention import Seen
from keras_dfp.backend.calling import calling_layer, decide
from keras_dfp.backend.registry import replaces
from keras_dfp.internals import KERAS


def _on_integers() -> bool:
    return decide(calling_layer()).format is not None


_ARGUMENTS = "self query key value attention_mask ..."


@replaces(
    layers.MultiHeadAttention,
    "_compute_attention",
    _ARGUMENTS,
    called_by=layers.MultiHeadAttention.call,
)
@replaces(
    layers.GroupQueryAttention,
    "_compute_attention",
    _ARGUMENTS,
    called_by=layers.GroupQueryAttention.call,
)
def _many_heads(original):
    @functools.wraps(original)
    def _compute_attention(self, query, key, value, attention_mask=None, *args, **kwargs):
        if attention_mask is None or not _on_integers():
            return original(self, query, key, value, attention_mask, *args, **kwargs)
        terms, output = self._combine_equation.split("->")
        logits, source = terms.split(",")
        mask = tf.cast(attention_mask, tf.bool)
        # A mask without an axis for the heads has its other axes around it, as Keras reads it.
        pairs = 2 * len([label for label in source if label not in output])
        for _ in range(len(logits) - mask.shape.rank):
            mask = tf.expand_dims(mask, -pairs - 1)
        seen = Seen(mask, logits)
        hidden = seen.hide(query, output), seen.hide(key, source), seen.hide(value, source)
        y, scores = original(self, *hidden, attention_mask, *args, **kwargs)
        if scores is None:
            # `dot_product_attention`: elsewhere, a query that sees nothing has no scores but zeros.
            y = seen.or_mean(y, output, value, source)
        return y, scores

    return _compute_attention


@replaces(layers.Attention, "call", "self inputs mask ...")
def _call(original):
    """Hides keys; the values are left to `_apply_scores`, which knows all of the mask."""

    @functools.wraps(original)
    def call(self, inputs, mask=None, *args, **kwargs):
        self._validate_inputs(inputs=inputs, mask=mask)
        if mask and mask[1] is not None and _on_integers():
            query, value, *key = inputs
            seen = tf.cast(mask[1], tf.bool)[..., tf.newaxis]
            key = key[0] if key else value
            inputs = [query, value, tf.where(seen, key, tf.zeros([], key.dtype))]
        return original(self, inputs, mask, *args, **kwargs)

    return call


@replaces(
    layers.Attention,
    "_apply_scores",
    "self scores value scores_mask training",
    called_by=layers.Attention.call,
)
def _one_head(original):
    @functools.wraps(original)
    def _apply_scores(self, scores, value, scores_mask=None, training=False):
        if scores_mask is None or not _on_integers():
            return original(self, scores, value, scores_mask, training)
        mask = tf.cast(scores_mask, tf.bool)
        if mask.shape.rank == 2:
            mask = mask[:, tf.newaxis]
        batch = string.ascii_uppercase[: scores.shape.rank - 2]
        seen = Seen(mask, f"{batch}ts")
        hidden = seen.hide(value, f"{batch}sh")
        y, weights = original(self, scores, hidden, scores_mask, training)
        if KERAS >= (3, 16):
            # There, a query that sees nothing gets zeros.
            return y, weights
        return seen.or_mean(y, f"{batch}th", value, f"{batch}sh"), weights

    return _apply_scores
