"""Teaches a small transformer to sort: from eight digits in any order to the same in order.

Attention, embeddings, layer norm and the layers around them are Keras's own; under the policy
every product with weights, and both products of attention, run on integers.
"""

import argparse

import keras
import numpy as np
from keras import layers

import keras_dfp

LENGTH, WIDTH, HEADS = 8, 64, 4


def examples(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    digits = np.random.default_rng(seed).integers(0, 10, (n, LENGTH))
    return digits, np.sort(digits, axis=1)


def block(x: keras.KerasTensor) -> keras.KerasTensor:
    y = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, y)
    y = layers.LayerNormalization()(x)
    return x + layers.Dense(WIDTH)(layers.Dense(2 * WIDTH, activation="relu")(y))


def transformer() -> keras.Model:
    tokens = keras.Input((LENGTH,), dtype="int32")
    places = layers.Embedding(LENGTH, WIDTH)(keras.ops.arange(LENGTH))
    x = layers.Embedding(10, WIDTH)(tokens) + places
    for _ in range(2):
        x = block(x)
    return keras.Model(tokens, layers.Dense(10)(layers.LayerNormalization()(x)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="dfp16", help="float32, dfp16 or dfp16_paper")
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()

    keras.utils.set_random_seed(1)
    keras_dfp.set_policy(args.policy)
    model = transformer()
    print(keras_dfp.describe(model), "\n")
    model.compile(
        keras.optimizers.Adam(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(*examples(16_384, seed=1), batch_size=64, epochs=args.epochs, verbose=2)

    digits, ordered = examples(1_000, seed=2)
    answers = model.predict(digits, verbose=0).argmax(axis=-1)
    right = np.mean(np.all(answers == ordered, axis=1))
    print(f"\n{''.join(map(str, digits[0]))} -> {''.join(map(str, answers[0]))}")
    print(f"{right:.1%} of 1,000 new sequences sorted without a mistake")


if __name__ == "__main__":
    main()
