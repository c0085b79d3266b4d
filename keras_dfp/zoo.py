"""The zoo: networks of the paper, and small ones, with the recipes that train them.

>>> from keras_dfp import zoo
>>> zoo.list()
['alexnet', 'googlenet_v1', 'lenet', 'resnet20', 'resnet50', 'vgg16']
>>> model = zoo.load("resnet50", policy="dfp16")
>>> recipe = zoo.recipe("resnet50")                          # how to train it
>>> preprocess = zoo.preprocessing("resnet50")               # images as the recipe wants them

>>> model = zoo.load("resnet50", weights="imagenet")         # trained weights
>>> preprocess = zoo.preprocessing("resnet50", "imagenet")   # images as those weights want them

The networks themselves are in the folder `model_zoo`; docs/zoo.md says where they come from.
"""

from __future__ import annotations

import builtins
import contextlib
import difflib
import importlib
import inspect
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from keras_dfp import recipe as recipes
from keras_dfp.policy import policy_scope
from keras_dfp.recipe import Recipe

# Not `from keras_dfp import`: in a source tree it lies beside the package (source_tree.py).
model_zoo = importlib.import_module("keras_dfp.model_zoo")

# The networks whose trained weights keras.applications offers: its function, its preprocessing.
_IMAGENET = {
    "resnet50": (keras.applications.ResNet50, keras.applications.resnet50.preprocess_input),
    "vgg16": (keras.applications.VGG16, keras.applications.vgg16.preprocess_input),
}
_FOLDER = Path(model_zoo.__path__[0])


def load(
    name: str,
    input_shape: tuple[int, int, int] | None = None,
    classes: int | None = None,
    weights: str | os.PathLike | None = None,
    policy: str | keras.DTypePolicy | None = None,
    **options: Any,
) -> keras.Model:
    """Returns a network of the zoo.

    Args:
        name: One of `list()`.
        input_shape: Height, width and channels of an image. `None`: those of the network's paper,
            such as `(224, 224, 3)`.
        classes: Number of classes. `None`: 1000 for the networks of ImageNet, 10 for the others.
        weights: `None` for random ones, drawn as the recipe wants it; `"imagenet"` for those of
            `keras.applications`, downloaded at first use (`"resnet50"` and `"vgg16"` only); or a
            file: `.weights.h5`, `.keras`, or `.h5` of `keras.applications`. Each kind of weights
            wants its own input: `preprocessing(name, weights)`.
        policy: A `DFPPolicy` or any other dtype policy, or its name, for the layers of the model.
            `None`: the global policy. The global policy stays as it is.
        **options: What else the network's `build` takes, such as `classifier_activation=None` for
            logits, or `auxiliary=True` for GoogLeNet's auxiliary classifiers.

    Raises:
        ValueError: If there is no such network, option or `"imagenet"` weights, or if the weights
            do not fit.
        FileNotFoundError: If `weights` is a file that does not exist.
        OSError: If the `"imagenet"` weights cannot be downloaded.

    Example:

    >>> model = zoo.load("alexnet", input_shape=(64, 64, 3), classes=10, policy="dfp16")
    """
    _check_name(name)
    build = importlib.import_module(f"{model_zoo.__name__}.{name}.architecture").build
    defaults = {key: p.default for key, p in inspect.signature(build).parameters.items()}
    for option in options:
        if option not in defaults:
            known = [key for key in defaults if key not in ("input_shape", "classes")]
            raise ValueError(f"{name!r} has no option {option!r}; it has: {', '.join(known)}")
    if keras.config.image_data_format() != "channels_last":
        raise ValueError(
            "zoo.load: the networks of the zoo are channels_last, but Keras's image_data_format "
            f"is {keras.config.image_data_format()!r}. "
            "Call keras.config.set_image_data_format('channels_last')."
        )
    input_shape = _checked_shape(defaults["input_shape"] if input_shape is None else input_shape)
    classes = _checked_classes(defaults["classes"] if classes is None else classes)
    if weights == "imagenet":
        _check_imagenet(name)
        _check_imagenet_shape(name, input_shape, classes)
    elif weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(
            f"zoo.load: weights must be None, 'imagenet' or a file; there is no file {weights!r}."
        )
    with contextlib.nullcontext() if policy is None else policy_scope(policy):
        model = build(input_shape, classes, **options)
    if weights == "imagenet":
        application, _ = _IMAGENET[name]
        try:
            model.set_weights(application(weights="imagenet").get_weights())
        # Keras raises nothing more particular where it cannot download them.
        except Exception as error:
            raise OSError(
                f"zoo.load: cannot get the 'imagenet' weights of {name!r} from keras.applications: "
                f"{error}"
            ) from error
    elif weights is not None:
        try:
            model.load_weights(weights)
        # What Keras raises depends on what is wrong with the file.
        except Exception as error:
            raise ValueError(
                f"zoo.load: the weights in {os.fspath(weights)!r} do not fit {name!r} with input "
                f"{input_shape} and {classes} classes: {error}"
            ) from error
    return model


def recipe(name: str) -> Recipe:
    """Returns how a network of the zoo is trained.

    Args:
        name: One of `list()`.

    Raises:
        ValueError: If there is no such network, or if its file is wrong.
    """
    _check_name(name)
    return recipes.read(_FOLDER / name / "recipe.toml", name)


def preprocessing(
    name: str, weights: str | os.PathLike | None = None
) -> Callable[[Any], keras.KerasTensor]:
    """Returns the function that makes images the input of a network with certain weights.

    Args:
        name: One of `list()`.
        weights: What `load` was given. `"imagenet"`: the function is that of `keras.applications`.
            `None` or a file: it is that of the recipe, `(images - mean) / std`.

    Returns:
        A function from images, `(..., height, width, channels)` of 0 to 255, in any dtype, RGB or
        grey, to float32 of the same shape. It does not change the images' size. It may be called
        on arrays, on tensors and within `tf.data`.

    Raises:
        ValueError: If there is no such network, or no `"imagenet"` weights for it.

    Example:

    >>> preprocess = zoo.preprocessing("vgg16", "imagenet")
    >>> model.predict(preprocess(images))
    """
    _check_name(name)
    if weights == "imagenet":
        _check_imagenet(name)
        _, preprocess_input = _IMAGENET[name]
        return lambda batch: preprocess_input(
            keras.ops.cast(batch, "float32"), data_format="channels_last"
        )
    images = recipe(name).images
    return lambda batch: (keras.ops.cast(batch, "float32") - images.mean) / images.std


def _check_name(name: str) -> None:
    if name not in list():
        close = difflib.get_close_matches(str(name), list())
        raise ValueError(
            f"There is no network {name!r} in the zoo. "
            f"{'Did you mean' if close else 'There are'}: {', '.join(close or list())}"
        )


def _checked_shape(shape: Any) -> tuple[int, int, int]:
    try:
        height, width, channels = map(operator.index, shape)
    except (TypeError, ValueError):
        height = width = channels = 0
    if min(height, width, channels) < 1:
        raise ValueError(
            f"zoo.load: input_shape must be (height, width, channels), all above 0; got {shape!r}."
        )
    return height, width, channels


def _checked_classes(classes: Any) -> int:
    if not isinstance(classes, int) or classes < 1:
        raise ValueError(f"zoo.load: classes must be a whole number above 0; got {classes!r}.")
    return classes


def _check_imagenet(name: str) -> None:
    if name not in _IMAGENET:
        raise ValueError(
            f"There are no trained weights of {name!r}: keras.applications has none. "
            f"weights='imagenet' is for {' and '.join(map(repr, _IMAGENET))}."
        )


def _check_imagenet_shape(name: str, input_shape: tuple[int, int, int], classes: int) -> None:
    # fc1 of VGG-16 depends on the size of the images; nothing in ResNet-50 does.
    wanted = (224, 224, 3) if name == "vgg16" else (*input_shape[:2], 3)
    if input_shape != wanted or classes != 1000:
        raise ValueError(
            f"zoo.load: the 'imagenet' weights of {name!r} are for input {wanted} and 1000 "
            f"classes; got input {input_shape} and {classes} classes."
        )


# Last, because it hides Python's own from here on.
def list() -> builtins.list[str]:
    """Returns the names of the networks, sorted."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/recipe.toml"))
