"""Downloads CIFAR-10 and writes it as the studies here used it: class folders, JPEG of quality 75.

python docs/accuracy/cifar10.py cifar10
"""

from pathlib import Path

import click
import keras
from tqdm import tqdm

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


@click.command(help=__doc__.split("\n")[0])
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    parts = zip(("train", "test"), keras.datasets.cifar10.load_data(), strict=True)
    for part, (images, labels) in parts:
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True, exist_ok=True)
        pairs = zip(images, labels.ravel(), strict=True)
        for number, (image, label) in enumerate(tqdm(pairs, part, len(images))):
            path = folder / part / CLASSES[label] / f"{number:05}.jpg"
            keras.utils.save_img(path, image, scale=False, quality=75)


if __name__ == "__main__":
    main()
