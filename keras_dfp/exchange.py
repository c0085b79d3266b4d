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


def summed(
    gradients: Sequence[tf.Tensor | None], exchange: str, others: Sequence[tf.Tensor] = ()
) -> list[tf.Tensor | None]:
    """Returns the sums of gradients over all replicas; to be called in each of them.

    Args:
        gradients: Those of this replica: tensors, of equal shapes in all replicas, or `None`.
        exchange: `"float32"`: they travel as they are. `"dfp16"`: float32 gradients travel as
            16-bit integers.
        others: Other float32 tensors to be added up, as they are, which travel along: a collective
            takes milliseconds however little it carries.

    Returns:
        Their sums, the same in every replica: first those of the gradients. Sparse gradients are
        dense then. Of a single replica, what it has.
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return [*gradients, *others]
    known = [number for number, gradient in enumerate(gradients) if gradient is not None]
    # `identity`: a tensor that comes from outside of the replica is on no device.
    dense = [tf.identity(tf.convert_to_tensor(gradients[number])) for number in known]
    others = [tf.identity(other) for other in others]
    if exchange == "dfp16":
        sums = _integers(context, dense, others)
    else:
        sums = context.all_reduce(_SUM, [*dense, *others]) if dense or others else []
    result: list[tf.Tensor | None] = [None] * len(gradients)
    for number, total in zip(known, sums[: len(known)], strict=True):
        result[number] = total
    return result + sums[len(known) :]


def leave_as_they_are(optimizer: keras.Optimizer) -> None:
    """Keeps an optimizer of Keras from adding up over replicas what is a sum already."""
    if isinstance(internals.sum_gradients, type):  # It was not found.
        raise internals.unknown(f"{internals.sum_gradients.__doc__} does not exist")
    optimizer._all_reduce_sum_gradients = lambda grads_and_vars: grads_and_vars


def _integers(context, gradients: list[tf.Tensor], others: list[tf.Tensor]) -> list[tf.Tensor]:
    wrong = [x for x in gradients if x.dtype != tf.float32]
    if wrong:
        raise TypeError(
            "gradient_exchange='dfp16' is for float32 gradients; got one of "
            f"{wrong[0].dtype.name}, of shape {tuple(wrong[0].shape)}."
        )
    if not gradients:
        return context.all_reduce(_SUM, others) if others else []
    native.follow_thread_setting()
    replicas = context.num_replicas_in_sync
    bits = mantissa_bits(replicas)
    # Of two collectives, this is the one whose numbers are float32.
    own = tf.stack([_quantize(x, bits).e for x in gradients])
    everyone, *others = context.all_reduce(_SUM, [_row(context, own, replicas), *others])
    exponents = _agreed(everyone)
    mantissas = [
        tf.reshape(_quantize(x, bits, exponents[number]).q, [-1])
        for number, x in enumerate(gradients)
    ]
    total = unpack(context.all_reduce(_SUM, pack(tf.concat(mantissas, 0))))
    pieces = tf.split(total[: sum(_size(x) for x in gradients)], [_size(x) for x in gradients])
    sums = [
        native.lib.dfp_dequantize(
            q=tf.reshape(piece, x.shape), e=exponents[number], token=tf.zeros([0])
        )
        for number, (piece, x) in enumerate(zip(pieces, gradients, strict=True))
    ]
    return [*sums, *others]


def _row(context, exponents: tf.Tensor, replicas: int) -> tf.Tensor:
    """Returns a table with a replica's exponents in its own row: what others leave 0."""
    # TensorFlow's strategies add up and nothing else. Exponents, and NAN_EXPONENT, are float32s.
    mine = tf.one_hot(context.replica_id_in_sync_group, replicas)
    return mine[:, None] * tf.cast(exponents, tf.float32)[None, :]


def _agreed(everyone: tf.Tensor) -> tf.Tensor:
    """Returns the largest of the replicas' exponents; that of a NaN where one has a NaN."""
    everyone = tf.cast(everyone, tf.int32)
    has_nan = tf.reduce_any(everyone == NAN_EXPONENT, axis=0)
    return tf.where(has_nan, NAN_EXPONENT, tf.reduce_max(everyone, axis=0))


def pack(mantissas: tf.Tensor) -> tf.Tensor:
    """Returns int16 `[n]` as int32 `[ceil(n / 2)]`: numbers `first + 65536 * second`.

    `first` are the first half of all mantissas, `second` the other, with a 0 if n is odd: two runs
    through memory, where neighbours would be picked out one by one. They are not put beside each
    other bit by bit but added, so that the sum of such numbers is that of the sums, with the borrow
    that a negative `first` takes from `second`.
    """
    padded = tf.pad(mantissas, [[0, tf.shape(mantissas)[0] % 2]])
    first, second = tf.split(tf.cast(padded, tf.int32), 2)
    return first + 65536 * second


def unpack(packed: tf.Tensor) -> tf.Tensor:
    """Returns the mantissas, int16; they are right if they fit into 16 bits."""
    second = tf.bitwise.right_shift(packed + 2**15, 16)
    first = packed - 65536 * second
    return tf.concat([tf.cast(first, tf.int16), tf.cast(second, tf.int16)], 0)


def _quantize(x: tf.Tensor, bits: int, exponent: tf.Tensor | None = None):
    return native.lib.dfp_quantize(
        x=x, exponent=[] if exponent is None else [exponent], step=[], mantissa_bits=bits,
        rounding="nearest", seed=0, group_axes=0, n_counts=0,
    )  # fmt: skip


def _size(x: tf.Tensor) -> int:
    return x.shape.num_elements()
