"""Trains a small residual network for 20 steps on each set of kernels that it is told, and prints

    instruction set, threads, threads of this process, SHA-256 of all weights and losses

A process of its own, because TensorFlow's determinism cannot be switched off again:

    python tests/train_residual.py avx2:1 avx2:2 portable:4
"""

import hashlib
import os
import sys

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from kernels import running

import keras_dfp
from keras_dfp import native
from keras_dfp.native import extension


def network():
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(32, 3, padding="same")(inputs)
    for filters, stride in ((32, 1), (64, 2)):
        y = layers.BatchNormalization()(x)
        y = layers.ReLU()(y)
        shortcut = layers.Conv2D(filters, 1, stride)(y)
        y = layers.Conv2D(filters, 3, stride, padding="same")(y)
        y = layers.BatchNormalization()(y)
        y = layers.ReLU()(y)
        y = layers.DepthwiseConv2D(3, padding="same")(y)
        x = shortcut + layers.Conv2D(filters, 3, padding="same")(y)
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
    return keras.Model(inputs, layers.Dense(10)(x))


def main():
    keras.utils.set_random_seed(1)
    tf.config.experimental.enable_op_determinism()
    # TensorFlow's own threads stay what they are; two of them, so that ops of ours may meet.
    tf.config.threading.set_inter_op_parallelism_threads(2)
    tf.config.threading.set_intra_op_parallelism_threads(2)
    keras_dfp.set_policy("dfp16")
    model = network()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss)
    rng = np.random.default_rng(2)
    images = rng.standard_normal((20, 8, 16, 16, 3)).astype(np.float32)
    labels = rng.integers(0, 10, (20, 8))
    native.follow_thread_setting()  # now, and not while it traces
    with running(extension.isa(), 1):
        model.train_on_batch(images[0], labels[0])
    variables = [*model.variables, *model.optimizer.variables]
    start = [v.numpy() for v in variables]
    for run in sys.argv[1:]:
        isa, threads = run.split(":")
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        with running(isa, int(threads)):
            losses = [model.train_on_batch(x, y) for x, y in zip(images, labels, strict=True)]
        digest = hashlib.sha256(np.float32(losses).tobytes())
        for variable in variables:
            digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
        assert np.isfinite(losses).all() and losses[-1] != losses[0]
        print(isa, threads, len(os.listdir("/proc/self/task")), digest.hexdigest(), flush=True)


if __name__ == "__main__":
    main()
