"""A layer of one's own that runs on integers, and how to see that it does.

What it needs: weights, and products through `keras.ops` (or `x @ w`). TensorFlow's own functions
stay float32; `describe` finds them, and says what to write instead.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import keras_dfp


class Bilinear(keras.layers.Layer):
    """Every pair of inputs, weighted, through a bottleneck: `((x @ u) * (x @ v)) @ w`."""

    def __init__(self, units: int, rank: int, **kwargs):
        super().__init__(**kwargs)
        self.units, self.rank = units, rank

    def build(self, shape):
        self.u = self.add_weight(shape=(shape[-1], self.rank), name="u")
        self.v = self.add_weight(shape=(shape[-1], self.rank), name="v")
        self.w = self.add_weight(shape=(self.rank, self.units), name="w")

    def call(self, x):
        pairs = ops.matmul(x, self.u) * ops.matmul(x, self.v)
        return ops.matmul(pairs, self.w)

    def get_config(self):
        return {**super().get_config(), "units": self.units, "rank": self.rank}


class Unreached(Bilinear):
    """The same through TensorFlow, where no policy of Keras reaches it."""

    def call(self, x):
        pairs = tf.matmul(x, self.u) * tf.matmul(x, self.v)
        return tf.matmul(pairs, self.w)


def network(layer: type[Bilinear]) -> keras.Model:
    return keras.Sequential([keras.Input((16,)), layer(1, rank=8, name="pairs")])


def main() -> None:
    keras.utils.set_random_seed(1)
    keras_dfp.set_policy("dfp16")
    model = network(Bilinear)
    (row,) = keras_dfp.describe(model).rows
    if row["format"] is None:
        raise SystemExit(f"{row['path']} runs in float32: {row['reason']}")
    print(keras_dfp.describe(model), "\n")
    print(keras_dfp.describe(network(Unreached)), "\n")

    # It learns a product of two of its inputs, which no sum of them is.
    x = np.random.default_rng(1).normal(size=(4096, 16)).astype("float32")
    y = x[:, 3] * x[:, 7]
    model.compile(keras_dfp.optimizers.DFPAdam(1e-2), "mse")
    print(keras_dfp.audit(model, x[:64], y[:64]), "\n")
    model.fit(x[:3584], y[:3584], batch_size=64, epochs=20, verbose=0)
    error = model.evaluate(x[3584:], y[3584:], verbose=0)
    print(f"mean squared error {error:.1e}; of the mean alone {y[3584:].var():.2f}")


if __name__ == "__main__":
    main()
