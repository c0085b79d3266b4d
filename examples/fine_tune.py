"""Fine-tunes a network on a folder of images, on integers.

    python fine_tune.py photos     photos/cat/1.jpg, photos/dog/7.png, ...; from the weights of
                                   ImageNet, which Keras downloads at first use
    python fine_tune.py            downloads nothing: a small network learns the handwritten digits
                                   0 to 6, and then 7, 8 and 9 from 20 images of each

First the new classifier alone, then all layers at a lower rate.
"""

import argparse
import tempfile
from pathlib import Path

import keras
import sklearn.datasets
from keras import layers

import keras_dfp


def classifier(base: keras.Model, classes: int) -> keras.Model:
    return keras.Sequential([base, layers.Dense(classes, activation="softmax")])


def train(model: keras.Model, rate: float, epochs: int, *data) -> None:
    loss = "sparse_categorical_crossentropy"
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    model.fit(*data, epochs=epochs, verbose=0)


def base_of_imagenet(size: int) -> keras.Model:
    base = keras.applications.MobileNetV2((size, size, 3), include_top=False, pooling="avg")
    return keras.Sequential([layers.Rescaling(1 / 127.5, -1), base])


def base_of_digits(size: int, folder: Path) -> keras.Model:
    """Returns a network that knows the digits 0 to 6; writes images of the others to the folder."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = keras.ops.repeat(images.reshape(-1, 8, 8, 1) * 15.9, 3, axis=-1)
    images = keras.ops.image.resize(images, (size, size)).numpy()
    for digit in (7, 8, 9):
        (folder / str(digit)).mkdir()
        for i, image in enumerate(images[labels == digit][:100]):
            keras.utils.save_img(folder / str(digit) / f"{i}.png", image, scale=False)

    base = keras.Sequential([keras.Input((size, size, 3)), layers.Rescaling(1 / 127.5, -1)])
    for filters in (16, 32, 64):
        base.add(layers.Conv2D(filters, 3, strides=2, padding="same", activation="relu"))
    base.add(layers.Flatten())
    train(classifier(base, 7), 2e-3, 5, images[labels < 7], labels[labels < 7])
    return base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="holds a folder for each class")
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    keras.utils.set_random_seed(1)

    # All that concerns integers.
    keras_dfp.set_policy("dfp16")

    size = 160 if args.folder else 32
    folder = args.folder or Path(tempfile.mkdtemp())
    base = base_of_imagenet(size) if args.folder else base_of_digits(size, folder)
    images, test = keras.utils.image_dataset_from_directory(
        folder,
        image_size=(size, size),
        validation_split=0.2 if args.folder else 0.8,
        subset="both",
        seed=1,
    )
    classes = images.class_names
    model = classifier(base, len(classes))
    for what, trainable, rate in (("classifier", False, 1e-2), ("all layers", True, 1e-4)):
        base.trainable = trainable
        train(model, rate, args.epochs, images)
        print(f"{what}: {model.evaluate(test, verbose=0)[1]:.1%} of the test images right")
    model.save("fine_tuned.keras")
    print("fine_tuned.keras tells", ", ".join(classes))


if __name__ == "__main__":
    main()
