"""Where images come from: class folders, TFRecords or arrays; checked before anything starts.

A source knows its images by number: `read` decodes any one of them, in any order. Shuffling,
splitting, resuming in the middle of an epoch and naming a corrupt image need no more than that.
"""

from __future__ import annotations

import abc
import functools
import io
import os
import re
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_dfp.files import check_file, kind, shown
from keras_dfp.training.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
TEST_FOLDERS = ("val", "validation", "test")
# What TensorFlow raises about an image. The second: it quotes what it has read, which need not be
# text.
ERRORS = (tf.errors.OpError, UnicodeDecodeError)
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
        folder: The folder. What is no image by its suffix is ignored.
        channels: 3 for colour, 1 for grey.
        skip_bad: Whether to warn of what is no file, a named pipe for one, and go on without it,
            instead of raising DataError.

    Raises:
        DataError: If the folder cannot be read, or has not at least two classes of images.
    """

    def __init__(self, folder: Path, channels: int = 3, skip_bad: bool = False):
        self.channels = channels
        self.classes = [entry.name for entry in _listed(folder) if _is_class(entry)]
        files: list[bytes] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            images = [
                os.fsencode(entry.path)
                for entry in _listed(folder / name)
                if entry.name.lower().endswith(SUFFIXES) and _is_image(entry, skip_bad)
            ]
            if not images:
                raise DataError(
                    f"{shown(folder / name)} holds no images (files ending in "
                    f"{', '.join(SUFFIXES)})."
                )
            files += images
            labels += [label] * len(images)
        if len(self.classes) < 2:
            raise DataError(
                f"{shown(folder)} has {len(self.classes)} class folders"
                f"{': ' if self.classes else ''}{', '.join(map(shown, self.classes))}. There must "
                "be at least two, each with the images of one class."
            )
        # As bytes, because a name need not be text.
        self.files = np.array(files)
        self.labels = np.array(labels, np.int32)
        # As tensors once, not in every epoch's graph.
        self._files, self._labels = tf.constant(self.files), tf.constant(self.labels)

    def __len__(self):
        return len(self.files)

    def read(self, index):
        return _decoded(tf.io.read_file(self._files[index]), self.channels), self._labels[index]

    def name(self, index):
        return shown(os.fsdecode(self.files[index]))


class Records(Source):
    """TFRecord files of ImageNet in their usual form.

    Each record is a `tf.train.Example` with `image/encoded`, the bytes of an image file, and
    `image/class/label`, an integer from 1 to the number of classes.

    Args:
        files: The files, in order.
        classes: Number of classes.
        channels: 3 for colour, 1 for grey.
        skip_bad: Whether to warn of what cannot be read in a file, and go on without it, instead
            of raising DataError.

    Raises:
        DataError: If a file is not a sequence of whole records, or its first record is not such an
            example.
    """

    def __init__(
        self, files: Sequence[Path], classes: int, channels: int = 3, skip_bad: bool = False
    ):
        self.files = files
        self.classes = [str(label) for label in range(1, classes + 1)]
        self.channels = channels
        indices = [_record_index(file, skip_bad) for file in files]
        self.counts = [len(index) for index in indices]
        # File and offset in bytes of each record: 16 bytes a record.
        self.records = np.array(
            [(n, offset) for n, index in enumerate(indices) for offset in index], np.int64
        ).reshape(-1, 2)
        self._files = tf.constant([os.fsencode(file) for file in files])
        self._records = tf.constant(self.records)
        for first in np.cumsum([0, *self.counts[:-1]])[np.array(self.counts) > 0]:
            try:
                self.read(tf.constant(first))
            except ERRORS as error:
                if not skip_bad:
                    raise DataError(f"{self.name(first)}: {reason(error)}") from error

    def __len__(self):
        return len(self.records)

    def read(self, index):
        features = tf.io.parse_single_example(
            self._record(index),
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
        return f"{shown(self.files[file])}, record {index - sum(self.counts[:file])}"

    def _record(self, index: tf.Tensor) -> tf.Tensor:
        """Returns the bytes of a record; fails if they do not match its checksums."""
        # TensorFlow's reader, started at the record: no other op of it begins in the middle.
        record = self._records[index]
        dataset = tf.raw_ops.TFRecordDatasetV2(
            filenames=self._files[record[0]][None],
            compression_type="",
            buffer_size=0,
            byte_offsets=record[1][None],
        )
        kind_of_it = {"output_types": [tf.string], "output_shapes": [[]]}
        one = tf.raw_ops.TakeDataset(input_dataset=dataset, count=1, **kind_of_it)
        return tf.raw_ops.DatasetToSingleElement(dataset=one, **kind_of_it)[0]


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
    data: str,
    *,
    channels: int = 3,
    classes: int = 1000,
    holdout: float = 0.1,
    skip_bad: bool = False,
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
        skip_bad: Whether to warn of what cannot be read, and go on without it, instead of raising
            DataError; as far as it is found without reading the images.

    Raises:
        DataError: If there are no such data; the message says what is there.
    """
    if data == "digits":
        return digits()
    folder, parts = Path(data), _parts(Path(data), channels, classes, skip_bad)
    if "train" not in parts:
        raise DataError(f"{shown(folder)} has {', '.join(parts)}, but nothing named train.")
    train = parts.pop("train")()
    if not parts:
        return _split(train, holdout)
    part, open_test = next(iter(parts.items()))
    test = open_test()
    if list(test.classes) != list(train.classes):
        only = [
            f"only in {where}: {', '.join(map(shown, sorted(a - b)))}"
            for where, a, b in (
                ("train", set(train.classes), set(test.classes)),
                (part, set(test.classes), set(train.classes)),
            )
            if a - b
        ]
        raise DataError(
            f"{shown(folder)}: train and {part} have different classes; {'; '.join(only)}."
        )
    return train, test


def find_test(
    data: str,
    *,
    channels: int = 3,
    classes: int = 1000,
    holdout: float = 0.1,
    skip_bad: bool = False,
) -> Source:
    """Returns what `find` tests on. Where that is a part of its own, there may be no other.

    Args:
        data, channels, classes, holdout, skip_bad: As for `find`.

    Raises:
        DataError: If there are no such data.
    """
    if data != "digits":
        parts = _parts(Path(data), channels, classes, skip_bad)
        for part in TEST_FOLDERS:
            if part in parts:
                return parts[part]()
    return find(data, channels=channels, classes=classes, holdout=holdout, skip_bad=skip_bad)[1]


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


def reason(error: Exception) -> str:
    """Returns what went wrong, on a line, without TensorFlow's account of where."""
    if isinstance(error, UnicodeDecodeError):
        message = error.object.decode(errors="backslashreplace")
    else:
        message = error.message if isinstance(error, tf.errors.OpError) else str(error)
    if "Could not parse example input" in message:
        # All of it follows.
        return "it is no tf.train.Example."
    message = re.sub(r"^(\{\{.*?\}\} )+", "", message.split(" [Op:")[0])
    # What an assertion has to say follows, a line each.
    _, _, asserted = message.partition("Summarized data: ")
    if asserted:
        message = " ".join(
            re.sub(r"""^b(["'])(.*)\1$""", r"\2", line) for line in asserted.split("\n")
        )
    # Of what is raised in Python, TensorFlow repeats where.
    message = message.partition("\nTraceback (most recent call last)")[0]
    return re.sub(r"\s+", " ", message).strip()


def _parts(
    folder: Path, channels: int, classes: int, skip_bad: bool
) -> dict[str, Callable[[], Source]]:
    """Returns what opens the parts of a folder, by name: train, and what there is to test on."""
    if not folder.exists():
        raise DataError(f"There is no folder {shown(folder)}. (scikit-learn's digits are: digits)")
    if not folder.is_dir():
        raise DataError(f"{shown(folder)} is not a folder.")
    names = [entry.name for entry in _listed(folder)]
    known = ("train", *TEST_FOLDERS)
    records = [match for name in names if (match := RECORDS.match(name))]
    if not records:
        parts: dict[str, Callable[[], Source]] = {
            part: functools.partial(ClassFolders, folder / part, channels, skip_bad)
            for part in known
            if part in names
        }
        return parts or {"train": functools.partial(ClassFolders, folder, channels, skip_bad)}
    files = {
        part: [folder / match.string for match in records if match["part"] == part]
        for part in known
    }
    if not any(files.values()):
        raise DataError(
            f"{shown(folder)}: names of TFRecord files must begin with train, and with "
            f"{', '.join(TEST_FOLDERS[:-1])} or {TEST_FOLDERS[-1]}; got "
            f"{shown(records[0].string)}."
        )
    return {
        part: functools.partial(Records, these, classes, channels, skip_bad)
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
        if len(images) == 1 and isinstance(source, ClassFolders):
            warnings.warn(
                f"Class {shown(source.classes[label])} has one image, "
                f"{source.name(images[0])}: it is trained on, and not tested on.",
                stacklevel=2,
            )
        test[images[: min(max(1, round(holdout * len(images))), len(images) - 1)]] = True
    if not test.any():
        raise DataError(f"{source.name(0)} and its kin: too few images to hold some out.")
    return source.subset(np.flatnonzero(~test)), source.subset(np.flatnonzero(test))


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    """Returns what is in a folder, by name, but names that begin with a dot."""
    try:
        with os.scandir(folder) as entries:
            shown_ones = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"Cannot read {shown(folder)}: {error.strerror}.") from error
    return sorted(shown_ones, key=lambda entry: entry.name)


def _is_class(entry: os.DirEntry[str]) -> bool:
    """Tells whether it is a folder; a link to none would be a class that is lost."""
    path = Path(entry.path)
    if entry.is_symlink() and not path.exists():
        raise DataError(f"{shown(path)} is a link to nothing, not a folder of images.")
    return path.is_dir() if entry.is_symlink() else entry.is_dir()


def _is_image(entry: os.DirEntry[str], skip_bad: bool) -> bool:
    # Not of every file, because that takes time: a link only is asked where it leads.
    if os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
        return True
    _bad(f"{shown(entry.path)}: it is {kind(Path(entry.path))}, not a file", skip_bad)
    return False


def _bad(what: str, skip_bad: bool) -> None:
    """Reports what cannot be read."""
    if not skip_bad:
        raise DataError(f"Cannot read {what} (--skip-bad-images goes on without)")
    warnings.warn(f"Skipped. Cannot read {what}", stacklevel=3)


def _decoded(data: tf.Tensor, channels: int) -> tf.Tensor:
    """Returns the pixels of an image file: uint8, height x width x channels."""

    def decode(channels=channels):
        return tf.io.decode_image(data, channels, expand_animations=False)

    def grey():
        # TensorFlow has these in colour only.
        in_colour = tf.strings.substr(data, 0, 3) == b"GIF"
        return tf.cond(in_colour, lambda: tf.image.rgb_to_grayscale(decode(3)), decode)

    def bitmap():
        return tf.numpy_function(
            functools.partial(_bitmap, channels), [data], tf.uint8, stateful=False
        )

    # TensorFlow takes the numbers of a palette for grey.
    is_bitmap = tf.strings.substr(data, 0, 2) == b"BM"
    image = tf.cond(is_bitmap, bitmap, decode if channels == 3 else grey)
    return tf.ensure_shape(image, (None, None, channels))


def _bitmap(channels: int, data: bytes | np.ndarray) -> np.ndarray:
    """Returns the pixels of a BMP file."""
    # Outside of graphs, TensorFlow hands over an array of one element.
    data = data if isinstance(data, bytes) else data.item()
    # Here and not above, because Pillow is optional.
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["BMP"]) as image:
            pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    # What Pillow raises depends on what is wrong with the file.
    except Exception as error:
        raise tf.errors.InvalidArgumentError(None, None, f"it is a broken BMP: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _record_index(file: Path, skip_bad: bool) -> np.ndarray:
    """Returns where the records of a TFRecord file begin, in bytes."""
    # A record: its length (uint64), a checksum (4 bytes), the data, a checksum.
    headers, offsets, position, whole = [], [], 0, True
    try:
        check_file(file)
        size = file.stat().st_size
        with open(file, "rb", buffering=0) as opened:
            while position < size:
                opened.seek(position)
                header = opened.read(12)
                length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else size
                whole = position + 16 + length <= size
                if not whole:
                    break
                headers.append(header)
                offsets.append(position)
                position += 16 + length
    except OSError as error:
        _bad(f"{shown(file)}: {error.strerror}", skip_bad)
        return np.array([], np.int64)
    table = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, 12)
    expected = np.ascontiguousarray(table[:, 8:]).view("<u4").ravel()
    wrong = np.flatnonzero(_masked_crc(table[:, :8]) != expected)
    good = wrong[0] if len(wrong) else len(offsets)
    if len(wrong) or not whole:
        _bad(
            f"{shown(file)}: record {good} does not end where it should: the file is truncated, "
            "compressed or no TFRecord file, or a bit of it has changed",
            skip_bad,
        )
    return np.array(offsets[:good], np.int64)


def _masked_crc(data: np.ndarray) -> np.ndarray:
    """Returns the checksum that TFRecords have, CRC-32C turned and shifted, of each row of bytes.

    TensorFlow checks it too, but only of what it reads whole; here, it is that of every length, by
    which the next record is found.
    """
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(0x82F63B78), table >> 1)
    crc = np.full(len(data), 0xFFFFFFFF, np.uint32)
    for column in data.T:
        crc = table[crc & 0xFF ^ column] ^ crc >> 8
    crc = ~crc
    return (crc >> 15 | crc << 17) + np.uint32(0xA282EAD8)
