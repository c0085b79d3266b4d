"""The plugin: what Keras's TensorFlow backend does differently under a DFPPolicy.

Keras layers multiply through a handful of functions of Keras's backend. Each is replaced by a
dispatcher, which asks the calling layer's dtype policy what to do:

    Dense.call -> keras.ops.matmul -> keras.src.backend.numpy.matmul
                                               |
                         products.py:      dispatch
                         calling.py:    calling_layer()   innermost layer on Keras's name scopes
                         calling.py:    decide(layer)     layer.dtype_policy: a format, or FP32
                                        in_scope(...)     does it take this product of the layer?
                                         /          \\
                            keras_dfp.ops.matmul    Keras's own matmul

So every layer that multiplies through Keras is reached, nobody's layer class is replaced, and a
layer with another policy computes exactly what it computes without the plugin.

    registry.py    the one list of what is replaced; install, uninstall
    calling.py     who is calling, and what its policy decides
    inputs.py      what a model was last called with
    products.py    the dispatchers: convolutions, matmul, einsum, attention
    attention.py   what masks hide does not decide exponents
    normalization.py   batch norm, biases and residual sums on native ops
    rnn.py         constants of a recurrent loop are quantized before it
    remat.py       recomputation and custom gradients keep their policy
    losses.py      a warning where an operand loses much of itself
    distribution.py    `fit` on several machines
    jit.py         no XLA for layers on integers
    leaving.py     exports are float32, or say what they need
    recording.py   watches a trace: products, operands, batch norm; for `describe`

To do one more thing differently, decorate `make(original) -> replacement` with
`registry.replaces(owner, name, parameters)`; what is not public in Keras is found in
`keras_dfp.internals`. `keras_dfp.policy`, `keras_dfp.model_policy` and `keras_dfp.saving` add the
entries that concern policies.
"""

from keras_dfp.backend import attention as attention
from keras_dfp.backend import distribution as distribution
from keras_dfp.backend import inputs as inputs
from keras_dfp.backend import jit as jit
from keras_dfp.backend import leaving as leaving
from keras_dfp.backend import normalization as normalization
from keras_dfp.backend import products as products
from keras_dfp.backend import remat as remat
from keras_dfp.backend import rnn as rnn
from keras_dfp.backend.registry import check as check
from keras_dfp.backend.registry import install as install
from keras_dfp.backend.registry import installed as installed
from keras_dfp.backend.registry import uninstall as uninstall
