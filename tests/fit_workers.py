"""Trains with `fit` in MultiWorkerMirroredStrategy, MirroredStrategy or none; prints what it got.

Arguments: "workers", "mirrored", "one", or "shares", one process that adds up what replicas would,
by the reference, and applies it; the policy; the exchange of gradients; "bn" for a network
with batch norm across replicas; what goes into `fit`: "dataset" or "arrays".
"""

import json
import os
import sys

import tensorflow as tf

kind, policy, exchange, network, data = sys.argv[1:6]
if kind == "mirrored":
    count = int(os.environ["REPLICAS"])
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * count
    )
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])
elif kind == "workers":
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
else:
    strategy = tf.distribute.get_strategy()

import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_dfp  # noqa: E402
from keras_dfp import reference  # noqa: E402

BATCH, STEPS = 12, 3
random = np.random.default_rng(0)
x = random.normal(size=(BATCH * STEPS, 8, 8, 3)).astype("float32")
y = random.integers(0, 4, BATCH * STEPS)

keras.utils.set_random_seed(7)
with keras_dfp.policy_scope(policy), strategy.scope():
    layers = [keras.Input((8, 8, 3)), keras.layers.Conv2D(8, 3)]
    if network == "bn":
        layers.append(keras.layers.BatchNormalization(synchronized=True))
    layers += [keras.layers.ReLU(), keras.layers.Flatten(), keras.layers.Dropout(0.0)]
    model = keras.Sequential([*layers, keras.layers.Dense(4)])
    model.compile(
        keras_dfp.optimizers.DFPSGD(0.1, momentum=0.9, gradient_exchange=exchange),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
if data == "dataset":
    options = {"x": tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)}
else:
    options = {"x": x, "y": y, "batch_size": BATCH, "shuffle": False}


def add_shares():
    """Trains with the sums of shares' gradients; Keras divides losses by the number of replicas."""
    count = int(os.environ["REPLICAS"])

    @tf.function
    def gradients(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(y=y, y_pred=model(x, training=True)) / count
        return tape.gradient(loss, [weight.value for weight in model.trainable_variables])

    for start in range(0, len(x), BATCH):
        shares = [
            gradients(part, labels)
            for part, labels in zip(
                np.split(x[start : start + BATCH], count),
                np.split(y[start : start + BATCH], count),
                strict=True,
            )
        ]
        sums = [
            reference.exchange([share.numpy() for share in each])
            for each in zip(*shares, strict=True)
        ]
        model.optimizer.apply([tf.constant(total) for total in sums], model.trainable_variables)


if kind == "shares":
    for _ in range(2):
        add_shares()
    history = None
else:
    history = model.fit(**options, epochs=2, verbose=0).history
result = {
    "history": history,
    "weights": [weight.numpy().ravel().tolist() for weight in model.weights],
    "evaluate": model.evaluate(x, y, batch_size=BATCH, verbose=0),
    "predict": model.predict(x[:BATCH], batch_size=BATCH, verbose=0).shape,
}
print(json.dumps(result))
