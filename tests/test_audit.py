"""audit: what integers cost each layer; and the warning of a layer that loses much of an input."""

import gc
import json
import threading
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner
from keras import layers

import keras_dfp
from keras_dfp import DFPPolicy, reference, zoo
from keras_dfp.cli import main


def network(policy="dfp16", **first):
    keras.utils.set_random_seed(0)
    with keras_dfp.policy_scope(policy):
        model = keras.Sequential(
            [
                keras.Input((10, 10, 3)),
                layers.Conv2D(6, 3, activation="relu", name="stem", **first),
                layers.BatchNormalization(),
                layers.Dropout(0.5),
                layers.DepthwiseConv2D(3, name="depthwise"),
                layers.GlobalAveragePooling2D(),
                layers.Dense(4, name="head"),
            ]
        )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


IMAGES = np.random.default_rng(0).standard_normal((4, 10, 10, 3)).astype(np.float32)
LABELS = np.arange(4)


def by_name(found):
    return {row["path"].split("/")[-1]: row for row in found.rows}


# ---- audit ---------------------------------------------------------------------------------------


def test_errors_of_a_layer_are_those_of_its_products():
    """The first layer's, computed with the reference from the images themselves."""
    model = network()
    row = by_name(keras_dfp.audit(model, IMAGES, LABELS, training=False))["stem"]
    kernel = model.layers[0].kernel.numpy()
    qx, ex = reference.quantize(IMAGES, group_axes=1)
    qw, ew = reference.quantize(kernel)
    ours = reference.conv(qx, ex, qw, ew)
    truth = np.zeros(ours.shape)
    for i, j in np.ndindex(3, 3):
        truth += IMAGES[:, i : i + 8, j : j + 8].astype(float) @ kernel[i, j].astype(float)

    def norms(x):
        return np.linalg.norm(x.reshape(4, -1), axis=1)

    error = np.mean(norms(ours - truth) / norms(truth))
    # That of float32 itself is a thousand times smaller.
    assert row["output"] == pytest.approx(error, rel=0.01)
    assert row["output_all"] == pytest.approx(error, rel=0.01)
    lost = ((qx == 0) & (IMAGES != 0)).sum() / (IMAGES != 0).sum()
    assert row["lost"]["x"] == pytest.approx(lost)
    exponents = np.floor(np.log2(np.abs(IMAGES.reshape(4, -1))))
    assert row["spread"]["x"] == (exponents.max(1) - exponents.min(1)).max()
    assert (row["layer"], row["operation"], row["format"]) == (
        "Conv2D",
        "conv",
        keras_dfp.DFPFormat(),
    )


def test_weight_gradients_are_compared_with_a_float32_model():
    model = network()
    found = keras_dfp.audit(model, IMAGES, LABELS, training=False)
    stock = network("float32")
    stock.set_weights(model.get_weights())

    def gradients(model):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(IMAGES, LABELS, model(IMAGES))
        return float(loss), tape.gradient(loss, [w.value for w in model.trainable_variables])

    (loss, ours), (stock_loss, theirs) = gradients(model), gradients(stock)
    assert found.loss == pytest.approx((loss, stock_loss), rel=1e-6)
    for weight, a, b in zip(model.trainable_variables, ours, theirs, strict=True):
        layer, kind = weight.path.split("/")[-2:]
        if kind == "kernel":
            error = np.linalg.norm(a - b) / np.linalg.norm(b)
            row = by_name(found)[layer]
            assert row["weight_gradient_all"] == pytest.approx(error, rel=0.05)
            assert 0 < row["weight_gradient"] < 0.02


def test_the_model_is_left_as_it_was():
    model = network()
    before = [keras.ops.convert_to_numpy(v) for v in model.variables]
    first = str(keras_dfp.audit(model, IMAGES, LABELS))
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    # Dropout draws the same noise again.
    assert str(keras_dfp.audit(model, IMAGES, LABELS)) == first
    assert not tf.config.functions_run_eagerly()


def test_state_metrics_and_noise_are_left_as_they_were():
    class Noise(layers.Layer):
        def call(self, x, training=False):
            return keras.random.dropout(x, 0.5)

    with keras_dfp.policy_scope("dfp16"):
        inputs = keras.Input((6, 4), batch_size=2)
        x = layers.LSTM(5, stateful=True)(inputs)
        a, b = layers.Dense(3, name="a")(Noise()(x)), layers.Dense(2, name="b")(x)
        model = keras.Model(inputs, {"a": a, "b": b})
    losses = {"a": "mse", "b": "mse"}
    model.compile("sgd", losses)
    x = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
    y = {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 2), np.float32)}
    model.train_on_batch(x, y)
    kept = [*model.variables, *model.metrics_variables]
    before = [keras.ops.convert_to_numpy(v) for v in kept]
    found = keras_dfp.audit(model, x, y)
    for variable, value in zip(kept, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    # The same noise in both runs.
    assert by_name(found)["a"]["output_all"] < 0.1


def test_what_is_computed_again_is_computed_alike():
    class Twice(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1], 3))

        def call(self, x):
            return keras.remat(lambda x: keras.ops.matmul(x, self.w))(x) + keras.ops.matmul(
                x, np.ones((4, 3), np.float32)
            )

    with keras_dfp.policy_scope("dfp16"):
        model = keras.Sequential([keras.Input((4,)), Twice()])
    found = keras_dfp.audit(model, np.ones((2, 4), np.float32))
    assert found.rows[0]["output"] < 0.01


def test_the_worst_comes_first_with_advice():
    found = keras_dfp.audit(network(), IMAGES)
    assert {row["advice"] for row in found.rows} == {""} and found.loss is None
    # Channels that one exponent cannot hold together, and a kernel that needs the small ones.
    model = network()
    model.layers[0].kernel.assign(model.layers[0].kernel * [[[[1e-6], [1.0], [1.0]]]])
    images = IMAGES * np.float32([1e6, 1, 1])
    row = keras_dfp.audit(model, images).rows[0]
    assert row["path"].endswith("stem") and row["output"] > 0.1
    assert row["advice"].startswith("exclude=['sequential")
    bad = network(DFPPolicy(mantissa_bits=8))
    assert "'mantissa_bits': 16" in keras_dfp.audit(bad, IMAGES).rows[0]["advice"]
    tensor = network(DFPPolicy(exponents="tensor"))
    mixed = IMAGES * np.float32([1e5, 1, 1, 1]).reshape(4, 1, 1, 1)
    assert keras_dfp.audit(tensor, mixed).rows[0]["advice"].startswith("exponents='sample'")


def test_layers_that_are_excluded_have_no_row():
    found = keras_dfp.audit(network(DFPPolicy(exclude=["head"])), IMAGES)
    assert set(by_name(found)) == {"stem", "depthwise"}
    with pytest.raises(ValueError, match="no product of model .* runs on integers.*describe"):
        keras_dfp.audit(network("float32"), IMAGES)


def test_labels_need_a_loss():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, dtype="dfp16")])
    with pytest.raises(ValueError, match="labels need a loss.*Compile it, or leave out y"):
        keras_dfp.audit(model, np.ones((2, 3), np.float32), LABELS[:2])


def test_recurrence_attention_and_functions_are_audited():
    class Function(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1], 3))

        @tf.function
        def call(self, x):
            return keras.ops.matmul(x, self.w)

    with keras_dfp.policy_scope("dfp16"):
        inputs = keras.Input((5, 4))
        x = layers.LSTM(4, return_sequences=True, name="lstm")(inputs)
        x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
        model = keras.Model(inputs, Function(name="function")(x))
    x = np.random.default_rng(1).standard_normal((2, 5, 4)).astype(np.float32)
    rows = keras_dfp.audit(model, x).rows
    found = {(row["path"], row["operation"]) for row in rows}
    assert any(path.endswith("lstm_cell") for path, _ in found)
    assert any(operation in ("dot_product_attention", "einsum") for _, operation in found)
    assert any(path.endswith("function") for path, _ in found)
    for row in rows:
        assert 0 < row["output"] < 0.01 and row["weight_gradient"] != 0, row


def test_the_table_and_the_plot(tmp_path):
    found = keras_dfp.audit(network(), IMAGES, LABELS)
    lines = str(found).splitlines()
    assert lines[0].split()[:2] == ["layer", "product"] and len(lines) == 2 + 3 + 2
    assert lines[-1].startswith("Loss: ")
    found.plot(tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["audit.png"]


# ---- the command ---------------------------------------------------------------------------------


def run(*arguments, code=0):
    result = CliRunner().invoke(main, ["audit", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_command_of_the_zoo(tmp_path):
    output = run(
        "lenet", "--plot", tmp_path / "a.png", "--json", tmp_path / "a.json", "--batch-size", 4
    )
    assert "conv" in output and "Loss: " in output
    content = json.loads((tmp_path / "a.json").read_text())
    assert len(content["rows"]) == 5 and content["rows"][0]["format"]["mantissa_bits"] == 14
    assert (tmp_path / "a.png").exists()


def test_command_of_a_file(tmp_path):
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(2):
            image = np.random.default_rng(i).integers(0, 255, (30, 40, 3))
            keras.utils.save_img(tmp_path / "photos" / label / f"{i}.png", image, scale=False)
    network("float32").save(tmp_path / "model.keras")
    photos = tmp_path / "photos"
    output = run(tmp_path / "model.keras", "--data", photos, "--policy", "dfp16:mantissa_bits=8")
    assert "stem" in output and "'mantissa_bits': 16" in output
    assert "needs --data" in run(tmp_path / "model.keras", code=2)
    assert "There is no folder" in run("lenet", "--plot", tmp_path / "no" / "a.png", code=2)
    assert "neither a .keras file nor" in run("resnet5", "--data", photos, code=2)


# ---- the warning ---------------------------------------------------------------------------------


def told(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in caught if "loses much of an input" in str(w.message)]


def outlier():
    x = IMAGES.copy()
    x[1, 0, 0, 0] = 1e6
    return x


@pytest.mark.parametrize("how", ["predict", "fit", "eager", "graph", "thread"])
def test_a_layer_that_loses_half_of_an_input_says_so_once(how):
    model, images = network(), outlier()
    graph = tf.function(model)
    ways = {
        "predict": lambda: model.predict(images, verbose=0),
        "fit": lambda: model.fit(images, LABELS, verbose=0),
        "eager": lambda: model(images),
        "graph": lambda: graph(images),
    }
    if how == "thread":

        def again():
            thread = threading.Thread(target=ways["predict"])
            thread.start()
            thread.join()
    else:
        again = ways[how]
    messages = told(again)
    (message,) = [m for m in messages if "stem" in m]
    assert message.startswith("keras_dfp: layer 'sequential")
    assert "of 300 nonzero values that share an exponent, 29" in message
    assert "exclude=" in message and "'mantissa_bits': 16" in message and "audit" in message
    assert not [m for m in told(again) if "stem" in m]


def test_what_is_not_told():
    model = network()
    assert told(lambda: model.predict(IMAGES, verbose=0)) == []
    # A row of few elements tells nothing.
    with keras_dfp.policy_scope("dfp16"):
        dense = layers.Dense(3)
    assert told(lambda: dense(np.float32([[1e6, 1, 2, 3]] * 8))) == []
    # Zeros are not lost.
    images = IMAGES * (IMAGES > 1)
    assert told(lambda: network().predict(images, verbose=0)) == []


def test_attention_weights_may_vanish():
    with keras_dfp.policy_scope("dfp16"):
        layer = layers.MultiHeadAttention(1, 4, use_bias=False)
    x = np.random.default_rng(0).standard_normal((1, 200, 4)).astype(np.float32)
    layer(x, x)
    for variable in layer.variables:
        variable.assign(8 * variable)
    assert told(lambda: layer(x, x)) == []
    assert told(lambda: layer(x, x, return_attention_scores=True)) == []


def test_names_of_layers_that_are_gone_are_told_again():
    def once():
        messages = told(lambda: network().predict(outlier(), verbose=0))
        gc.collect()
        return [m for m in messages if "stem" in m]

    assert len(once()) == len(once()) == 1


def images_of(shape, batch=2):
    """Parts of two photographs."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    high, wide, _ = shape
    return np.stack(
        [
            photos[i % 2][20 * i : 20 * i + high, 30 * i : 30 * i + wide].astype(np.float32)
            for i in range(batch)
        ]
    )


def check_no_warning(model, images):
    model.compile("sgd", "sparse_categorical_crossentropy")

    def work():
        model.predict(images, verbose=0)
        model.fit(images, np.arange(len(images)), verbose=0)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    assert [str(w.message) for w in caught if "keras_dfp" in str(w.message)] == []


def test_networks_do_not_warn():
    model = zoo.load("resnet20", policy="dfp16", input_shape=(32, 32, 3), classes=4)
    check_no_warning(model, zoo.preprocessing("resnet20")(images_of((32, 32, 3))))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in zoo.list() if name not in ("lenet", "resnet20")])
def test_networks_of_the_paper_do_not_warn(name):
    model = zoo.load(name, policy="dfp16", input_shape=(96, 96, 3), classes=4)
    check_no_warning(model, zoo.preprocessing(name)(images_of((96, 96, 3))))


@pytest.mark.slow
@pytest.mark.parametrize("pixels", ["0..255", "-1..1"])
@pytest.mark.parametrize(
    "name",
    ["MobileNetV2", "ResNet50", "ResNet50V2", "DenseNet121", "EfficientNetB0", "Xception",
     "ConvNeXtTiny", "InceptionV3", "MobileNetV3Small"],
)  # fmt: skip
def test_applications_do_not_warn(name, pixels):
    with keras_dfp.policy_scope("dfp16"):
        model = getattr(keras.applications, name)(weights=None, input_shape=(96, 96, 3), classes=4)
    images = images_of((96, 96, 3))
    check_no_warning(model, images if pixels == "0..255" else images / 127.5 - 1)
