"""Recipe: how a network is trained, read from a TOML file and checked key by key.

One class per table of the file; a field is a key, and its comment says what the key means.
"""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import keras

from keras_dfp import tables
from keras_dfp.optimizers import SLOTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """`[optimizer]`."""

    # "sgd" or "adam", Keras's; or "dfp_sgd" or "dfp_adam", the same in one native pass.
    name: str
    momentum: float = 0.0  # of sgd
    nesterov: bool = False  # of sgd
    # Of dfp_sgd and dfp_adam: "float32", or "dfp16" for moments in half the memory.
    slots: str = "float32"
    # Times each kernel (not biases, not batch norm) is added to its gradient, before the
    # momentum: the L2 penalty of the papers, not Keras's decoupled `weight_decay`.
    weight_decay: float = 0.0

    def __post_init__(self):
        names = ("sgd", "adam", "dfp_sgd", "dfp_adam")
        _check(self, "name", self.name in names, f"one of {', '.join(map(repr, names))}")
        sgd, native = self.name.endswith("sgd"), self.name.startswith("dfp_")
        _check(self, "slots", self.slots in SLOTS, " or ".join(map(repr, SLOTS)))
        fitting = native or self.slots == "float32"
        _check(self, "slots", fitting, "absent, because it is dfp_sgd's and dfp_adam's")
        _check(self, "momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        _check(self, "momentum", sgd or not self.momentum, "absent, because it is sgd's")
        _check(self, "nesterov", sgd or not self.nesterov, "absent, because it is sgd's")
        _check(self, "weight_decay", self.weight_decay >= 0, "at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """`[schedule]`: the learning rate over the training; `kind` chooses the class.

    Epochs are counted from 0 and may be fractions: after `s` steps of `n` to the epoch, `s / n`
    of them have passed, and the rate of the next step is that of epoch `s / n`.
    """

    learning_rate: float  # for the recipe's batch size; Recipe.scaled for others
    warmup_epochs: float = 0.0  # so long the rate rises along a line, whatever the kind ...
    warmup_from: float = 0.0  # ... from this to learning_rate

    def __post_init__(self):
        _check(self, "learning_rate", self.learning_rate > 0, "above 0")
        _check(self, "warmup_epochs", self.warmup_epochs >= 0, "at least 0")
        _check(
            self,
            "warmup_from",
            0 <= self.warmup_from <= self.learning_rate,
            "at least 0 and at most learning_rate",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps(Schedule):
    """`kind = "steps"`: the rate is multiplied by `factor` at each of `at_epochs`."""

    at_epochs: tuple[float, ...]
    factor: float

    def __post_init__(self):
        super().__post_init__()
        rising = all(a < b for a, b in zip((0, *self.at_epochs), self.at_epochs, strict=False))
        _check(self, "at_epochs", rising and self.at_epochs, "epochs above 0 that rise")
        _check(self, "factor", 0 < self.factor < 1, "above 0 and below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Polynomial(Schedule):
    """`kind = "polynomial"`: `learning_rate * (1 - epoch / epochs) ** power`."""

    power: float

    def __post_init__(self):
        super().__post_init__()
        _check(self, "power", self.power > 0, "above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """`kind = "cosine"`: `learning_rate * (1 + cos(pi * epoch / epochs)) / 2`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plateau(Schedule):
    """`kind = "plateau"`: the rate is multiplied by `factor`, at most `reductions` times, when the
    validation accuracy has not risen for `patience` epochs.
    """

    factor: float
    patience: int
    reductions: int

    def __post_init__(self):
        super().__post_init__()
        _check(self, "factor", 0 < self.factor < 1, "above 0 and below 1")
        _check(self, "patience", self.patience > 0, "above 0")
        _check(self, "reductions", self.reductions > 0, "above 0")


SCHEDULES = {"steps": Steps, "polynomial": Polynomial, "cosine": Cosine, "plateau": Plateau}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """`[images]`: how images of 0 to 255, channels RGB or grey, become the network's input."""

    # One value per channel: (image - mean) / std.
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None  # the shorter side becomes so long; absent: left as it is
    pad: int = 0  # training only: zeros (after mean and std) around the image
    # A square of this side is cut out: anywhere for training, from the centre for evaluation.
    # Absent: the whole image.
    crop: int | None = None
    mirror: bool = False  # training only: left and right are swapped in half of the images

    def __post_init__(self):
        one_each = len(self.mean) in (1, 3)
        _check(self, "mean", one_each, "one value for grey or three for RGB images")
        one_each = len(self.std) == len(self.mean)
        _check(self, "std", one_each and min(self.std) > 0, "as many values as mean, all above 0")
        _check(self, "resize", self.resize is None or self.resize > 0, "above 0")
        _check(self, "pad", self.pad >= 0, "at least 0")
        _check(self, "crop", self.crop is None or self.crop > 0, "above 0")
        fits = self.resize is None or self.crop is None or self.crop <= self.resize
        _check(self, "crop", fits, "at most resize")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained.

    Its hyper-parameters are the same for every dtype policy. Label smoothing is off.
    """

    name: str  # of the network; not in the file
    source: str  # where the numbers are from
    policy: str  # the dtype policy unless the user chooses another
    epochs: int
    batch_size: int  # that learning_rate belongs to
    optimizer: Optimizer
    schedule: Schedule
    images: Images
    # The weight of the loss of each auxiliary classifier; 0: the network has none.
    auxiliary_weight: float = 0.0

    def __post_init__(self):
        _check(self, "epochs", self.epochs > 0, "above 0")
        _check(self, "batch_size", self.batch_size > 0, "above 0")
        _check(self, "auxiliary_weight", self.auxiliary_weight >= 0, "at least 0")
        try:
            keras.dtype_policies.get(self.policy)
        except ValueError as error:
            raise ValueError(f"policy: {error}") from error

    def scaled(self, batch_size: int) -> Recipe:
        """Returns the recipe for another batch size, by the rule of linear scaling.

        `learning_rate` and `warmup_from` change in proportion to the batch size; all else stays
        (Krizhevsky 2014, arXiv 1404.5997; Goyal et al. 2017, arXiv 1706.02677).

        Example:

        >>> zoo.recipe("resnet50").scaled(256).schedule.learning_rate
        0.025
        """
        ratio = batch_size / self.batch_size
        schedule = dataclasses.replace(
            self.schedule,
            learning_rate=self.schedule.learning_rate * ratio,
            warmup_from=self.schedule.warmup_from * ratio,
        )
        return dataclasses.replace(self, batch_size=batch_size, schedule=schedule)

    def resized(self, size: int) -> Recipe:
        """Returns the recipe for another size of the network's input, in pixels.

        `resize`, where there is one, and `pad` change in the proportion of `crop`.
        """
        images = self.images
        if images.crop is None or images.crop == size:
            return self
        ratio = size / images.crop
        images = dataclasses.replace(
            images,
            crop=size,
            resize=None if images.resize is None else max(size, round(images.resize * ratio)),
            pad=round(images.pad * ratio),
        )
        return dataclasses.replace(self, images=images)


def read(path: Path, name: str) -> Recipe:
    """Returns the recipe of the network `name` that is in a TOML file.

    Raises:
        ValueError: If a key is unknown, missing or has a wrong value; the message says which, in
            which file, and what would be right.
        FileNotFoundError: If there is no such file.
    """
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
        table["optimizer"] = tables.make(Optimizer, _table(table, "optimizer"), "optimizer.")
        table["schedule"] = _schedule(_table(table, "schedule"))
        table["images"] = tables.make(Images, _table(table, "images"), "images.")
        if "name" in table:
            raise ValueError("unknown key 'name': a recipe is named after its folder.")
        return tables.make(Recipe, {**table, "name": name})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _table(table: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(table.get(key), dict):
        raise ValueError(f"there must be a table [{key}]; got {table.get(key)!r}.")
    return dict(table[key])


def _schedule(table: dict[str, Any]) -> Schedule:
    kind = table.pop("kind", None)
    if kind not in SCHEDULES:
        kinds = ", ".join(map(repr, SCHEDULES))
        raise ValueError(f"schedule.kind must be one of {kinds}; got {kind!r}.")
    return tables.make(SCHEDULES[kind], table, "schedule.")


def _check(instance: Any, key: str, right: Any, wanted: str) -> None:
    if not right:
        raise ValueError(f"{key} must be {wanted}; got {getattr(instance, key)!r}.")
