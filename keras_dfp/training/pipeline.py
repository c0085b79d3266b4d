"""From a source to batches: decoded, augmented by the recipe, in parallel and ahead of their use.

Order and augmentation are functions of seed, epoch and image alone, so every policy sees the same
batches, and a run can begin in the middle of an epoch.
"""

from __future__ import annotations

import collections
import functools
import json
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from keras_dfp.recipe import Images
from keras_dfp.training.errors import DataError
from keras_dfp.training.sources import ERRORS, Source, reason
from keras_dfp.training.workers import Workers, alone

Batch = tuple[tf.Tensor, tf.Tensor]
# Images that are looked at to learn the size of whole ones.
SAMPLE = 50


class Pipeline:
    """Batches of one source, for training or for evaluation.

    Args:
        source: The images.
        images: How they become the network's input: the recipe's.
        batch_size: Images in a batch.
        normalize: The function from pixels of 0 to 255 to what the network's weights want:
            `zoo.preprocessing`.
        skip_bad: What to do about an image that cannot be read: warn, by name, and go on without
            it; or raise DataError.
        workers: Who shares every batch: each worker reads its own images only.

    Attributes:
        bad: Numbers of the images found to be unreadable.
        shape: Height, width and channels of what the network gets. Where the recipe takes whole
            images, that of most of them; the others cannot be read. May be assigned: that of
            another pipeline of the same network.
    """

    def __init__(
        self,
        source: Source,
        images: Images,
        batch_size: int,
        normalize: Callable,
        skip_bad: bool = False,
        workers: Workers | None = None,
    ):
        self.workers = workers or alone()
        self.source = source
        self.images = images
        self.batch_size = batch_size
        self.normalize = normalize
        self.skip_bad = skip_bad
        self.bad: set[int] = set()

    @property
    def steps(self) -> int:
        """Batches in an epoch of training; what is left over by them is left out of it."""
        return len(self.source) // self.batch_size

    @functools.cached_property
    def shape(self) -> tuple[int, int, int]:
        crop, channels = self.images.crop, len(self.images.mean)
        if crop is not None:
            return crop, crop, channels
        # All over the source: one that is wrong does not decide, nor a folder of them.
        some = np.linspace(0, len(self.source) - 1, min(SAMPLE, len(self.source)), dtype=int)
        shapes: collections.Counter[tuple[int, int, int]] = collections.Counter()
        for index in some.tolist():
            try:
                image = prepare(self.source.read(tf.constant(index))[0], self.images, lambda x: x)
            except ERRORS as error:
                if not self.skip_bad:
                    raise DataError(self._cannot_read(index, error)) from error
            else:
                shapes[tuple(image.shape)] += 1
        if not shapes:
            raise DataError("None of the images can be read.")
        return shapes.most_common(1)[0][0]

    def training(self, seed: int, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch of training, from batch `first` on: `steps - first`.

        Of each batch, they are the share of this worker.

        An epoch is a random order of all images. If unreadable ones are missing from it, it starts
        again from its beginning until all batches are full.
        """
        shape = self.shape
        random = np.random.default_rng((seed, epoch))
        everything = random.permutation(len(self.source))
        # Drawn here and not in the graph, where it would be a fifth of the work on a small image.
        noise = random.random((len(self.source), 3), np.float32)

        mine = self.workers.share(self.batch_size)

        def order():
            whole = np.resize(self._readable(everything), (self.steps, self.batch_size))
            return whole[:, mine].ravel()

        def example(index, noise):
            image, label = self.source.read(index)
            image = prepare(image, self.images, self.normalize, noise)
            return _of_shape(image, shape), label

        # An image that one worker cannot read changes the order for all.
        agree = self.skip_bad and self.workers.count > 1
        return self._batches(order, example, mine.stop - mine.start, agree, first, noise)

    def evaluation(self) -> Iterator[Batch]:
        """Yields all images once, in their own order; the last batch may be smaller.

        Of several workers, each yields its share of the images.
        """
        shape = self.shape

        def example(index):
            image, label = self.source.read(index)
            return _of_shape(prepare(image, self.images, self.normalize), shape), label

        everything = np.arange(len(self.source))
        mine = everything[self.workers.share(len(everything))]

        def order():
            return np.intersect1d(self._readable(everything), mine)

        # All workers together have a batch at a time, as one would.
        return self._batches(order, example, -(-self.batch_size // self.workers.count))

    def _readable(self, order: np.ndarray) -> np.ndarray:
        order = order[~np.isin(order, list(self.bad))] if self.bad else order
        if not len(order):
            raise DataError("None of the images can be read.")
        return order

    def _batches(
        self,
        order: Callable,
        example: Callable,
        size: int,
        agree: bool = False,
        done: int = 0,
        *of_each: np.ndarray,
    ) -> Iterator[Batch]:
        """Yields the batches of an order from batch `done` on.

        Args:
            order: Returns the numbers of the images, without those known to be bad.
            example: Makes an image and its label of its number, and of its row of `of_each`.
            size: Images of a batch.
            agree: Whether all workers must know before the next batch what one cannot read.
        """
        while True:
            # TensorFlow reports a bad image as an error of the batch that it is in. Which image it
            # was is looked up only then, so good images cost nothing.
            indices = order()[done * size :]
            dataset = (
                tf.data.Dataset.from_tensor_slices((indices, *(rows[indices] for rows in of_each)))
                .map(example, num_parallel_calls=tf.data.AUTOTUNE)
                .batch(size, num_parallel_calls=tf.data.AUTOTUNE)
                .prefetch(tf.data.AUTOTUNE)
            )
            iterator = iter(dataset)
            while len(indices):
                found = []
                try:
                    batch = next(iterator)
                except ERRORS as error:
                    found = self._find_bad(indices[:size], example, of_each, error)
                if agree:
                    everyone = self.workers.gathered(json.dumps(found).encode())
                    found = [index for each in everyone for index in json.loads(each)]
                if found:
                    self.bad.update(found)
                    break
                yield batch
                done, indices = done + 1, indices[size:]
            else:
                return

    def _find_bad(self, indices, example, of_each, error: Exception) -> list[int]:
        """Finds and reports the images of a batch that cannot be read; returns their numbers."""
        found: list[int] = []
        for index in indices.tolist():
            try:
                example(tf.constant(index), *(tf.constant(rows[index]) for rows in of_each))
            except ERRORS as cause:
                if not self.skip_bad:
                    raise DataError(self._cannot_read(index, cause)) from cause
                warnings.warn(f"Skipped. {self._cannot_read(index, cause)}", stacklevel=2)
                found.append(index)
        if not found:
            # Perhaps they could be read a moment later.
            raise DataError(f"Cannot make a batch of images: {reason(error)}") from error
        return found

    def _cannot_read(self, index: int, error: Exception) -> str:
        advice = "" if self.skip_bad else " (--skip-bad-images goes on without)"
        return f"Cannot read {self.source.name(index)}: {reason(error)}{advice}"


def prepare(
    image: tf.Tensor, images: Images, normalize: Callable, noise: tf.Tensor | None = None
) -> tf.Tensor:
    """Returns the network's input for one image.

    Args:
        image: uint8, height x width x channels, of any size.
        images: The recipe's.
        normalize: As for `Pipeline`.
        noise: Three numbers in [0, 1) that choose the crop (row, column) and the mirror, for
            training; `None` for evaluation: the centre, as it is.

    Returns:
        float32, height x width x channels; `crop` x `crop` where the recipe has one.
    """
    channels, shape = len(images.mean), tf.shape(image)
    if images.resize is not None:
        image = _resized(image, images.resize)
    image = normalize(image)
    if images.pad and noise is not None:
        image = tf.pad(image, [[images.pad] * 2, [images.pad] * 2, [0, 0]])
    if images.crop is not None:
        room = tf.shape(image)[:2] - images.crop
        enough = tf.debugging.Assert(
            tf.reduce_all(room >= 0),
            [f"too small to cut {images.crop}x{images.crop} pixels out of it:", shape],
        )
        with tf.control_dependencies([] if enough is None else [enough]):
            if noise is None:
                offset = room // 2
            else:
                offset = tf.cast(noise[:2] * tf.cast(room + 1, tf.float32), tf.int32)
                # Noise just below 1 may round up to the whole.
                offset = tf.minimum(offset, room)
        image = tf.slice(image, [offset[0], offset[1], 0], [images.crop, images.crop, channels])
    if images.mirror and noise is not None:
        image = tf.where(noise[2] < 0.5, image, image[:, ::-1])
    return image


def _of_shape(image: tf.Tensor, shape: tuple[int, int, int]) -> tf.Tensor:
    """Returns an image, which must have this shape."""
    right = tf.debugging.Assert(
        tf.reduce_all(tf.shape(image) == shape),
        ["its size is", tf.shape(image), "but the network's input", list(shape)],
    )
    with tf.control_dependencies([] if right is None else [right]):
        return tf.ensure_shape(tf.identity(image), shape)


def _resized(image: tf.Tensor, side: int) -> tf.Tensor:
    """Returns the image with its shorter side `side` pixels long, bilinearly."""
    shape = tf.cast(tf.shape(image)[:2], tf.float32)
    size = tf.cast(tf.round(shape * (side / tf.reduce_min(shape))), tf.int32)
    return tf.image.resize(image, size)
