"""A training loop of one's own, with tf.GradientTape: float32 and integers from equal weights.

The policy is the layers', so a loop needs nothing particular: no loss scaling, no casts. Here each
step clips the gradient's norm and looks at how it compares with float32's on the same batch.
"""

import argparse

import keras
import sklearn.datasets
import tensorflow as tf

import keras_dfp


def network(policy: str) -> keras.Model:
    with keras_dfp.policy_scope(policy):
        return keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
                keras.layers.MaxPooling2D(),
                keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
                keras.layers.Flatten(),
                keras.layers.Dense(10),
            ]
        )


class Trainer:
    def __init__(self, model: keras.Model, optimizer: keras.Optimizer):
        self.model, self.optimizer = model, optimizer
        self.loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step(self, images, labels):
        """Changes the weights; returns the loss, and the gradient as one vector."""
        with tf.GradientTape() as tape:
            loss = self.loss(labels, self.model(images, training=True))
        gradients = tape.gradient(loss, self.model.trainable_variables)
        clipped, _ = tf.clip_by_global_norm(gradients, 1.0)
        self.optimizer.apply(clipped, self.model.trainable_variables)
        return loss, tf.concat([tf.reshape(g, [-1]) for g in gradients], 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()

    keras.utils.set_random_seed(1)
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype("float32")
    train = tf.data.Dataset.from_tensor_slices((images[:1437], labels[:1437]))
    train = train.shuffle(1437, seed=1).batch(32, drop_remainder=True)

    exact = Trainer(network("float32"), keras.optimizers.Adam(1e-3))
    # One native pass over each variable, the same bits on every CPU.
    integers = Trainer(network("dfp16"), keras_dfp.optimizers.DFPAdam(1e-3))
    integers.model.set_weights(exact.model.get_weights())

    for epoch in range(args.epochs):
        for number, batch in enumerate(train):
            (loss, gradient), (other, expected) = integers.step(*batch), exact.step(*batch)
            if epoch == number == 0:
                error = tf.norm(gradient - expected) / tf.norm(expected)
                print(f"first gradient: {float(error):.3%} from float32's")
        print(f"epoch {epoch + 1}: loss {float(loss):.4f}, in float32 {float(other):.4f}")

    for name, trainer in (("dfp16", integers), ("float32", exact)):
        answers = trainer.model.predict(images[1437:], verbose=0).argmax(axis=1)
        print(f"{name}: {(answers == labels[1437:]).mean():.1%} of the test digits right")


if __name__ == "__main__":
    main()
