"""The zoo: networks against the tables of their papers and keras.applications, recipes, loading."""

import dataclasses
import importlib
import inspect
import math
import re

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.applications import resnet as keras_resnet
from keras.src.legacy.saving import legacy_h5_format

import keras_dfp
from keras_dfp import recipe as recipes
from keras_dfp import zoo
from keras_dfp.layers import LocalResponseNormalization

NAMES = ["alexnet", "googlenet_v1", "lenet", "resnet20", "resnet50", "vgg16"]
IMAGENET = ["alexnet", "googlenet_v1", "resnet50", "vgg16"]


def small(name, **options):
    """A network at the smallest size the accuracy studies use."""
    if name in IMAGENET:
        options = {"input_shape": (64, 64, 3), "classes": 10, **options}
    return zoo.load(name, **options)


def images(model, count=2):
    shape = (count, *model.input_shape[1:])
    return np.random.default_rng(0).integers(0, 256, shape).astype("float32")


def conv(size, channels, filters, groups=1):
    """Parameters of a convolution with bias."""
    return size * size * channels // groups * filters + filters


def dense(inputs, outputs):
    return inputs * outputs + outputs


def test_list():
    assert zoo.list() == NAMES


# Networks, against the tables of their papers.


def test_alexnet_has_the_parameters_of_its_paper():
    expected = (
        conv(11, 3, 96)
        + conv(5, 96, 256, groups=2)
        + conv(3, 256, 384)
        + conv(3, 384, 384, groups=2)
        + conv(3, 384, 256, groups=2)
        + dense(6 * 6 * 256, 4096)
        + dense(4096, 4096)
        + dense(4096, 1000)
    )
    model = zoo.load("alexnet")
    assert model.count_params() == expected == 60_965_224
    # The numbers of neurons in each layer: section 3.5.
    neurons = {
        layer.name: math.prod(layer.output.shape[1:])
        for layer in model.layers
        if layer.name.startswith(("conv", "fc"))
    }
    # Its text says 253,440 for 224x224 images in, which is 290,400 for 55x55 outputs.
    assert neurons == {
        "conv1": 290_400,
        "conv2": 186_624,
        "conv3": 64_896,
        "conv4": 64_896,
        "conv5": 43_264,
        "fc6": 4096,
        "fc7": 4096,
    }


def test_vgg16_has_the_parameters_of_its_paper():
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convolutions = sum(conv(3, a, b) for a, b in zip(channels, channels[1:], strict=False))
    top = dense(7 * 7 * 512, 4096) + dense(4096, 4096) + dense(4096, 1000)
    assert zoo.load("vgg16").count_params() == convolutions + top == 138_357_544


def test_resnet50_has_the_published_parameters():
    def normalized(size, channels, filters):
        return conv(size, channels, filters) + 4 * filters

    expected, channels = normalized(7, 3, 64), 64
    for filters, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        expected += normalized(1, channels, 4 * filters)
        for _ in range(blocks):
            expected += normalized(1, channels, filters)
            expected += normalized(3, filters, filters) + normalized(1, filters, 4 * filters)
            channels = 4 * filters
    expected += dense(2048, 1000)
    assert zoo.load("resnet50").count_params() == expected == 25_636_712


def test_resnet20_has_the_published_parameters():
    # Per convolution: no bias, but scale, shift, mean and variance.
    def normalized(channels, filters):
        return 9 * channels * filters + 4 * filters

    expected = normalized(3, 16) + 6 * normalized(16, 16)
    expected += normalized(16, 32) + 5 * normalized(32, 32)
    expected += normalized(32, 64) + 5 * normalized(64, 64) + dense(64, 10)
    model = zoo.load("resnet20")
    assert model.count_params() == expected
    trained = sum(math.prod(v.shape) for v in model.trainable_variables)
    assert round(trained / 1e6, 2) == 0.27  # table 6


# Table 1: input; 1x1; 3x3 reduce, 3x3; 5x5 reduce, 5x5; pool projection. (Its column of parameters
# does not follow from these: 463 thousand for 4c, which has 510.)
TABLE_1 = {
    "3a": (192, 64, 96, 128, 16, 32, 32),
    "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64),
    "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64),
    "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128),
    "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}


def inception(name):
    inputs, one, three_reduce, three, five_reduce, five, projection = TABLE_1[name]
    return (
        conv(1, inputs, one)
        + conv(1, inputs, three_reduce)
        + conv(3, three_reduce, three)
        + conv(1, inputs, five_reduce)
        + conv(5, five_reduce, five)
        + conv(1, inputs, projection)
    )


def test_googlenet_has_the_parameters_of_its_paper():
    model = zoo.load("googlenet_v1")
    stem = conv(7, 3, 64) + conv(1, 64, 64) + conv(3, 64, 192)
    expected = stem + sum(map(inception, TABLE_1)) + dense(1024, 1000)
    assert model.count_params() == expected == 6_998_552
    sizes = {name: model.get_layer(f"inception_{name}_output").output.shape for name in TABLE_1}
    assert [sizes[name][1] for name in TABLE_1] == [28, 28, 14, 14, 14, 14, 14, 7, 7]
    for name in TABLE_1:
        layers = [x for x in model.layers if x.name.startswith(f"inception_{name}_")]
        assert sum(layer.count_params() for layer in layers) == inception(name)


@pytest.mark.slow
def test_googlenet_auxiliary_classifiers():
    model = zoo.load("googlenet_v1", auxiliary=True)
    plain = zoo.load("googlenet_v1")
    classifiers = [
        conv(1, channels, 128) + dense(4 * 4 * 128, 1024) + dense(1024, 1000)
        for channels in (512, 528)
    ]
    assert model.count_params() == plain.count_params() + sum(classifiers)
    assert model.output_names == ["predictions", "auxiliary1", "auxiliary2"]

    model = small("googlenet_v1", auxiliary=True)
    plain = keras.Model(model.inputs, model.outputs[0])
    x = images(model)
    np.testing.assert_array_equal(plain(x), model(x)[0])
    assert plain.count_params() == small("googlenet_v1").count_params()
    model.compile("sgd", ["sparse_categorical_crossentropy"] * 3, loss_weights=[1, 0.3, 0.3])
    y = np.array([1, 2])
    losses = model.train_on_batch(x, [y, y, y])
    assert losses[0] == pytest.approx(losses[1] + 0.3 * (losses[2] + losses[3]), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "layers"), [("alexnet", ["norm1", "norm2"]), ("googlenet_v1", ["norm1", "norm2"])]
)
def test_response_normalization_is_optional(name, layers):
    def normalizing(model):
        return [x.name for x in model.layers if isinstance(x, LocalResponseNormalization)]

    assert normalizing(small(name)) == layers
    assert normalizing(small(name, lrn=False)) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_training_under_dfp16(name):
    model = small(name, policy="dfp16")
    assert {layer.dtype_policy.name for layer in model.layers} == {"dfp16"}
    x = zoo.preprocessing(name)(images(model))
    assert model.output_shape == (None, 10)
    np.testing.assert_allclose(np.sum(model(x), axis=-1), 1, rtol=1e-5)
    before = [v.numpy() for v in model.trainable_variables]
    model.compile(keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy")
    assert math.isfinite(model.train_on_batch(x, np.array([3, 7])))
    after = [v.numpy() for v in model.trainable_variables]
    kernels = [(b, a) for b, a in zip(before, after, strict=True) if b.ndim > 1]
    assert kernels
    for b, a in kernels:
        assert np.isfinite(a).all()
        assert (a != b).any()


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    softmax, logits = small(name), small(name, classifier_activation=None)
    assert softmax.get_layer("predictions").activation is keras.activations.softmax
    assert logits.get_layer("predictions").activation is keras.activations.linear


@pytest.mark.parametrize("name", ["alexnet", "resnet20"])
def test_saved_and_loaded(name, tmp_path):
    model = small(name, policy="dfp16")
    model.save(tmp_path / "model.keras")
    x = zoo.preprocessing(name)(images(model))
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))


# Weights.


def legacy_file(model, path):
    """Writes weights in the format of the files that keras.applications offers."""
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
    return path


def same_layers(ours, theirs):
    def weights(model):
        # From Keras 3.11 or so paths begin with the name of the model.
        return [("/".join(w.path.split("/")[-2:]), w.shape) for w in model.weights]

    assert weights(ours) == weights(theirs)


@pytest.fixture(scope="module")
def keras_resnet50():
    """The ResNet-50 of keras.applications, every weight of it random."""
    keras.utils.set_random_seed(2)
    model = keras.applications.ResNet50(weights=None)
    rng = np.random.default_rng(2)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.gamma.assign(rng.uniform(0.5, 1, layer.gamma.shape))
            layer.beta.assign(rng.normal(size=layer.beta.shape))
            layer.moving_mean.assign(rng.normal(size=layer.moving_mean.shape))
            layer.moving_variance.assign(rng.uniform(0.5, 2, layer.moving_variance.shape))
    return model


@pytest.mark.slow
def test_resnet50_takes_the_weights_of_keras_applications(keras_resnet50, tmp_path):
    keras_resnet50.save_weights(tmp_path / "resnet50.weights.h5")
    ours = zoo.load("resnet50", weights=tmp_path / "resnet50.weights.h5")
    same_layers(ours, keras_resnet50)
    x = zoo.preprocessing("resnet50", "imagenet")(images(ours))
    np.testing.assert_array_equal(ours(x), keras_resnet50(x))


@pytest.mark.parametrize("suffix", [".h5", ".weights.h5"])
def test_vgg16_takes_the_weights_of_keras_applications(suffix, tmp_path):
    keras.utils.set_random_seed(3)
    theirs = keras.applications.VGG16(weights=None, input_shape=(32, 32, 3), classes=7)
    path = tmp_path / f"vgg16{suffix}"
    legacy_file(theirs, path) if suffix == ".h5" else theirs.save_weights(path)
    ours = zoo.load("vgg16", (32, 32, 3), 7, path)
    same_layers(ours, theirs)
    x = zoo.preprocessing("vgg16", "imagenet")(images(theirs))
    np.testing.assert_array_equal(ours(x), theirs(x))


def test_imagenet_weights(keras_resnet50, tmp_path, monkeypatch):
    """With a file of random weights in place of the download."""
    path = legacy_file(keras_resnet50, tmp_path / "resnet50.h5")
    asked = []
    monkeypatch.setattr(
        keras_resnet.file_utils, "get_file", lambda name, *_, **__: asked.append(name) or path
    )
    ours = zoo.load("resnet50", input_shape=(64, 64, 3), weights="imagenet", policy="dfp16")
    assert asked == ["resnet50_weights_tf_dim_ordering_tf_kernels.h5"]
    for a, b in zip(ours.weights, keras_resnet50.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert ours.get_layer("conv1_conv").dtype_policy.name == "dfp16"


@pytest.mark.parametrize("name", ["resnet50", "vgg16"])
def test_preprocessing_of_imagenet_weights(name):
    """BGR, minus the mean, in any dtype, on arrays and in tf.data."""
    preprocess = zoo.preprocessing(name, "imagenet")
    x = np.random.default_rng(5).integers(0, 256, (2, 4, 4, 3), dtype="uint8")
    untouched = x.copy()
    expected = x[..., ::-1].astype("float64") - [103.939, 116.779, 123.68]
    np.testing.assert_allclose(preprocess(x), expected, rtol=1e-5, atol=1e-4)
    (mapped,) = tf.data.Dataset.from_tensors(x).map(preprocess)
    assert mapped.dtype == "float32"
    np.testing.assert_array_equal(mapped, preprocess(x))
    np.testing.assert_array_equal(x, untouched)


@pytest.mark.parametrize("name", NAMES)
def test_preprocessing_of_recipes(name):
    recipe = zoo.recipe(name)
    channels = len(recipe.images.mean)
    x = np.random.default_rng(6).integers(0, 256, (2, 4, 4, channels), dtype="uint8")
    expected = (x.astype("float64") - recipe.images.mean) / np.array(recipe.images.std)
    (mapped,) = tf.data.Dataset.from_tensors(x).map(zoo.preprocessing(name, "some/file.h5"))
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-5)


def test_weights_that_do_not_fit(tmp_path):
    small("resnet20").save_weights(tmp_path / "ten.weights.h5")
    with pytest.raises(ValueError, match=r"ten.weights.h5' do not fit 'resnet20'.* and 11 classes"):
        zoo.load("resnet20", classes=11, weights=tmp_path / "ten.weights.h5")
    with pytest.raises(FileNotFoundError, match="'imagenet' or a file; there is no file 'imagen'"):
        zoo.load("resnet50", weights="imagen")


# Loading.


def test_policy_of_the_model_and_global_policy():
    assert zoo.load("lenet").layers[1].dtype_policy.name == "float32"
    with keras_dfp.policy_scope("mixed_bfloat16"):
        policy = keras_dfp.DFPPolicy(mantissa_bits=12)
        model = zoo.load("lenet", policy=policy)
        assert {x.dtype_policy for x in model.layers} == {policy}
        assert zoo.load("lenet").layers[1].dtype_policy.name == "mixed_bfloat16"
        with pytest.raises(ValueError, match="has no option"):
            zoo.load("lenet", policy="dfp16", dropout=0.1)
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet"}, "no network 'resnet' in the zoo. Did you mean: resnet50, resnet20"),
        ({"name": "bert"}, f"no network 'bert' in the zoo. There are: {', '.join(NAMES)}"),
        ({"name": ".."}, "no network '..' in the zoo"),
        ({"name": "vgg16", "lrn": True}, "'vgg16' has no option 'lrn'; it has: classifier_act"),
        ({"name": "vgg16", "input_shape": (224, 224)}, "(height, width, channels), all above 0"),
        ({"name": "vgg16", "input_shape": 224}, "got 224"),
        ({"name": "vgg16", "input_shape": (0, 9, 3)}, "all above 0; got (0, 9, 3)"),
        ({"name": "vgg16", "classes": 0}, "classes must be a whole number above 0; got 0"),
        ({"name": "vgg16", "classes": "ten"}, "got 'ten'"),
        ({"name": "alexnet", "weights": "imagenet"}, "no trained weights of 'alexnet'"),
        ({"name": "googlenet_v1", "weights": "imagenet"}, "is for 'resnet50' and 'vgg16'"),
        (
            {"name": "resnet50", "weights": "imagenet", "classes": 10},
            "1000 classes; got input (224, 224, 3) and 10 classes",
        ),
        (
            {"name": "vgg16", "weights": "imagenet", "input_shape": (64, 64, 3)},
            "are for input (224, 224, 3) and 1000 classes; got input (64, 64, 3)",
        ),
        ({"name": "lenet", "policy": "int8"}, "int8"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        zoo.load(**arguments)


def test_no_preprocessing_without_weights():
    with pytest.raises(ValueError, match="no trained weights of 'alexnet'"):
        zoo.preprocessing("alexnet", "imagenet")


def test_channels_first(monkeypatch):
    monkeypatch.setattr(keras.config, "image_data_format", lambda: "channels_first")
    with pytest.raises(ValueError, match=r"set_image_data_format\('channels_last'\)"):
        zoo.load("lenet")


# Recipes.


def test_recipes_are_those_of_the_papers():
    resnet = zoo.recipe("resnet50")
    steps_per_epoch = math.ceil(1_281_167 / resnet.batch_size)
    assert [steps_per_epoch * e for e in resnet.schedule.at_epochs] == [37_560, 75_120, 100_160]
    assert steps_per_epoch * resnet.epochs == 112_680
    rates = {name: zoo.recipe(name).schedule.learning_rate for name in IMAGENET}
    assert rates == {"alexnet": 0.01, "googlenet_v1": 0.06, "resnet50": 0.1, "vgg16": 0.01}
    decays = {name: zoo.recipe(name).optimizer.weight_decay for name in IMAGENET}
    assert decays == {"alexnet": 5e-4, "googlenet_v1": 2e-4, "resnet50": 1e-4, "vgg16": 5e-4}
    for name in NAMES:
        recipe = zoo.recipe(name)
        assert recipe.name == name
        assert recipe.policy == "dfp16"
        architecture = importlib.import_module(f"keras_dfp.model_zoo.{name}.architecture")
        shape = inspect.signature(architecture.build).parameters["input_shape"].default
        assert len(recipe.images.mean) == shape[-1]
        assert recipe.images.crop in (None, shape[0])


def test_scaled_to_another_batch_size():
    recipe = zoo.recipe("resnet50")
    recipe = dataclasses.replace(
        recipe, schedule=dataclasses.replace(recipe.schedule, warmup_from=0.02)
    )
    scaled = recipe.scaled(256)
    assert scaled.batch_size == 256
    assert scaled.schedule.learning_rate == pytest.approx(0.025)
    assert scaled.schedule.warmup_from == pytest.approx(0.005)
    rest = dict(batch_size=1024, schedule=recipe.schedule)
    assert dataclasses.replace(scaled, **rest) == recipe
    assert scaled.scaled(1024) == recipe


def test_resized_to_another_input():
    recipe = zoo.recipe("resnet50").resized(64)
    assert (recipe.images.crop, recipe.images.resize, recipe.images.pad) == (64, 73, 0)
    recipe = zoo.recipe("resnet20").resized(64)
    assert (recipe.images.crop, recipe.images.resize, recipe.images.pad) == (64, None, 8)
    assert zoo.recipe("lenet").resized(16) == zoo.recipe("lenet")


RECIPE = """
source = "a test"
policy = "dfp16"
epochs = 3
batch_size = 8
[optimizer]
name = "sgd"
momentum = 0.9
[schedule]
kind = "steps"
learning_rate = 1
at_epochs = [1, 2.5]
factor = 0.1
[images]
mean = [0]
std = [255]
"""


def test_a_recipe_is_read(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    expected = recipes.Recipe(
        name="mine",
        source="a test",
        policy="dfp16",
        epochs=3,
        batch_size=8,
        optimizer=recipes.Optimizer(name="sgd", momentum=0.9),
        schedule=recipes.Steps(learning_rate=1.0, at_epochs=(1.0, 2.5), factor=0.1),
        images=recipes.Images(mean=(0.0,), std=(255.0,)),
    )
    assert recipes.read(path, "mine") == expected
    with pytest.raises(dataclasses.FrozenInstanceError):
        expected.epochs = 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 3", "epoch = 3", "unknown key 'epoch'; there are: "),
        ("epochs = 3", "", "key 'epochs' is missing"),
        ("epochs = 3", "epochs = 3.5", "epochs must be a whole number; got 3.5"),
        ("epochs = 3", "epochs = true", "epochs must be a whole number; got True"),
        ("epochs = 3", "epochs = 0", "epochs must be above 0; got 0"),
        ("epochs = 3", "epochs = ", "Invalid value"),
        ("epochs = 3", "name = 'x'", "unknown key 'name'"),
        ('"dfp16"', '"dfp61"', "policy: "),
        ("batch_size = 8", "batch_size = -8", "batch_size must be above 0; got -8"),
        ('"sgd"', '"lion"', "optimizer.name must be one of 'sgd', 'adam', 'dfp_sgd', 'dfp_adam'; "),
        ('"sgd"', '"dfp_adam"', "optimizer.momentum must be absent, because it is sgd's; got 0.9"),
        ('"sgd"', '"sgd"\nslots = "dfp16"', "slots must be absent, because it is dfp_sgd's and "),
        ('"sgd"', '"dfp_sgd"\nslots = "dfp8"', "slots must be 'float32' or 'dfp16'; got 'dfp8'"),
        ('"sgd"', '"adam"', "optimizer.momentum must be absent, because it is sgd's; got 0.9"),
        ("momentum = 0.9", "momentum = '0.9'", "optimizer.momentum must be a number; got '0.9'"),
        ("momentum = 0.9", "momentum = nan", "optimizer.momentum must be a number; got nan"),
        ("momentum = 0.9", "nesterov = 1", "optimizer.nesterov must be true or false; got 1"),
        ("momentum = 0.9", "decay = 1", "unknown key 'optimizer.decay'; there are: name, mom"),
        ('"steps"', '"step"', "schedule.kind must be one of 'steps', 'polynomial'"),
        ('"steps"', '"cosine"', "; there are: learning_rate, warmup_epochs, warmup_from"),
        ("[1, 2.5]", "[2, 1]", "schedule.at_epochs must be epochs above 0 that rise; got (2.0,"),
        ("[1, 2.5]", "[]", "schedule.at_epochs must be epochs above 0 that rise; got ()"),
        ("[1, 2.5]", "1", "schedule.at_epochs must be a list of numbers; got 1"),
        ("factor = 0.1", "factor = 10", "schedule.factor must be above 0 and below 1; got 10.0"),
        ("factor = 0.1", "", "key 'schedule.factor' is missing"),
        ("mean = [0]", "mean = [0, 0]", "images.mean must be one value for grey or three"),
        ("std = [255]", "std = [0]", "images.std must be as many values as mean, all above 0"),
        ("std = [255]", "std = [1]\nresize = 8\ncrop = 9", "images.crop must be at most resize"),
        ("[images]", "[pictures]", "there must be a table [images]; got None"),
    ],
)
def test_a_wrong_recipe(tmp_path, old, new, message):
    assert RECIPE.count(old) == 1
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        recipes.read(path, "mine")
    assert str(error.value).startswith(f"{path}: ")


# The layer.


@pytest.mark.parametrize("radius", [1, 2])
def test_local_response_normalization(radius):
    rng = np.random.default_rng(7)
    x, weights = rng.normal(size=(2, 2, 3, 3, 7)) * 5
    layer = LocalResponseNormalization(radius, bias=1.5, alpha=0.1, beta=0.6)

    def expected(x):
        energy = np.zeros_like(x)
        for c in range(7):
            energy[..., c] = (x[..., max(0, c - radius) : c + radius + 1] ** 2).sum(axis=-1)
        return x / (1.5 + 0.1 * energy) ** 0.6

    with tf.GradientTape() as tape:
        inputs = tf.constant(x, "float32")
        tape.watch(inputs)
        outputs = layer(inputs)
        loss = tf.reduce_sum(outputs * weights.astype("float32"))
    np.testing.assert_allclose(outputs, expected(x), rtol=1e-5)
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-5
        change = expected(x + step) - expected(x - step)
        gradient[index] = (change * weights).sum() / 2e-5
    np.testing.assert_allclose(tape.gradient(loss, inputs), gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "dfp16"])
def test_local_response_normalization_saved_and_loaded(policy, tmp_path):
    layer = LocalResponseNormalization(1, 3.0, 0.2, 0.5, name="lrn", dtype=policy)
    model = keras.Sequential([keras.Input((None, None, 6)), layer])
    assert model.output_shape == (None, None, None, 6)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("lrn").get_config() == layer.get_config()
    x = np.random.default_rng(8).normal(size=(1, 2, 2, 6)).astype("float32")
    np.testing.assert_array_equal(loaded(x), model(x))
    assert model(x).dtype == layer.compute_dtype


def test_local_response_normalization_of_another_rank():
    with pytest.raises(ValueError, match="expected ndim=4"):
        LocalResponseNormalization()(np.zeros((2, 3), "float32"))
