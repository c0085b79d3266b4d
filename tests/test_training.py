"""Training by recipe: data, augmentation, schedule, steps, checkpoints, comparisons."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import keras_dfp
from keras_dfp import zoo
from keras_dfp.layers import LocalResponseNormalization
from keras_dfp.recipe import Images
from keras_dfp.training import comparison, log, network, sources
from keras_dfp.training.errors import DataError, RunError, TrainingError
from keras_dfp.training.pipeline import Pipeline, prepare
from keras_dfp.training.policies import policy
from keras_dfp.training.run import Run, load
from keras_dfp.training.schedule import Plateaus, learning_rate
from keras_dfp.training.settings import Settings

CIFAR = Images(mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7), pad=4, crop=32, mirror=True)


def write_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tf.io.encode_png(image).numpy())


def class_folders(folder, count, size=32, classes=("cat", "dog", "eel")):
    """Writes noise of a brightness that tells the classes apart; returns the images by path."""
    random = np.random.default_rng(0)
    images = {}
    for label, name in enumerate(classes):
        for number in range(count):
            image = random.integers(70 * label, 70 * label + 60, (size, size, 3)).astype("uint8")
            images[folder / name / f"{number:03}.png"] = image
    for path, image in images.items():
        write_image(path, image)
    return images


def normalize(image):
    return (tf.cast(image, "float32") - CIFAR.mean) / CIFAR.std


# Sources


def test_class_folders(tmp_path):
    images = class_folders(tmp_path / "train", 4) | class_folders(tmp_path / "test", 2)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    train, test = sources.find(str(tmp_path))
    assert (len(train), len(test)) == (12, 6)
    assert train.classes == ["cat", "dog", "eel"]
    for source in (train, test):
        for index in range(len(source)):
            image, label = source.read(tf.constant(index))
            path = Path(source.name(index))
            np.testing.assert_array_equal(image, images[path])
            assert train.classes[label] == path.parent.name


def test_hold_out_a_share_of_each_class(tmp_path):
    class_folders(tmp_path, 10)
    train, test = sources.find(str(tmp_path), holdout=0.2)
    names = [[source.name(i) for i in range(len(source))] for source in (train, test)]
    assert (len(names[0]), len(names[1])) == (24, 6)
    assert len({*names[0], *names[1]}) == 30
    labels = [int(test.read(tf.constant(i))[1]) for i in range(6)]
    assert labels == [0, 0, 1, 1, 2, 2]
    again = sources.find(str(tmp_path), holdout=0.2)[1]
    assert [again.name(i) for i in range(6)] == names[1]


def write_records(path, labels, size=8):
    images = []
    with tf.io.TFRecordWriter(str(path)) as writer:
        for label in labels:
            image = np.full((size, size, 3), label, np.uint8)
            features = {
                "image/encoded": tf.train.Feature(
                    bytes_list=tf.train.BytesList(value=[tf.io.encode_png(image).numpy()])
                ),
                "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
                "image/class/text": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"x"])),
            }
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())
            images.append(image)
    return images


def test_records_in_the_form_of_imagenet(tmp_path):
    write_records(tmp_path / "train-00000-of-00002", [3, 1])
    write_records(tmp_path / "train-00001-of-00002", [2, 4, 1])
    write_records(tmp_path / "validation-00000-of-00001", [4, 2])
    train, test = sources.find(str(tmp_path), classes=4)
    assert (len(train), len(test), len(train.classes)) == (5, 2, 4)
    for index, label in enumerate([3, 1, 2, 4, 1]):
        image, read = train.read(tf.constant(index))
        assert read == label - 1
        np.testing.assert_array_equal(image, np.full((8, 8, 3), label))
    assert train.name(3) == f"{tmp_path / 'train-00001-of-00002'}, record 1"


@pytest.mark.parametrize("name", ["train.tfrecord", "train_0.tfrecord", "train-0-of-1.tfrecords"])
def test_names_of_records(tmp_path, name):
    write_records(tmp_path / name, [3, 1])
    write_records(tmp_path / "val_0.tfrecord", [4])
    train, test = sources.find(str(tmp_path), classes=4)
    assert (len(train), len(test)) == (2, 1)


def test_to_test_needs_no_training_data(tmp_path):
    images = class_folders(tmp_path / "val", 2)
    assert len(sources.find_test(str(tmp_path))) == len(images)
    # What find holds out, where there is no such part.
    class_folders(tmp_path / "all", 10)
    train, test = sources.find(str(tmp_path / "all"), holdout=0.2)
    again = sources.find_test(str(tmp_path / "all"), holdout=0.2)
    assert [again.name(i) for i in range(len(again))] == [test.name(i) for i in range(len(test))]
    assert len(sources.find_test("digits", channels=1)) == 360
    with pytest.raises(DataError, match="There is no folder"):
        sources.find_test(str(tmp_path / "nowhere"))


def test_what_is_wrong_with_records(tmp_path):
    with pytest.raises(DataError, match="record 0: image/class/label must be from 1 to 2, got 3"):
        write_records(tmp_path / "train-00000-of-00001", [3, 1])
        sources.find(str(tmp_path), classes=2)
    whole = (tmp_path / "train-00000-of-00001").read_bytes()
    (tmp_path / "train-00000-of-00001").write_bytes(whole[:-20])
    with pytest.raises(DataError, match="train-00000-of-00001: record 1 does not end"):
        sources.find(str(tmp_path), classes=3)
    (tmp_path / "train-00000-of-00001").rename(tmp_path / "picture-00000-of-00001")
    with pytest.raises(DataError, match="must begin with train"):
        sources.find(str(tmp_path))


@pytest.mark.parametrize("what", ["label", "length"])
def test_a_bit_of_a_record_that_has_changed(tmp_path, what):
    file = tmp_path / "train-00000-of-00001"
    write_records(file, [1, 2, 1])
    write_records(tmp_path / "val-00000-of-00001", [1])
    data = bytearray(file.read_bytes())
    second = 16 + int.from_bytes(data[:8], "little")
    label = data.index(b"image/class/label", second)
    data[second if what == "length" else data.index(b"\x0a\x01\x02", label) + 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(tf.errors.DataLossError):
        list(tf.data.TFRecordDataset(str(file)))

    def read(**options):
        train, _ = sources.find(str(tmp_path), classes=2, **options)
        one = Pipeline(train, Images(mean=(0.0,) * 3, std=(1.0,) * 3), 1, lambda x: x, **options)
        return [int(labels[0]) + 1 for _, labels in one.evaluation()]

    with pytest.raises(DataError, match="train-00000-of-00001.* record 1"):
        read()
    with pytest.warns(UserWarning, match="Skipped. Cannot read .*train-00000-of-00001.* record 1"):
        # Where the next record begins is not known without the length.
        assert read(skip_bad=True) == ([1] if what == "length" else [1, 1])


def test_a_record_that_is_no_example(tmp_path):
    with tf.io.TFRecordWriter(str(tmp_path / "train.tfrecord")) as writer:
        writer.write(b"\xff\xfe no example")
    write_records(tmp_path / "val.tfrecord", [1])
    with pytest.raises(DataError, match="train.tfrecord, record 0: it is no tf.train.Example"):
        sources.find(str(tmp_path), classes=2)
    train, _ = sources.find(str(tmp_path), classes=2, skip_bad=True)
    one = Pipeline(train, CIFAR, 1, normalize, skip_bad=True)
    with (
        pytest.warns(UserWarning, match="record 0: it is no tf.train.Example"),
        pytest.raises(DataError, match="None of the images"),
    ):
        list(one.evaluation())


def special_files(folder):
    """Makes what is no file, by its name; returns what each is."""
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "null.png").symlink_to("/dev/null")
    (folder / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as one:
        # A path to a socket has to be short.
        here = os.getcwd()
        os.chdir(folder)
        try:
            one.bind("socket.png")
        finally:
            os.chdir(here)
    return {
        "pipe": "a named pipe",
        "link": "a link to nothing",
        "loop": "a link to nothing",
        "null": "a device",
        "folder": "a folder",
        "socket": "a socket",
    }


def test_what_is_no_file_among_the_images(tmp_path):
    class_folders(tmp_path, 2)
    (tmp_path / "cat" / "good.png").symlink_to(tmp_path / "dog" / "000.png")
    names = special_files(tmp_path / "cat")
    with pytest.raises(DataError, match=r"Cannot read .*cat/folder.png: it is a folder, not a fi"):
        sources.ClassFolders(tmp_path)
    with pytest.warns(UserWarning) as warned:
        assert len(sources.ClassFolders(tmp_path, skip_bad=True)) == 7
    said = sorted(str(each.message) for each in warned)
    assert said == [
        f"Skipped. Cannot read {tmp_path}/cat/{name}.png: it is {names[name]}, not a file"
        for name in sorted(names)
    ]
    (tmp_path / "emu").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="emu is a link to nothing"):
        sources.ClassFolders(tmp_path, skip_bad=True)
    os.mkfifo(tmp_path / "train-00000-of-00001")
    with pytest.raises(DataError, match="train-00000-of-00001: It is a named pipe"):
        sources.find(str(tmp_path))


def test_names_that_are_not_utf_8(tmp_path):
    images = class_folders(tmp_path, 2)
    name = os.fsdecode(b"\xff\n.png")
    (tmp_path / "dog" / "000.png").rename(tmp_path / "dog" / name)
    (tmp_path / "eel").rename(tmp_path / os.fsdecode(b"\xe9l"))
    one = pipeline(tmp_path, skip_bad=True)
    assert one.source.name(3) == rf"{tmp_path}/dog/\xff\n.png"
    np.testing.assert_array_equal(
        one.source.read(tf.constant(3))[0], images[tmp_path / "dog" / "000.png"]
    )
    (tmp_path / "dog" / name).write_bytes(b"garbage")
    with pytest.warns(UserWarning, match=r"\\xff\\n.png: "):
        assert sum(len(labels) for _, labels in one.evaluation()) == 5
    (tmp_path / "dog" / name).unlink()
    with pytest.raises(DataError, match=r"\\xff\\n.png: .*No such file"):
        list(pipeline_of(one.source))


def pipeline_of(source):
    return Pipeline(source, CIFAR, 4, normalize).evaluation()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("form", "mode"),
    [("PNG", "P"), ("BMP", "P"), ("BMP", "1"), ("BMP", "L"), ("BMP", "RGB"), ("GIF", "P")],
)
def test_forms_of_images(tmp_path, form, mode, channels):
    # Two colours, of which every form keeps both.
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :10] = 255
    if mode in ("P", "RGB"):
        pixels[:10, :10] = (200, 20, 120)
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).convert(mode, palette=Image.Palette.ADAPTIVE).save(
            tmp_path / name / f"1.{form.lower()}"
        )
    wanted = pixels if channels == 3 else (pixels @ [0.299, 0.587, 0.114])[..., None]
    read, _ = sources.ClassFolders(tmp_path, channels).read(tf.constant(0))
    np.testing.assert_allclose(read, wanted, atol=4)
    file = tmp_path / "a" / f"1.{form.lower()}"
    file.write_bytes(file.read_bytes()[:60])
    images = Images(mean=(0.0,) * channels, std=(1.0,) * channels, crop=20)
    source = sources.ClassFolders(tmp_path, channels)
    with pytest.raises(DataError, match=f"Cannot read {file}: "):
        list(Pipeline(source, images, 2, lambda x: tf.cast(x, "float32")).evaluation())


def test_a_whole_image_of_another_size(tmp_path):
    images = class_folders(tmp_path, 4)
    odd = min(images)
    write_image(odd, np.zeros((8, 9, 3), np.uint8))
    whole = Images(mean=(0.0,) * 3, std=(1.0,) * 3)
    with pytest.raises(DataError, match=rf"{odd}: its size is 8, 9, 3 but the .* 32, 32, 3"):
        list(pipeline(tmp_path, images=whole).evaluation())
    one = pipeline(tmp_path, images=whole, batch_size=1, skip_bad=True)
    with pytest.warns(UserWarning, match=str(odd)):
        assert len(list(one.training(1, 0))) == 12
    assert one.bad == {0}


def test_a_class_of_one_image_is_trained_on(tmp_path):
    class_folders(tmp_path, 3)
    write_image(tmp_path / "one" / "1.png", np.zeros((32, 32, 3), np.uint8))
    with pytest.warns(UserWarning, match="Class one has one image, .*1.png: it is trained on"):
        train, test = sources.find(str(tmp_path), holdout=0.9)
    labels = [[int(s.read(tf.constant(i))[1]) for i in range(len(s))] for s in (train, test)]
    assert labels == [[0, 1, 2, 3], [0, 0, 1, 1, 2, 2]]


def test_what_is_wrong_with_folders(tmp_path):
    def message(path=tmp_path):
        with pytest.raises(DataError) as error:
            sources.find(str(path))
        return str(error.value)

    assert "There is no folder" in message(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "is not a folder" in message(tmp_path / "file")
    assert "has 0 class folders" in message()
    write_image(tmp_path / "train" / "cat" / "1.png", np.zeros((8, 8, 3), np.uint8))
    assert "has 1 class folders: cat" in message()
    (tmp_path / "train" / "dog").mkdir()
    assert f"{tmp_path / 'train' / 'dog'} holds no images" in message()
    write_image(tmp_path / "train" / "dog" / "1.png", np.zeros((8, 8, 3), np.uint8))
    for name in ("cat", "emu"):
        write_image(tmp_path / "val" / name / "1.png", np.zeros((8, 8, 3), np.uint8))
    assert "only in train: dog; only in val: emu" in message()
    (tmp_path / "train").rename(tmp_path / "other")
    assert "has val, but nothing named train" in message()


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=f"Cannot read {tmp_path}: Permission denied"):
        sources.find(str(tmp_path))


# Pipeline


def pipeline(folder, batch_size=4, images=CIFAR, **options):
    source = sources.ClassFolders(folder)
    return Pipeline(source, images, batch_size, normalize, **options)


def test_training_batches_depend_on_seed_and_epoch_only(tmp_path):
    class_folders(tmp_path, 6)
    one = pipeline(tmp_path)
    assert one.steps == 4
    batches = [batch for batch, _ in one.training(seed=1, epoch=0)]
    assert len(batches) == 4
    np.testing.assert_array_equal(batches, [b for b, _ in pipeline(tmp_path).training(1, 0)])
    np.testing.assert_array_equal(batches[2:], [b for b, _ in one.training(1, 0, first=2)])
    for other in (one.training(1, 1), one.training(2, 0)):
        assert not np.array_equal(batches[0], next(other)[0])


def test_an_epoch_has_every_image_once(tmp_path):
    images = class_folders(tmp_path, 4)
    plain = Images(mean=(0.0,) * 3, std=(1.0,) * 3)
    one = Pipeline(sources.ClassFolders(tmp_path), plain, 4, lambda x: tf.cast(x, "float32"))
    expected = sorted(image.tobytes() for image in images.values())
    for batches in (one.training(1, 0), one.evaluation()):
        seen = np.concatenate([images for images, _ in batches]).astype("uint8")
        assert sorted(image.tobytes() for image in seen) == expected
    assert one.shape == (32, 32, 3)


def test_evaluation_keeps_the_order_and_the_rest(tmp_path):
    class_folders(tmp_path, 3)
    batches = list(pipeline(tmp_path).evaluation())
    assert [len(labels) for _, labels in batches] == [4, 4, 1]
    labels = np.concatenate([labels for _, labels in batches])
    np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 1, 2, 2, 2])


@pytest.mark.parametrize("noise", [(0.0, 0.0, 0.9), (0.999, 0.4, 0.1), (0.5, 1 - 2**-24, 0.6)])
def test_augmentation_of_cifar(noise):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype("uint8")
    padded = np.zeros((40, 40, 3), np.float32)
    padded[4:-4, 4:-4] = (image.astype("float32") - CIFAR.mean) / CIFAR.std
    row, column = (int(x * 9) for x in noise[:2])
    expected = padded[row : row + 32, column : column + 32]
    if noise[2] >= 0.5:
        expected = expected[:, ::-1]
    result = prepare(tf.constant(image), CIFAR, normalize, tf.constant(noise, tf.float32))
    np.testing.assert_allclose(result, expected, atol=1e-6)


def bilinear(image, height, width):
    """Samples at the centres of the new pixels, as OpenCV and TensorFlow do."""

    def weights(new, old):
        centres = (np.arange(new) + 0.5) * old / new - 0.5
        result = np.zeros((new, old))
        for row, centre in zip(result, centres, strict=True):
            low = int(np.floor(centre))
            for at, weight in ((low, low + 1 - centre), (low + 1, centre - low)):
                row[min(max(at, 0), old - 1)] += weight
        return result

    rows, columns = (
        weights(*sizes) for sizes in ((height, image.shape[0]), (width, image.shape[1]))
    )
    return np.einsum("ih,jw,hwc->ijc", rows, columns, image)


@pytest.mark.parametrize("shape", [(48, 60, 3), (90, 40, 3), (20, 30, 3)])
def test_evaluation_takes_the_centre_of_the_resized_image(shape):
    images = Images(mean=CIFAR.mean, std=CIFAR.std, resize=37, crop=32, mirror=True)
    image = np.random.default_rng(0).integers(0, 256, shape).astype("uint8")
    scale = 37 / min(shape[:2])
    resized = bilinear(image, round(shape[0] * scale), round(shape[1] * scale))
    top, left = ((side - 32) // 2 for side in resized.shape[:2])
    expected = resized[top : top + 32, left : left + 32]
    result = prepare(tf.constant(image), images, normalize)
    np.testing.assert_allclose(result, (expected - CIFAR.mean) / CIFAR.std, atol=1e-4)


def test_a_bad_image_is_named_and_stops(tmp_path):
    class_folders(tmp_path, 4)
    bad = tmp_path / "dog" / "002.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(DataError, match=f"Cannot read {bad}: "):
        list(pipeline(tmp_path).training(1, 0))
    write_image(bad, np.zeros((20, 40, 3), np.uint8))
    with pytest.raises(DataError, match=f"Cannot read {bad}: .*too small to cut"):
        list(pipeline(tmp_path).evaluation())


def test_bad_images_are_skipped(tmp_path):
    class_folders(tmp_path, 4)
    for number in ("000", "003"):
        (tmp_path / "eel" / f"{number}.png").write_text("garbage")
    skipping = pipeline(tmp_path, skip_bad=True)
    with pytest.warns(UserWarning, match="eel/00[03].png") as warned:
        batches = list(skipping.training(1, 0))
    assert (len(warned), skipping.bad) == (2, {8, 11})
    assert [len(labels) for _, labels in batches] == [4, 4, 4]
    # Knowing them from the beginning, as after a resume, makes no difference.
    for (images, _), (again, _) in zip(batches, skipping.training(1, 0), strict=True):
        np.testing.assert_array_equal(images, again)
    assert sum(len(labels) for _, labels in skipping.evaluation()) == 10


def test_no_image_is_good(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_text("garbage")
    with pytest.warns(UserWarning), pytest.raises(DataError, match="None of the images"):
        list(pipeline(tmp_path, batch_size=1, skip_bad=True).evaluation())


# Schedule, policies, settings


@pytest.mark.parametrize(
    ("name", "epoch", "expected"),
    [
        ("resnet50", 0, 0),
        ("resnet50", 2.5, 0.05),
        ("resnet50", 5, 0.1),
        ("resnet50", 29.999, 0.1),
        ("resnet50", 30, 0.01),
        ("resnet50", 60, 0.001),
        ("resnet50", 80, 0.0001),
        ("googlenet_v1", 0, 0.06),
        ("googlenet_v1", 60, 0.03),
        ("lenet", 15, 0.001),
        ("lenet", 30, 0),
        ("vgg16", 70, 0.01),
    ],
)
def test_schedule(name, epoch, expected):
    recipe = zoo.recipe(name)
    assert learning_rate(recipe, epoch / recipe.epochs) == pytest.approx(expected)


def test_schedule_changes_at_the_exact_step():
    recipe = zoo.recipe("resnet50")
    rates = [learning_rate(recipe, step / 112_680) for step in (37_559, 37_560, 75_119, 75_120)]
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])


def test_plateaus():
    schedule = zoo.recipe("vgg16").schedule
    plateaus = Plateaus()
    accuracies = [0.1, 0.3, 0.3, 0.2, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    reductions = []
    for accuracy in accuracies:
        plateaus.update(schedule, accuracy, patience=2)
        reductions.append(plateaus.reductions)
    assert reductions == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3]
    assert learning_rate(zoo.recipe("vgg16"), 0.5, reductions=2) == pytest.approx(1e-4)


def test_policies_by_word():
    assert policy("float32") == keras.DTypePolicy("float32")
    assert policy("dfp16") == keras_dfp.DFPPolicy()
    assert policy("dfp16:scope=all") == keras_dfp.DFPPolicy(scope="all")
    assert policy("dfp16:mantissa_bits=10:rounding=stochastic") == keras_dfp.DFPPolicy(
        mantissa_bits=10, rounding="stochastic"
    )
    forward = policy("dfp16:accumulation=spill:products=forward+input_gradient")
    assert forward == keras_dfp.DFPPolicy(
        accumulation="spill", products=("forward", "input_gradient")
    )


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("int8", "There is no policy 'int8'; there are float32, dfp16"),
        ("float32:mantissa_bits=9", "float32 has no options"),
        ("dfp16:bits=9", "products, exponents, fused, scope; got 'bits=9'"),
        ("dfp16:mantissa_bits", "takes :option=value"),
        ("dfp16:mantissa_bits=7", "integer from 8 to 16; got 7"),
        ("dfp16:mantissa_bits=ten", "integer from 8 to 16; got 'ten'"),
        ("dfp16:rounding=up", "rounding must be one of"),
    ],
)
def test_policies_that_are_none(word, message):
    with pytest.raises(ValueError, match=message):
        policy(word)


def test_settings_follow_the_recipe():
    settings = Settings.of("resnet50", "x", batch_size=256, input_size=64)
    assert (settings.policy, settings.epochs) == ("dfp16", 90)
    assert settings.learning_rate == pytest.approx(0.025)
    assert (settings.recipe.images.resize, settings.recipe.images.crop) == (73, 64)
    assert settings.recipe.epochs == 90
    chosen = Settings.of("resnet20", "x", learning_rate=0.3, epochs=7)
    assert chosen.recipe.schedule.learning_rate == pytest.approx(0.3)
    assert (chosen.epochs, chosen.recipe.epochs) == (7, 164)
    with pytest.raises(RunError, match="lenet takes whole images"):
        Settings.of("lenet", "digits", input_size=9).recipe  # noqa: B018


# A step


def softmax(x):
    x = np.exp(x - x.max(axis=1, keepdims=True))
    return x / x.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_step_is_that_of_the_papers(smoothing):
    """Two steps of softmax regression, in NumPy: decay of the kernel before the momentum."""
    recipe = zoo.recipe("resnet20")
    rate, momentum, decay = 0.1, recipe.optimizer.momentum, recipe.optimizer.weight_decay * 1000
    random = np.random.default_rng(0)
    x = random.normal(size=(6, 5)).astype("float32")
    labels = np.array([0, 1, 2, 3, 4, 5], np.int32)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(7)])
    kernel, bias = (variable.numpy().astype("float64") for variable in model.weights)

    optimizer = network.optimizer(recipe)
    optimizer.build(model.trainable_variables)
    object.__setattr__(recipe.optimizer, "weight_decay", decay)
    step = network.train_step(model, optimizer, recipe, smoothing)
    targets = np.eye(7)[labels] * (1 - smoothing) + smoothing / 7
    velocity = [0.0, 0.0]
    for _ in range(2):
        logits = x @ kernel + bias
        loss = -(targets * np.log(softmax(logits))).sum(axis=1)
        top5 = np.argsort(-logits)[:, :5]
        sums = step(tf.constant(x), tf.constant(labels)).numpy()
        np.testing.assert_allclose(sums[0], loss.sum(), rtol=1e-5)
        assert sums[1] == (logits.argmax(axis=1) == labels).sum()
        assert sums[2] == (top5 == labels[:, None]).any(axis=1).sum()
        assert sums[3] == 6
        error = (softmax(logits) - targets) / 6
        gradients = (x.T @ error + decay * kernel, error.sum(axis=0))
        velocity = [momentum * v - rate * g for v, g in zip(velocity, gradients, strict=True)]
        kernel, bias = kernel + velocity[0], bias + velocity[1]
    np.testing.assert_allclose(model.weights[0].numpy(), kernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.weights[1].numpy(), bias, rtol=1e-4, atol=1e-6)


def test_decay_is_for_kernels():
    model = zoo.load("resnet20")
    decayed = [w.path for w in model.trainable_variables if network.is_kernel(w)]
    assert len(decayed) == 20
    assert all(path.endswith("/kernel") for path in decayed)


# Runs


def digits(**options):
    return Settings.of("lenet", "digits", **{"steps": 50, **options})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of lenet under dfp16, of 50 steps."""
    run = Run(digits(), tmp_path_factory.mktemp("run"), digits().find_data())
    run.train()
    return run


def test_a_run_learns_and_leaves_everything(finished):
    assert sorted(os.listdir(finished.folder)) == [
        "checkpoint.npz",
        "log.csv",
        "model.keras",
        "run.json",
        "tensorboard",
    ]
    progress = finished.progress
    assert (progress.step, len(progress.losses), len(progress.history)) == (50, 50, 2)
    assert np.mean(progress.losses[-5:]) < 0.9 * np.mean(progress.losses[:5])
    assert [row["step"] for row in progress.history] == [44, 50]
    lines = (finished.folder / "log.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,step,learning_rate,loss,top1,top5,test_loss")
    assert len(lines) == 3


def test_tensorboard_has_the_curve(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.folder / "tensorboard")).Reload()
    assert {"loss", "learning_rate", "epoch/test_top1"} <= set(events.Tags()["tensors"])
    assert [event.step for event in events.Tensors("loss")] == [10, 20, 30, 40, 50]


def test_a_finished_run_loads(finished):
    settings, model = load(finished.folder)
    assert settings == finished.settings
    for ours, trained in zip(model.weights, finished.model.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), trained.numpy())
    images, labels = next(finished.test.evaluation())
    saved = keras.models.load_model(finished.folder / "model.keras")
    logits = finished.model.predict_on_batch(images)
    np.testing.assert_allclose(saved.predict_on_batch(images), softmax(logits), atol=1e-5)
    hits = np.mean(logits.argmax(axis=1) == labels)
    assert hits > 0.5


@pytest.mark.slow
def test_a_folder_holds_one_run(finished):
    data = digits().find_data()
    with pytest.raises(RunError, match="holds a run already"):
        Run(digits(), finished.folder, data)
    with pytest.raises(RunError, match="holds another run: seed is 1, not 2"):
        Run(digits(seed=2), finished.folder, data, resume=True)
    fewer = (data[0].subset(np.arange(100)), data[1])
    with pytest.raises(RunError, match="holds another run: not the same images"):
        Run(digits(), finished.folder, fewer, resume=True)
    assert Run(digits(skip_bad=True), finished.folder, data, resume=True).finished
    assert Run(digits(), finished.folder, data, resume=True).finished


def test_a_run_killed_after_its_last_checkpoint_is_completed(finished, tmp_path):
    for name in ("run.json", "checkpoint.npz"):
        (tmp_path / name).write_bytes((finished.folder / name).read_bytes())
    Run(digits(), tmp_path, digits().find_data(), resume=True).train()
    files = ["checkpoint.npz", "log.csv", "model.keras", "run.json"]
    assert sorted(os.listdir(tmp_path)) == files
    for name in ("checkpoint.npz", "log.csv"):
        assert (tmp_path / name).read_bytes() == (finished.folder / name).read_bytes()


def test_a_checkpoint_of_something_else(finished, tmp_path):
    for name in ("run.json", "checkpoint.npz"):
        (tmp_path / name).write_bytes((finished.folder / name).read_bytes())
    (tmp_path / "checkpoint.npz").write_text("garbage")
    with pytest.raises(TrainingError, match="is not a checkpoint"):
        load(tmp_path)
    (tmp_path / "checkpoint.npz").unlink()
    with pytest.raises(RunError, match="has no checkpoint yet"):
        load(tmp_path)
    with pytest.raises(RunError, match="is not the folder of a run"):
        load(tmp_path / "nowhere")


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    settings = digits(learning_rate=1e30, policy="float32")
    run = Run(settings, tmp_path, settings.find_data())
    run.train()
    assert run.finished
    assert 1 < run.progress.diverged == run.progress.step < 50
    assert not (tmp_path / "model.keras").exists()
    again = Run(settings, tmp_path, settings.find_data(), resume=True)
    assert again.progress.diverged == run.progress.diverged
    result = comparison.Result.of(again)
    assert (result.diverged, result.steps[-1]) == (run.progress.diverged, len(result.losses))
    assert np.isfinite(result.losses).all()
    with pytest.raises(RunError, match="has no trained network: its loss was no longer a number"):
        load(tmp_path)


def test_a_test_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch):
    nothing = {"loss": np.nan, "top1": 0.1, "top5": 0.5}
    monkeypatch.setattr(network, "evaluate", lambda *arguments: nothing)
    run = Run(digits(), tmp_path, digits().find_data())
    run.train()
    assert (run.finished, run.progress.diverged, run.progress.history) == (True, 44, [])
    assert not (tmp_path / "model.keras").exists()


@pytest.mark.slow
def test_ctrl_c_while_testing(tmp_path, monkeypatch):
    evaluate = network.evaluate

    def interrupted_evaluate(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*arguments)

    settings = digits()
    run = Run(settings, tmp_path, settings.find_data())
    with monkeypatch.context() as patch:
        patch.setattr(network, "evaluate", interrupted_evaluate)
        with pytest.raises(KeyboardInterrupt):
            run.train()
    again = Run(settings, tmp_path, settings.find_data(), resume=True)
    assert (again.progress.step, again.progress.history) == (44, [])
    again.train()
    assert again.progress.losses[:44] == run.progress.losses
    assert [row["step"] for row in again.progress.history] == [44, 50]


def test_the_paper_s_policy_spares_the_first_and_the_last_layer(tmp_path):
    settings = digits(policy="dfp16_paper")
    run = Run(settings, tmp_path, settings.find_data())
    layers = [layer for layer in run.model.layers if layer.weights]
    on_integers = [layer.dtype_policy.decide(layer).format is not None for layer in layers]
    assert on_integers == [False, True, True, True, False]


def test_the_paper_s_policy_spares_the_classifier_and_not_an_auxiliary_one():
    settings = Settings.of("googlenet_v1", "x", input_size=32, policy="dfp16_paper")
    model = network.build(settings, (32, 32, 3), 4)
    assert len(model.outputs) == 3
    layers = [layer for layer in model.layers if layer.weights]
    spared = [la.name for la in layers if la.dtype_policy.decide(la).format is None]
    assert sorted(spared) == ["conv1", "predictions"]


def test_of_two_that_start_at_once_one_trains(tmp_path, monkeypatch):
    first, second = digits(steps=1, seed=1), digits(steps=1, seed=2)
    data, link, others = first.find_data(), os.link, []

    def link_late(source, target):
        # Another one, which found no run here either, was faster.
        monkeypatch.setattr(os, "link", link)
        others.append(Run(second, tmp_path, data))
        link(source, target)

    monkeypatch.setattr(os, "link", link_late)
    with pytest.raises(RunError, match="holds a run already"):
        Run(first, tmp_path, data)
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["seed"] == 2


@pytest.mark.parametrize("classes", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_start_from_weights_of_a_run(finished, tmp_path, classes):
    class_folders(tmp_path / "grey", 3, size=8, classes="ab")
    settings = digits(steps=1, batch_size=2, weights=str(finished.folder / "model.keras"))
    if classes == 2:
        settings = dataclasses.replace(settings, data=str(tmp_path / "grey"), freeze=True)
    run = Run(settings, tmp_path / "run", settings.find_data())
    assert run.new_classifier == (classes == 2)

    def equal():
        pairs = zip(run.model.weights, finished.model.weights, strict=True)
        return [np.array_equal(ours.numpy(), theirs.numpy()) for ours, theirs in pairs]

    assert equal() == [True] * 8 + [classes == 10] * 2
    before = run.model.weights[-2].numpy()
    run.train()
    assert not np.array_equal(run.model.weights[-2].numpy(), before)
    assert equal() == [classes == 2] * 8 + [False] * 2


def test_weights_that_are_not_the_network_s(tmp_path):
    other = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(3, 3)])
    other.save(tmp_path / "other.keras")
    (tmp_path / "broken.keras").write_text("garbage")
    for name, message in (
        ("other.keras", "none that fit, or NaN or infinity, for its layer 'conv2d"),
        ("broken.keras", "cannot be read"),
        ("nowhere.keras", "No such file"),
    ):
        settings = digits(weights=str(tmp_path / name))
        with pytest.raises(RunError, match=message):
            Run(settings, tmp_path / "run", settings.find_data())
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match="no trained weights of 'lenet'.* --weights FILE"):
        digits(weights="imagenet")
    with pytest.raises(RunError, match="Random weights cannot be frozen"):
        digits(freeze=True)


def test_batches_larger_than_the_data(tmp_path):
    settings = digits(batch_size=1438)
    with pytest.raises(RunError, match="A batch of 1438 images is more than the 1437"):
        Run(settings, tmp_path, settings.find_data())


def command(*arguments):
    return [sys.executable, "-m", "keras_dfp", *map(str, arguments)]


@pytest.mark.parametrize("name", ["lenet", pytest.param("resnet20", marks=pytest.mark.slow)])
def test_resume_after_kill_9_changes_no_bit(name, tmp_path):
    """One has dropout, random layers, Adam; the other batch norm, decay, momentum, files."""
    data, options = "digits", ["--steps", 150]
    if name == "resnet20":
        data, options = tmp_path / "images", ["--steps", 16, "--batch-size", 8]
        class_folders(data, 14)
    train = command("train", name, "--data", data, "--deterministic", "--checkpoint-steps", 3)
    train += map(str, options)

    subprocess.run([*train, "--output", tmp_path / "whole"], check=True, capture_output=True)
    checkpoint = tmp_path / "killed" / "checkpoint.npz"
    with subprocess.Popen(
        [*train, "--output", tmp_path / "killed"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        while not checkpoint.exists() or read_step(checkpoint) < 6:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        process.kill()
    assert not (tmp_path / "killed" / "model.keras").exists()
    # What a process leaves that is killed while it writes.
    (tmp_path / "killed" / ".writing-x").mkdir()
    resume = [*train, "--output", tmp_path / "killed", "--resume"]
    output = subprocess.run(resume, check=True, capture_output=True, text=True).stdout
    assert "of which" in output
    assert sorted(os.listdir(tmp_path / "killed")) == sorted(os.listdir(tmp_path / "whole"))

    with np.load(tmp_path / "whole" / "checkpoint.npz") as whole, np.load(checkpoint) as killed:
        assert whole.files == killed.files
        for key in set(whole.files) - {"state"}:
            np.testing.assert_array_equal(whole[key], killed[key])
        losses = [json.loads(str(arrays["state"]))["losses"] for arrays in (whole, killed)]
    assert losses[0] == losses[1]


def read_step(checkpoint):
    with np.load(checkpoint) as arrays:
        return json.loads(str(arrays["state"]))["step"]


# Comparisons


@pytest.mark.slow
def test_policies_start_from_equal_weights_and_see_equal_batches(tmp_path):
    settings = digits(steps=3)
    seen, losses = [], []
    for name in ("float32", "dfp16", "dfp16_paper", "mixed_bfloat16"):
        run = comparison.start(settings, name, 5, tmp_path, settings.find_data())
        seen.append([variable.numpy() for variable in run.model.variables])

        def step(images, labels, note, arrays=seen[-1], train_step=run._train_step):
            arrays += [images.numpy(), labels.numpy()]
            return train_step(images, labels, note)

        run._train_step = step
        run.train()
        losses.append(run.progress.losses)
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-4)
    np.testing.assert_allclose(losses[0][0], losses[3][0], rtol=0.05)


def result(policy, seed, top1, diverged=None):
    row = {"loss": 10 * top1, "test_loss": 20 * top1, "test_top1": top1, "test_top5": 0.9}
    row["images_per_second"] = 10.0
    return comparison.Result(policy, seed, [1, 2], [3.0, 1.0], [row], diverged)


def test_paired_differences():
    results = [
        result(name, seed, top1)
        for name, tops in (("float32", (0.5, 0.6, 0.7)), ("dfp16", (0.51, 0.59, 0.73)))
        for seed, top1 in enumerate(tops)
    ]
    results += [result("bits", 0, 0.4), result("bits", 1, 0.1, diverged=7)]
    first, second, third = comparison.summary(results)
    assert first["test_top1_difference"] is None
    # Differences 0.01, -0.01, 0.03; t with two degrees of freedom is 4.3027 at 97.5 %.
    assert second["test_top1_difference"] == pytest.approx(0.01)
    assert second["test_top1_interval"] == pytest.approx(4.3027 * 0.02 / 3**0.5, rel=1e-4)
    # Losses are ten times the accuracies.
    assert second["loss_difference"] == pytest.approx(0.1)
    assert second["test_loss_interval"] == pytest.approx(second["test_top1_interval"] * 20)
    assert second["test_top1_std"] == pytest.approx(np.std([0.51, 0.59, 0.73], ddof=1))
    assert (third["runs"], third["diverged"], third["test_top1_interval"]) == (1, 1, None)
    assert third["test_top1_difference"] == pytest.approx(-0.1)
    lines = comparison.table([first, second, third]).splitlines()
    assert "| 61.00% ± 11.14 " in lines[3]
    assert "| +1.00 ± 4.97 " in lines[3]
    assert "| +0.1000 ± 0.4968 " in lines[3]
    assert "| -1.0000 " in lines[4]
    assert "1, 1 diverged" in lines[4]
    assert len(set(map(len, lines))) == 1


def test_how_far_curves_are_apart():
    def run(policy, seed, *losses):
        return dataclasses.replace(result(policy, seed, 0.5), losses=list(losses))

    first, second, third = comparison.summary(
        [
            run("float32", 0, 3.0, 1.0),
            run("float32", 1, 5.0, 2.0),
            run("dfp16", 0, 3.5, 1.0),
            run("dfp16", 1, 5.5, 1.0),
            run("bits", 1, 5.0, 8.0),
        ]
    )
    # Between the seeds, the deviation is half the square root of two times the difference.
    spread = (2 + 1) / 2 / 2**0.5
    assert first["curve_gap"] is None
    assert second["curve_gap"] == pytest.approx((0.5 + 0.5) / 2)
    # Of the seeds that both have.
    assert third["curve_gap"] == pytest.approx((0 + 6) / 2)
    assert all(row["curve_spread"] == pytest.approx(spread) for row in (first, second, third))
    assert f"| 0.5000 / {spread:.4f}" in comparison.table([first, second, third])
    assert comparison.summary([run("a", 0, 1.0), run("b", 0, 1.5)])[1]["curve_spread"] is None


def test_curves_have_few_points():
    losses = [float(x) for x in range(1000)]
    steps, means = comparison.curve(losses[:200], 200)
    assert (steps, means) == ([*range(1, 201)], losses[:200])
    steps, means = comparison.curve(losses[:999], 999)
    assert (len(steps), steps[:2], steps[-1]) == (200, [5, 10], 999)
    assert (means[0], means[-1]) == (2.0, 996.5)
    # Of a run that diverged.
    steps, means = comparison.curve(losses[:7], 1000)
    assert (steps, means) == ([5, 7], [2.0, 5.5])
    assert len(comparison.curve(losses[:201], 201)[0]) == 101


def test_a_study_goes_on_from_its_results_alone(tmp_path):
    settings = digits(steps=2)
    results = [result("float32", 1, 0.5), result("dfp16", 1, 0.6, diverged=3)]
    data = settings.find_data()
    comparison.write(tmp_path, settings, data, results)
    kept = comparison.kept(tmp_path, dataclasses.replace(settings, data="elsewhere"), data)
    assert kept == {("float32", 1): results[0], ("dfp16", 1): results[1]}
    assert comparison.kept(tmp_path / "nowhere", settings, data) == {}
    with pytest.raises(RunError, match="results of another study: steps is 2, not 3"):
        comparison.kept(tmp_path, digits(steps=3), data)
    fewer = (data[0].subset(np.arange(100)), data[1])
    with pytest.raises(RunError, match="results of another study: not the same images"):
        comparison.kept(tmp_path, settings, fewer)
    for content in ("", "[]", '{"settings": {}, "runs": [{}]}'):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(RunError, match=r"results\.json does not hold results"):
            comparison.kept(tmp_path, settings, data)


@pytest.mark.slow
def test_a_study_is_made_by_one_process_at_a_time(tmp_path):
    program = (
        "import sys, pathlib; from keras_dfp.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"in\n"
        settings = digits(steps=1)
        run = Run(settings, tmp_path, settings.find_data())
        with pytest.raises(BlockingIOError, match="Another process is writing to"):
            run.train()
        compare = command("compare", "lenet", "--steps", 1, "--output", tmp_path)
        refused = subprocess.run(compare, capture_output=True, text=True)
        assert refused.returncode == 1
        assert "Error: Another process is writing to" in refused.stderr
        other.stdin.close()
    run.train()
    assert run.finished


def test_a_plot_with_runs_that_diverged(tmp_path):
    results = [result("float32", 1, 0.5), result("float32", 2, 0.5, diverged=2)]
    results += [result("dfp16", 1, 0.5, diverged=1)]
    comparison.plot(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# Export


def test_response_normalization_of_keras_ops():
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 7)).astype("float32") * 5
    layer = LocalResponseNormalization(alpha=0.01)
    inputs = keras.Input((3, 3, 7))
    graph = keras.Model(inputs, layer.of_keras_ops(inputs))
    np.testing.assert_allclose(graph(x), layer(x), rtol=1e-5)


@pytest.mark.slow
def test_plain_networks_load_without_this_package(tmp_path):
    # It has what others have not: response normalisation, auxiliary outputs.
    settings = Settings.of("googlenet_v1", "x", input_size=32)
    model = network.build(settings, (32, 32, 3), 4)
    plain = network.plain(model, settings)
    plain.save(tmp_path / "plain.keras")
    plain.export(tmp_path / "saved", verbose=False)
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    program = """
import sys
sys.modules["keras_dfp"] = None
import keras, numpy as np, tensorflow as tf
x = np.load("x.npy")
np.save("keras.npy", keras.models.load_model("plain.keras").predict(x, verbose=0))
loaded = tf.saved_model.load("saved")
np.save("saved.npy", loaded.serve(x))
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    keras_dfp.set_model_policy(model, "float32")
    logits = keras.tree.flatten(model.predict(x, verbose=0))[0]
    for file in ("keras.npy", "saved.npy"):
        np.testing.assert_allclose(np.load(tmp_path / file), softmax(logits), atol=1e-5)


# On real data


@pytest.mark.slow
@pytest.mark.skipif(
    "KERAS_DFP_CIFAR10" not in os.environ, reason="KERAS_DFP_CIFAR10 names no folder of CIFAR-10"
)
def test_cifar10_learns_as_in_float32(tmp_path):
    settings = Settings.of("resnet20", os.environ["KERAS_DFP_CIFAR10"], steps=200, input_size=32)
    ends = []
    for name in ("float32", "dfp16"):
        run = comparison.start(settings, name, 1, tmp_path, settings.find_data())
        run.train()
        ends.append(np.mean(run.progress.losses[-30:]))
    # Chance is 2.3.
    assert max(ends) < 2.0
    assert abs(ends[0] - ends[1]) < 0.1


def test_without_a_terminal_a_line_a_minute_says_how_long_it_takes(tmp_path, monkeypatch, capsys):
    now = 1000.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now)
    progress = log.Log(tmp_path, 1, 3700, 100)
    assert progress.pace.left == "?"
    for step in range(1, 6):
        now += 25.0
        progress.step(step, 100, 0.5, 0.1)
    progress.close()
    # 300 images in 75 seconds; 3300 are left.
    assert capsys.readouterr().out == "step 3: loss 0.5000, 4 img/s, 13:45 left\n"
