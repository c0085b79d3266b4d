"""Where images come from: class folders, TFRecords or arrays; checked before anything starts.

A source knows its images by number: `read` decodes any one of them, in any order. Shuffling,
splitting, resuming in the middle of an epoch and naming a corrupt image need no more than that.
"""

from __future__ import annotations

import abc
import functools
import os
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_dfp.training.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
TEST_FOLDERS = ("val", "validation", "test")
# train-00000-of-01024, validation-00000-of-00128; with or without .tfrecord.
RECORDS = re.compile(r"^(?P<part>[A-Za-z]+).*?(-\d+-of-\d+(\.tfrecords?)?|\.tfrecords?)$")


class Source(abc.ABC):
    """Images and their classes.

    Attributes:
        classes: The names of the classes, in the order of their labels.
    """

    classes: Sequence[str]

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abc.abstractmethod
    def read(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns image `index` (uint8, height x width x channels) and its label (int32)."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Returns what a user knows image `index` by."""

    def subset(self, indices: np.ndarray) -> Source:
        """Returns the source that has only the images `indices`."""
        return _Subset(self, indices)


class _Subset(Source):
    def __init__(self, source: Source, indices: np.ndarray):
        self.source = source
        self.indices = indices
        self.classes = source.classes

    def __len__(self):
        return len(self.indices)

    def read(self, index):
        return self.source.read(tf.gather(self.indices, index))

    def name(self, index):
        return self.source.name(self.indices[index])


class ClassFolders(Source):
    """A folder of folders of images: one for each class, named after it.

    Args:
        folder: The folder. Files that are not images by their suffix are ignored.
        channels: 3 for colour, 1 for grey.

    Raises:
        DataError: If the folder cannot be read, or has not at least two classes of images.
    """

    def __init__(self, folder: Path, channels: int = 3):
        self.channels = channels
        self.classes = _folders(folder)
        files, labels = [], []
        for label, name in enumerate(self.classes):
            images = sorted(f for f in _listed(folder / name) if f.lower().endswith(SUFFIXES))
            if not images:
                raise DataError(
                    f"{folder / name} holds no images (files ending in {', '.join(SUFFIXES)})."
                )
            files += [os.path.join(folder, name, image) for image in images]
            labels += [label] * len(images)
        if len(self.classes) < 2:
            raise DataError(
                f"{folder} has {len(self.classes)} class folders{': ' if self.classes else ''}"
                f"{', '.join(self.classes)}. There must be at least two, each with the images of "
                "one class."
            )
        self.files = np.array(files)
        self.labels = np.array(labels, np.int32)
        # As tensors once, not in every epoch's graph.
        self._files, self._labels = tf.constant(self.files), tf.constant(self.labels)

    def __len__(self):
        return len(self.files)

    def read(self, index):
        return _decoded(tf.io.read_file(self._files[index]), self.channels), self._labels[index]

    def name(self, index):
        return str(self.files[index])


class Records(Source):
    """TFRecord files of ImageNet in their usual form.

    Each record is a `tf.train.Example` with `image/encoded`, the bytes of an image file, and
    `image/class/label`, an integer from 1 to the number of classes.

    Args:
        files: The files, in order.
        classes: Number of classes.
        channels: 3 for colour, 1 for grey.

    Raises:
        DataError: If a file is not a sequence of whole records, or its first record is not such an
            example.
    """

    def __init__(self, files: Sequence[Path], classes: int, channels: int = 3):
        self.files = files
        self.classes = [str(label) for label in range(1, classes + 1)]
        self.channels = channels
        indices = [_record_index(file) for file in files]
        self.counts = [len(index) for index in indices]
        # File, offset and length in bytes of each record: 24 bytes a record.
        self.records = np.array(
            [(n, *record) for n, index in enumerate(indices) for record in index], np.int64
        ).reshape(-1, 3)
        for first in np.cumsum([0, *self.counts[:-1]])[np.array(self.counts) > 0]:
            try:
                self.read(tf.constant(first))
            except tf.errors.OpError as error:
                raise DataError(f"{self.name(first)}: {reason(error)}") from error

    def __len__(self):
        return len(self.records)

    def read(self, index):
        record = tf.numpy_function(self._bytes, [index], tf.string, stateful=False)
        features = tf.io.parse_single_example(
            record,
            {
                "image/encoded": tf.io.FixedLenFeature([], tf.string),
                "image/class/label": tf.io.FixedLenFeature([], tf.int64),
            },
        )
        label = features["image/class/label"]
        known = tf.debugging.Assert(
            (label >= 1) & (label <= len(self.classes)),
            ["image/class/label must be from 1 to", f"{len(self.classes)}, got", label],
        )
        with tf.control_dependencies([known] if known is not None else []):
            label = tf.cast(label - 1, tf.int32)
        return _decoded(features["image/encoded"], self.channels), label

    def name(self, index):
        file = int(self.records[index, 0])
        return f"{self.files[file]}, record {index - sum(self.counts[:file])}"

    def _bytes(self, index):
        file, offset, length = self.records[index]
        with open(self.files[file], "rb") as opened:
            opened.seek(offset)
            return opened.read(length)


class Arrays(Source):
    """Images that are in memory.

    Args:
        images: uint8 array, images x height x width x channels.
        labels: int array of the images' labels.
        classes: The names of the classes.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]):
        self.images, self.labels = tf.constant(images), tf.constant(labels, tf.int32)
        self.classes = classes

    def __len__(self):
        return len(self.images)

    def read(self, index):
        return self.images[index], self.labels[index]

    def name(self, index):
        return f"image {index}"


def find(
    data: str, *, channels: int = 3, classes: int = 1000, holdout: float = 0.1
) -> tuple[Source, Source]:
    """Returns what to train on and what to test on.

    Args:
        data: `"digits"` for scikit-learn's handwritten digits, or a folder with one of
            - `train/` and `val/`, `validation/` or `test/`, each a folder of class folders;
            - TFRecord files whose names begin with `train` and with one of those;
            - class folders, or only one of these parts: then a share of each class is held out.
        channels: Channels of an image: 3 for colour, 1 for grey.
        classes: Number of classes of TFRecords.
        holdout: Share of the images to hold out; the same ones always.

    Raises:
        DataError: If there are no such data; the message says what is there.
    """
    if data == "digits":
        return digits()
    folder, parts = Path(data), _parts(Path(data), channels, classes)
    if "train" not in parts:
        raise DataError(f"{folder} has {', '.join(parts)}, but nothing named train.")
    train = parts.pop("train")()
    if not parts:
        return _split(train, holdout)
    part, open_test = next(iter(parts.items()))
    test = open_test()
    if list(test.classes) != list(train.classes):
        only = [
            f"only in {where}: {', '.join(sorted(a - b))}"
            for where, a, b in (
                ("train", set(train.classes), set(test.classes)),
                (part, set(test.classes), set(train.classes)),
            )
            if a - b
        ]
        raise DataError(f"{folder}: train and {part} have different classes; {'; '.join(only)}.")
    return train, test


def find_test(data: str, *, channels: int = 3, classes: int = 1000, holdout: float = 0.1) -> Source:
    """Returns what `find` tests on. Where that is a part of its own, there may be no other.

    Args:
        data, channels, classes, holdout: As for `find`.

    Raises:
        DataError: If there are no such data.
    """
    if data != "digits":
        parts = _parts(Path(data), channels, classes)
        for part in TEST_FOLDERS:
            if part in parts:
                return parts[part]()
    return find(data, channels=channels, classes=classes, holdout=holdout)[1]


def digits() -> tuple[Source, Source]:
    """Returns scikit-learn's 1,797 digits: 1,437 to train on, 360 to test on, always the same."""
    # Here and not above, because scikit-learn is optional.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype("uint8").reshape(-1, 8, 8, 1)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=0
    )
    names = [str(digit) for digit in range(10)]
    return Arrays(train_x, train_y, names), Arrays(test_x, test_y, names)


def reason(error: tf.errors.OpError) -> str:
    """Returns what went wrong, without TensorFlow's account of where."""
    message = re.sub(r"^\{\{.*?\}\} ", "", error.message.split(" [Op:")[0])
    # What an assertion has to say follows, a line each.
    _, _, asserted = message.partition("Summarized data: ")
    if asserted:
        message = " ".join(re.sub(r"^b'(.*)'$", r"\1", line) for line in asserted.split("\n"))
    return message.strip()


def _parts(folder: Path, channels: int, classes: int) -> dict[str, Callable[[], Source]]:
    """Returns what opens the parts of a folder, by name: train, and what there is to test on."""
    if not folder.exists():
        raise DataError(f"There is no folder {folder}. (scikit-learn's digits are: digits)")
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.")
    names = _listed(folder)
    known = ("train", *TEST_FOLDERS)
    records = [match for name in names if (match := RECORDS.match(name))]
    if not records:
        parts = {
            part: functools.partial(ClassFolders, folder / part, channels)
            for part in known
            if part in names
        }
        return parts or {"train": functools.partial(ClassFolders, folder, channels)}
    files = {
        part: [folder / match.string for match in records if match["part"] == part]
        for part in known
    }
    if not any(files.values()):
        raise DataError(
            f"{folder}: names of TFRecord files must begin with train, and with "
            f"{', '.join(TEST_FOLDERS[:-1])} or {TEST_FOLDERS[-1]}; got {records[0].string}."
        )
    return {
        part: functools.partial(Records, these, classes, channels)
        for part, these in files.items()
        if these
    }


def _split(source: Source, holdout: float) -> tuple[Source, Source]:
    """Holds out a share of each class, or of all images if the classes are not known."""
    labels = source.labels if isinstance(source, ClassFolders) else np.zeros(len(source), int)
    test = np.zeros(len(source), bool)
    shuffle = np.random.default_rng(0).permutation
    for label in np.unique(labels):
        images = shuffle(np.flatnonzero(labels == label))
        test[images[: max(1, round(holdout * len(images)))]] = True
    if test.all():
        raise DataError(f"{source.name(0)} and its kin: too few images to hold some out.")
    return source.subset(np.flatnonzero(~test)), source.subset(np.flatnonzero(test))


def _listed(folder: Path) -> list[str]:
    """Returns the names in a folder, sorted, but those that begin with a dot."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise DataError(f"Cannot read {folder}: {error.strerror}.") from error


def _folders(folder: Path) -> list[str]:
    return [name for name in _listed(folder) if (folder / name).is_dir()]


def _decoded(data: tf.Tensor, channels: int) -> tf.Tensor:
    return tf.io.decode_image(data, channels, expand_animations=False)


def _record_index(file: Path) -> list[tuple[int, int]]:
    """Returns offset and length in bytes of the records of a TFRecord file."""
    # A record: its length (uint64), a checksum (4 bytes), the data, a checksum.
    index, position = [], 0
    try:
        size = file.stat().st_size
        with open(file, "rb", buffering=0) as opened:
            while position < size:
                opened.seek(position)
                header = opened.read(12)
                length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else size
                if position + 16 + length > size:
                    raise DataError(
                        f"{file}: record {len(index)} does not end where it should: the file is "
                        "truncated, compressed or no TFRecord file."
                    )
                index.append((position + 12, length))
                position += 16 + length
    except OSError as error:
        raise DataError(f"Cannot read {file}: {error.strerror}.") from error
    return index
