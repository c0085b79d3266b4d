"""Layers that the networks of the zoo need and Keras does not have."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="keras_dfp")
class LocalResponseNormalization(keras.layers.Layer):
    """Divides each value by a power of the energy of the channels around it.

    `y[c] = x[c] / (bias + alpha * sum(x[c-r : c+r+1] ** 2)) ** beta`, with `r = depth_radius`:
    section 3.3 of Krizhevsky et al. (2012), whose constants are the defaults. Computed in float32
    under every dtype policy.

    Args:
        depth_radius: Channels on either side that count.
        bias: What is added to the sum.
        alpha: What the sum is multiplied by. Caffe's is divided by the `2 * r + 1` channels first.
        beta: The power.

    Input and output: 4D tensors of the same shape, channels last.
    """

    def __init__(
        self,
        depth_radius: int = 2,
        bias: float = 2.0,
        alpha: float = 1e-4,
        beta: float = 0.75,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.depth_radius = depth_radius
        self.bias = bias
        self.alpha = alpha
        self.beta = beta
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def call(self, inputs):
        outputs = tf.nn.local_response_normalization(
            tf.cast(inputs, "float32"), self.depth_radius, self.bias, self.alpha, self.beta
        )
        return tf.cast(outputs, inputs.dtype)

    def of_keras_ops(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        """Returns the same as a graph of `keras.ops`, which loads where keras_dfp is not installed.

        It is slower, and rounds differently in the last bits.
        """
        radius, channels = self.depth_radius, inputs.shape[-1]
        squares = keras.ops.pad(keras.ops.square(inputs), [[0, 0]] * 3 + [[radius, radius]])
        energy = squares[..., :channels]
        for shift in range(1, 2 * radius + 1):
            energy = energy + squares[..., shift : shift + channels]
        return inputs / keras.ops.power(self.bias + self.alpha * energy, self.beta)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "depth_radius": self.depth_radius,
            "bias": self.bias,
            "alpha": self.alpha,
            "beta": self.beta,
        }
