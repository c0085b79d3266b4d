"""Keras's layers on integers, by name; and layers that the zoo needs and Keras does not have.

`DFPDense` is `keras.layers.Dense` whose policy, unless it is given another, is `"dfp16"`: for
models that mix policies by hand, and for files that say what they hold. To put a whole model on
integers no class has to be replaced: `keras_dfp.set_policy`, `keras_dfp.set_model_policy`.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_dfp.normalization import local_response
from keras_dfp.policy import DFPPolicy


class _OnIntegers:
    """Before a layer of Keras among the bases of a class: gives it a DFPPolicy by default.

    Args:
        dtype: The layer's policy, which may be any policy of Keras. `None`: the global one if it
            is a `DFPPolicy`, so that its options count for these layers as for all others; else
            `"dfp16"`, whatever the global policy is.
    """

    def __init__(self, *args, dtype=None, **kwargs):
        if dtype is None:
            dtype = keras.config.dtype_policy()
            if not isinstance(dtype, DFPPolicy):
                dtype = DFPPolicy()
        super().__init__(*args, dtype=dtype, **kwargs)


@keras.saving.register_keras_serializable(package="keras_dfp")
class LocalResponseNormalization(keras.layers.Layer):
    """Divides each value by a power of the energy of the channels around it.

    `y[c] = x[c] / (bias + alpha * sum(x[c-r : c+r+1] ** 2)) ** beta`, with `r = depth_radius`:
    section 3.3 of Krizhevsky et al. (2012), whose constants are the defaults. Computed in float32
    under every dtype policy by TensorFlow's op; under a `DFPPolicy`, if beta is 0.25, 0.5, 0.75 or
    1, by one of ours that has the same bits on every machine (docs/numerics.md) and is faster.

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
        x = tf.cast(inputs, "float32")
        how = self.depth_radius, self.bias, self.alpha
        if isinstance(self.dtype_policy, DFPPolicy) and 4 * self.beta in (1, 2, 3, 4):
            outputs = local_response(x, *how, quarters=int(4 * self.beta))
        else:
            outputs = tf.nn.local_response_normalization(x, *how, self.beta)
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


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPConv1D(_OnIntegers, keras.layers.Conv1D):
    """`keras.layers.Conv1D` on integers, with its arguments and results.

    Args:
        dtype: The layer's policy: `None` for the global one if it is a `DFPPolicy`, else
            `"dfp16"`; a policy that is given wins.

    Example:

    >>> layer = keras_dfp.layers.DFPConv1D(32, 3, padding="causal", activation="relu")
    """


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPConv2D(_OnIntegers, keras.layers.Conv2D):
    """`keras.layers.Conv2D` on integers, with its arguments and results.

    Args:
        dtype: The layer's policy: `None` for the global one if it is a `DFPPolicy`, else
            `"dfp16"`; a policy that is given wins.

    Example:

    >>> layer = keras_dfp.layers.DFPConv2D(64, 3, padding="same", activation="relu")
    """


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPConv3D(_OnIntegers, keras.layers.Conv3D):
    """`keras.layers.Conv3D` on integers, with its arguments and results.

    Args:
        dtype: The layer's policy: `None` for the global one if it is a `DFPPolicy`, else
            `"dfp16"`; a policy that is given wins.

    Example:

    >>> layer = keras_dfp.layers.DFPConv3D(16, 3, strides=2)
    """


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPDepthwiseConv1D(_OnIntegers, keras.layers.DepthwiseConv1D):
    """`keras.layers.DepthwiseConv1D` on integers, with its arguments and results.

    Args:
        dtype: The layer's policy: `None` for the global one if it is a `DFPPolicy`, else
            `"dfp16"`; a policy that is given wins.

    Example:

    >>> layer = keras_dfp.layers.DFPDepthwiseConv1D(5, padding="same")
    """


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPDepthwiseConv2D(_OnIntegers, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` on integers, with its arguments and results.

    Args:
        dtype: The layer's policy: `None` for the global one if it is a `DFPPolicy`, else
            `"dfp16"`; a policy that is given wins.

    Example:

    >>> layer = keras_dfp.layers.DFPDepthwiseConv2D(3, depth_multiplier=2)
    """


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPConv1DTranspose(_OnIntegers, keras.layers.Conv1DTranspose):
    """`keras.layers.Conv1DTranspose` on integers, with its arguments and results.

    Args:
        dtype: The layer's policy: `None` for the global one if it is a `DFPPolicy`, else
            `"dfp16"`; a policy that is given wins.

    Example:

    >>> layer = keras_dfp.layers.DFPConv1DTranspose(32, 4, strides=2)
    """


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPConv2DTranspose(_OnIntegers, keras.layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` on integers, with its arguments and results.

    Args:
        dtype: The layer's policy: `None` for the global one if it is a `DFPPolicy`, else
            `"dfp16"`; a policy that is given wins.

    Example:

    >>> layer = keras_dfp.layers.DFPConv2DTranspose(32, 4, strides=2, padding="same")
    """


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPConv3DTranspose(_OnIntegers, keras.layers.Conv3DTranspose):
    """`keras.layers.Conv3DTranspose` on integers, with its arguments and results.

    Args:
        dtype: The layer's policy: `None` for the global one if it is a `DFPPolicy`, else
            `"dfp16"`; a policy that is given wins.

    Example:

    >>> layer = keras_dfp.layers.DFPConv3DTranspose(8, 2, strides=2)
    """


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPSeparableConv1D(_OnIntegers, keras.layers.SeparableConv1D):
    """`keras.layers.SeparableConv1D` on integers, with its arguments and results.

    Both of its convolutions run on integers.

    Args:
        dtype: The layer's policy: `None` for the global one if it is a `DFPPolicy`, else
            `"dfp16"`; a policy that is given wins.

    Example:

    >>> layer = keras_dfp.layers.DFPSeparableConv1D(64, 5, padding="same")
    """


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPSeparableConv2D(_OnIntegers, keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D` on integers, with its arguments and results.

    Both of its convolutions run on integers.

    Args:
        dtype: The layer's policy: `None` for the global one if it is a `DFPPolicy`, else
            `"dfp16"`; a policy that is given wins.

    Example:

    >>> layer = keras_dfp.layers.DFPSeparableConv2D(128, 3, padding="same")
    """


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPDense(_OnIntegers, keras.layers.Dense):
    """`keras.layers.Dense` on integers, with its arguments and results.

    Args:
        dtype: The layer's policy: `None` for the global one if it is a `DFPPolicy`, else
            `"dfp16"`; a policy that is given wins.

    Example:

    >>> layer = keras_dfp.layers.DFPDense(10, dtype=keras_dfp.DFPPolicy(mantissa_bits=16))
    """


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPEinsumDense(_OnIntegers, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense` on integers, with its arguments and results.

    Args:
        dtype: The layer's policy: `None` for the global one if it is a `DFPPolicy`, else
            `"dfp16"`; a policy that is given wins.

    Example:

    >>> layer = keras_dfp.layers.DFPEinsumDense("btd,dhk->bthk", output_shape=(None, 8, 64))
    """


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPMultiHeadAttention(_OnIntegers, keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` on integers, with its arguments and results.

    Its projections and the products of attention run on integers; softmax is float32.

    Args:
        dtype: The layer's policy: `None` for the global one if it is a `DFPPolicy`, else
            `"dfp16"`; a policy that is given wins.

    Example:

    >>> layer = keras_dfp.layers.DFPMultiHeadAttention(num_heads=8, key_dim=64)
    """


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPLSTM(_OnIntegers, keras.layers.LSTM):
    """`keras.layers.LSTM` on integers, with its arguments and results.

    Its kernels are quantized once for all steps; gates and state are float32.

    Args:
        dtype: The layer's policy: `None` for the global one if it is a `DFPPolicy`, else
            `"dfp16"`; a policy that is given wins.

    Example:

    >>> layer = keras_dfp.layers.DFPLSTM(128, return_sequences=True)
    """


@keras.saving.register_keras_serializable(package="keras_dfp")
class DFPGRU(_OnIntegers, keras.layers.GRU):
    """`keras.layers.GRU` on integers, with its arguments and results.

    Its kernels are quantized once for all steps; gates and state are float32.

    Args:
        dtype: The layer's policy: `None` for the global one if it is a `DFPPolicy`, else
            `"dfp16"`; a policy that is given wins.

    Example:

    >>> layer = keras_dfp.layers.DFPGRU(128)
    """
