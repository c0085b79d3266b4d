"""Stock models train under the policy, are saved, and come back the same."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_dfp

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((16, 32, 32, 3)).astype("float32")
TOKENS = RNG.integers(0, 50, (16, 12))
LABELS = np.arange(16) % 4


@keras.saving.register_keras_serializable(package="keras_dfp_tests")
class Subclassed(keras.Model):
    """A residual convolutional network of the plainest kind."""

    def __init__(self, classes, **kwargs):
        super().__init__(**kwargs)
        self.classes = classes
        self.stem = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")
        self.blocks = [layers.Conv2D(8, 3, padding="same", activation="relu") for _ in range(2)]
        self.norm = layers.BatchNormalization()
        self.pool = layers.GlobalAveragePooling2D()
        self.head = layers.Dense(classes, activation="softmax")

    def call(self, x, training=False):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.pool(self.norm(x, training=training)))

    def get_config(self):
        return {"classes": self.classes}


def text_lstm():
    return keras.Sequential(
        [
            keras.Input((12,)),
            layers.Embedding(50, 16, mask_zero=True),
            layers.LSTM(16),
            layers.Dense(4, activation="softmax"),
        ]
    )


def transformer():
    tokens = keras.Input((12,), dtype="int32")
    x = layers.Embedding(50, 16)(tokens)
    for _ in range(2):
        attended = layers.MultiHeadAttention(2, 8, dropout=0.1)(x, x, use_causal_mask=True)
        x = layers.LayerNormalization()(x + attended)
        x = layers.LayerNormalization()(x + layers.Dense(16)(layers.Dense(32, "gelu")(x)))
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, layers.Dense(4, activation="softmax")(x))


def application(name):
    make = getattr(keras.applications, name)
    return lambda: make(weights=None, input_shape=(32, 32, 3), classes=4)


# What makes the model, what it is trained on, and the learning rate of Adam.
MODELS = {
    "ResNet50": (application("ResNet50"), IMAGES, 1e-3),
    "MobileNetV2": (application("MobileNetV2"), IMAGES, 1e-3),
    "EfficientNetB0": (application("EfficientNetB0"), IMAGES, 1e-3),
    "subclassed": (lambda: Subclassed(4), IMAGES, 1e-2),
    "LSTM": (text_lstm, TOKENS, 2e-2),
    "transformer": (transformer, TOKENS, 5e-3),
}


def case(name, mode, *marks):
    return pytest.param(name, mode == "eager", id=f"{name}-{mode}", marks=marks)


# Tracing the training step of a large model takes TensorFlow most of a minute, in float32 too.
@pytest.mark.parametrize(
    ("name", "run_eagerly"),
    [
        case("ResNet50", "graph", pytest.mark.slow),
        case("MobileNetV2", "eager", pytest.mark.slow),
        case("MobileNetV2", "graph", pytest.mark.slow),
        case("EfficientNetB0", "eager", pytest.mark.slow),
        case("EfficientNetB0", "graph", pytest.mark.slow),
        case("subclassed", "graph"),
        case("LSTM", "graph"),
        case("transformer", "graph"),
    ],
)
def test_trains_and_comes_back_from_a_file(name, run_eagerly, tmp_path):
    make, inputs, learning_rate = MODELS[name]
    keras.utils.set_random_seed(0)
    keras_dfp.set_policy("dfp16")
    model = make()
    model.compile(
        keras.optimizers.Adam(learning_rate),
        "sparse_categorical_crossentropy",
        run_eagerly=run_eagerly,
    )
    losses = model.fit(inputs, LABELS, batch_size=16, epochs=6, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]

    predictions = model.predict(inputs, batch_size=16, verbose=0)
    assert np.isfinite(predictions).all()
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    assert all(row["format"] for row in keras_dfp.describe(restored).rows)
    np.testing.assert_array_equal(restored.predict(inputs, batch_size=16, verbose=0), predictions)
