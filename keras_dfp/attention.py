"""Masked attention: a position that nobody sees does not decide the exponent that others share.

The sums of attention run over positions: the output's over those of the values, the gradients' over
those of keys and of queries. So these have to share an exponent, and padding, which may hold
anything, would decide how finely the rest is rounded. Its rows become zeros, which they are as good
as: the mask gives them no weight.
"""

from __future__ import annotations

import tensorflow as tf


class Seen:
    """Which keys the queries see. Axes carry labels, as in an einsum.

    Args:
        mask: Boolean tensor, True where a query sees a key; broadcastable to the logits.
        logits: The labels of the axes of the logits.

    Raises:
        ValueError: If the mask has more axes than the logits, or nobody knows how many.
    """

    def __init__(self, mask: tf.Tensor, logits: str):
        if mask.shape.rank is None or mask.shape.rank > len(logits):
            raise ValueError(
                f"keras_dfp: a mask for attention must be broadcastable to its {len(logits)}-D "
                f"logits; received shape {mask.shape}."
            )
        self.mask = mask
        self._labels = logits[len(logits) - mask.shape.rank :]

    def hide(self, x: tf.Tensor, labels: str) -> tf.Tensor:
        """Returns queries, keys or values with zeros for those that see, or are seen by, nobody."""
        return tf.where(self._any(labels), x, tf.zeros([], x.dtype))

    def or_mean(self, y: tf.Tensor, labels: str, values: tf.Tensor, value_labels: str) -> tf.Tensor:
        """Returns attention's output with the mean of all values for a query that sees nothing.

        That is what equal logits give it; the values that it is the mean of are hidden to others.
        """
        summed = [i for i, label in enumerate(value_labels) if label not in labels]
        mean = tf.reduce_mean(values, summed)
        kept = [label for label in value_labels if label in labels]
        return tf.where(self._any(labels), y, _spread(mean, kept, labels))

    def _any(self, labels: str) -> tf.Tensor:
        """Tells whether anything is seen, for all that these axes distinguish."""
        others = [i for i, label in enumerate(self._labels) if label not in labels]
        kept = [label for label in self._labels if label in labels]
        return _spread(tf.reduce_any(self.mask, others), kept, labels)


def _spread(x, axes, labels: str):
    """Lays out a tensor, whose axes are some of `labels`, to broadcast against all of them."""
    order = [label for label in labels if label in axes]
    x = tf.transpose(x, [axes.index(label) for label in order])
    return x[tuple(slice(None) if label in axes else tf.newaxis for label in labels)]
