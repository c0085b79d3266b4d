"""How many images a second become a network's training input, when nothing waits for them.

The images are JPEG files of the size that most of ImageNet has, made of noise: as large on the disk
as photographs are, and in its cache after the first epoch, which is not timed.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_dfp import zoo
from keras_dfp.benchmarks.run import Doing
from keras_dfp.training import sources
from keras_dfp.training.pipeline import Pipeline

NETWORKS = ("resnet50", "vgg16", "googlenet_v1", "alexnet")
SIZE = (375, 500)  # height and width: three quarters of ImageNet's have them, or have them turned


def measure(settings: dict) -> Iterator[Doing | dict]:
    """Yields a row per network; settings: networks, batch, images, repeats."""
    networks, batch, images = (settings[key] for key in ("networks", "batch", "images"))
    epochs = settings["repeats"] + 1
    with tempfile.TemporaryDirectory() as folder:
        yield Doing(f"{images} images being written", 0)
        size = write_images(Path(folder), images)
        source = sources.ClassFolders(Path(folder))
        for i, network in enumerate(networks):
            pipeline = Pipeline(
                source, zoo.recipe(network).images, batch, zoo.preprocessing(network)
            )
            wall, cpu = [], []
            for epoch in range(epochs):
                share = (i + epoch / epochs) / len(networks)
                yield Doing(f"{network} epoch {epoch + 1}", share)
                start, start_cpu = time.perf_counter(), time.process_time()
                for _ in pipeline.training(seed=1, epoch=epoch):
                    pass
                wall.append(time.perf_counter() - start)
                cpu.append(time.process_time() - start_cpu)
            done = pipeline.steps * batch
            yield {
                "network": network,
                "images": done,
                "image_kb": size / images / 1e3,
                "images_per_s": done / statistics.median(wall[1:]),
                "cpu_ms": 1e3 * statistics.median(cpu[1:]) / done,
            }


def write_images(folder: Path, count: int) -> int:
    """Writes JPEG files in two class folders; returns their bytes."""
    rng = np.random.default_rng(0)
    height, width = SIZE
    written = 0
    for i in range(count):
        # Coarse noise with some fine on it: at quality 90 about 110 kB, ImageNet's average.
        coarse = rng.uniform(0, 255, (height // 25, width // 25, 3))
        pixels = tf.image.resize(coarse, SIZE) + rng.normal(0, 15, (height, width, 1))
        data = tf.io.encode_jpeg(tf.cast(tf.clip_by_value(pixels, 0, 255), tf.uint8), quality=90)
        path = folder / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data.numpy())
        written += path.stat().st_size
    return written
