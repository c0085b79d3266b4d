"""Sums of gradients over the replicas of a distribution strategy: in float32, or as integers.

In float32 it is TensorFlow's own all-reduce, whose result depends on the order in which replicas
are added up. In dfp16 (docs/numerics.md, "Gradients of several workers"; `reference.exchange`) the
replicas agree on an exponent for each gradient and send 16-bit integers, two of them in an int32,
because TensorFlow's collectives have no int16. Integers have one sum in any order.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_dfp import internals, native
from keras_dfp.number import NAN_EXPONENT

EXCHANGES = ("float32", "dfp16")
_SUM = tf.distribute.ReduceOp.SUM
# With more, fewer than 8 bits would be left for each.
MOST_REPLICAS = 256


def check(exchange: str, owner: str) -> None:
    """Raises ValueError unless there is such an exchange."""
    if exchange not in EXCHANGES:
        raise ValueError(
            f"{owner}: gradient_exchange must be {' or '.join(map(repr, EXCHANGES))}; "
            f"got {exchange!r}."
        )


def mantissa_bits(replicas: int) -> int:
    """Returns how many bits mantissas may have whose sum over replicas is to fit into 16.

    Args:
        replicas: How many there are.

    Returns:
        `min(14, 16 - ceil(log2(replicas)))`.

    Raises:
        ValueError: If that would be fewer than 8.
    """
    if replicas > MOST_REPLICAS:
        raise ValueError(
            f"gradient_exchange='dfp16' is for up to {MOST_REPLICAS} replicas; got {replicas}. "
            "Choose 'float32'."
        )
    return min(14, 16 - (replicas - 1).bit_length())


def summed(gradients: Sequence[tf.Tensor | None], exchange: str) -> list[tf.Tensor | None]:
    """Returns the sums of gradients over all replicas; to be called in each of them.

    Args:
        gradients: Those of this replica: tensors, of equal shapes in all replicas, or `None`.
        exchange: `"float32"`: they travel as they are. `"dfp16"`: float32 gradients travel as
            16-bit integers.

    Returns:
        Their sums, the same in every replica. Sparse gradients are dense then. Of a single replica,
        its gradients.
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return list(gradients)
    known = [number for number, gradient in enumerate(gradients) if gradient is not None]
    # `identity`: a tensor that comes from outside of the replica is on no device.
    dense = [tf.identity(tf.convert_to_tensor(gradients[number])) for number in known]
    if exchange == "dfp16":
        sums = _integers(context, dense)
    else:
        sums = context.all_reduce(_SUM, dense) if dense else []
    result: list[tf.Tensor | None] = [None] * len(gradients)
    for number, total in zip(known, sums, strict=True):
        result[number] = total
    return result


def leave_as_they_are(optimizer: keras.Optimizer) -> None:
    """Keeps an optimizer of Keras from adding up over replicas what is a sum already."""
    if isinstance(internals.sum_gradients, type):  # It was not found.
        raise internals.unknown(f"{internals.sum_gradients.__doc__} does not exist")
    optimizer._all_reduce_sum_gradients = lambda grads_and_vars: grads_and_vars


def _integers(context, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
    others = [x for x in gradients if x.dtype != tf.float32]
    if others:
        raise TypeError(
            "gradient_exchange='dfp16' is for float32 gradients; got one of "
            f"{others[0].dtype.name}, of shape {tuple(others[0].shape)}."
        )
    if not gradients:
        return []
    native.follow_thread_setting()
    replicas = context.num_replicas_in_sync
    bits = mantissa_bits(replicas)
    exponents = _agreed(context, tf.stack([_quantize(x, bits).e for x in gradients]), replicas)
    mantissas = [
        tf.reshape(_quantize(x, bits, exponents[number]).q, [-1])
        for number, x in enumerate(gradients)
    ]
    total = unpack(context.all_reduce(_SUM, pack(tf.concat(mantissas, 0))))
    pieces = tf.split(total[: sum(_size(x) for x in gradients)], [_size(x) for x in gradients])
    return [
        native.lib.dfp_dequantize(
            q=tf.reshape(piece, x.shape), e=exponents[number], token=tf.zeros([0])
        )
        for number, (piece, x) in enumerate(zip(pieces, gradients, strict=True))
    ]


def _agreed(context, exponents: tf.Tensor, replicas: int) -> tf.Tensor:
    """Returns the largest of the replicas' exponents; that of a NaN where one has a NaN."""
    # TensorFlow's strategies add up and nothing else: so each adds a row that the others leave 0.
    mine = tf.one_hot(context.replica_id_in_sync_group, replicas, dtype=tf.int32)
    everyone = context.all_reduce(_SUM, mine[:, None] * exponents[None, :])
    has_nan = tf.reduce_any(everyone == NAN_EXPONENT, axis=0)
    return tf.where(has_nan, NAN_EXPONENT, tf.reduce_max(everyone, axis=0))


def pack(mantissas: tf.Tensor) -> tf.Tensor:
    """Returns int16 `[n]` as int32 `[ceil(n / 2)]`: the number `first + 65536 * second`.

    They are not put beside each other bit by bit but added, so that the sum of such numbers is that
    of the sums, with the borrow that a negative first half takes from the second one.
    """
    both = tf.reshape(tf.pad(mantissas, [[0, tf.shape(mantissas)[0] % 2]]), [-1, 2])
    both = tf.cast(both, tf.int32)
    return both[:, 0] + 65536 * both[:, 1]


def unpack(packed: tf.Tensor) -> tf.Tensor:
    """Returns the two halves of each number, int16; they are right if they fit into 16 bits."""
    first = tf.bitwise.right_shift(tf.bitwise.left_shift(packed, 16), 16)
    second = tf.bitwise.right_shift(packed - first, 16)
    return tf.cast(tf.reshape(tf.stack([first, second], axis=1), [-1]), tf.int16)


def _quantize(x: tf.Tensor, bits: int, exponent: tf.Tensor | None = None):
    return native.lib.dfp_quantize(
        x=x, exponent=[] if exponent is None else [exponent], step=[], mantissa_bits=bits,
        rounding="nearest", seed=0, group_axes=0, n_counts=0,
    )  # fmt: skip


def _size(x: tf.Tensor) -> int:
    return x.shape.num_elements()
