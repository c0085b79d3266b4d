"""What a run is: its network, its data and every number that it depends on."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

from keras_dfp import zoo
from keras_dfp.exchange import EXCHANGES
from keras_dfp.recipe import Recipe
from keras_dfp.training import sources
from keras_dfp.training.errors import RunError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is; `Settings.of` takes from the recipe what nobody has chosen.

    Attributes:
        network: One of `zoo.list()`.
        data: As for `sources.find`.
        policy: As for `policies.policy`.
        epochs: Length of the training. The recipe's schedule is stretched or compressed to it.
        batch_size: Images in a step.
        learning_rate: The highest learning rate.
        input_size: Pixels of a side of the network's input; `None` where it takes whole images.
        steps: The length in steps; goes before `epochs`.
        seed: Of initial weights, order, augmentation and dropout.
        label_smoothing: Share of the label that is spread over all classes.
        classes: Number of classes of TFRecords.
        holdout: Share of the data to test on where they have no part for that.
        skip_bad: Whether unreadable images are skipped; they stop the run otherwise.
        deterministic: Whether TensorFlow's ops are made to give the same bits in every run.
        weights: `"imagenet"` or a file, as for `zoo.load`, to start from; `None`: random ones.
        freeze: Whether only the classifier is trained.
        gradient_exchange: How several workers add up gradients: `"float32"` or `"dfp16"`.
        sync_batch_norm: Whether batch norm takes its statistics over the images of all workers.

    Raises:
        RunError: If a value is out of its range.
    """

    network: str
    data: str
    policy: str
    epochs: int
    batch_size: int
    learning_rate: float
    input_size: int | None = None
    steps: int | None = None
    seed: int = 1
    label_smoothing: float = 0.0
    classes: int = 1000
    holdout: float = 0.1
    skip_bad: bool = False
    deterministic: bool = False
    weights: str | None = None
    freeze: bool = False
    gradient_exchange: str = "float32"
    sync_batch_norm: bool = False

    def __post_init__(self) -> None:
        for name, right, wanted in (
            ("epochs", self.epochs > 0, "above 0"),
            ("steps", self.steps is None or self.steps > 0, "above 0"),
            ("batch_size", self.batch_size > 0, "above 0"),
            (
                "learning_rate",
                self.learning_rate > 0 and math.isfinite(self.learning_rate),
                "above 0 and finite",
            ),
            ("input_size", self.input_size is None or self.input_size > 0, "above 0"),
            ("seed", 0 <= self.seed < 2**31, "at least 0 and below 2**31"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1"),
            ("classes", self.classes > 1, "at least 2"),
            (
                "gradient_exchange",
                self.gradient_exchange in EXCHANGES,
                " or ".join(map(repr, EXCHANGES)),
            ),
            ("holdout", 0 < self.holdout < 1, "above 0 and below 1"),
        ):
            if not right:
                raise RunError(f"{name} must be {wanted}; got {getattr(self, name)!r}.")
        if self.weights == "imagenet":
            try:
                zoo.preprocessing(self.network, self.weights)
            except ValueError as error:
                raise RunError(f"{error} Or choose a file: --weights FILE.") from error
        if self.freeze and self.weights is None:
            raise RunError(
                "Random weights cannot be frozen: freeze needs weights to start from (--weights)."
            )

    @classmethod
    def of(cls, network: str, data: str, **chosen: Any) -> Settings:
        """Returns settings by the network's recipe.

        Args:
            network: One of `zoo.list()`.
            data: As for `sources.find`.
            **chosen: Other attributes; `None` stands for the recipe's value, or else the default.
                The recipe's learning rate changes in proportion to the batch size.

        Raises:
            RunError: If there is no such network, its recipe is wrong, or a value is.
        """
        given = {key: value for key, value in chosen.items() if value is not None}
        recipe = _recipe(network)
        batch_size = given.get("batch_size", recipe.batch_size)
        by_recipe = {
            "policy": recipe.policy,
            "epochs": recipe.epochs,
            "batch_size": batch_size,
            "learning_rate": recipe.scaled(batch_size).schedule.learning_rate,
            "input_size": recipe.images.crop,
        }
        return cls(network=network, data=data, **{**by_recipe, **given})

    def differences(
        self, known: dict[str, Any], facts: dict[str, Any], ignore: Sequence[str] = ()
    ) -> list[str]:
        """Returns, in words, what a file says that these settings and facts do not.

        Args:
            known: What the file holds: `settings`, and facts beside them. Where the data were does
                not matter: the same images may lie elsewhere now. Nor does what was to be done
                about unreadable images.
            facts: What `facts` returns, and more of the kind.
            ignore: Other settings that do not matter.
        """
        # Of what an older version did not know, the default was what it did.
        settings = {field.name: field.default for field in dataclasses.fields(self)}
        settings.update(known["settings"])
        return [
            f"{key} is {settings[key]}, not {value}"
            for key, value in dataclasses.asdict(self).items()
            if key not in ("data", "skip_bad", *ignore) and settings[key] != value
        ] + [f"not the same {key}" for key, value in facts.items() if known.get(key) != value]

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The network's recipe with these settings; `epochs` stays the recipe's own."""
        recipe = _recipe(self.network).scaled(self.batch_size)
        schedule = recipe.schedule
        ratio = self.learning_rate / schedule.learning_rate
        schedule = dataclasses.replace(
            schedule, learning_rate=self.learning_rate, warmup_from=schedule.warmup_from * ratio
        )
        recipe = dataclasses.replace(recipe, schedule=schedule)
        if self.input_size is None:
            return recipe
        if recipe.images.crop is None:
            raise RunError(
                f"{self.network} takes whole images, as they are: there is no input size to choose."
            )
        return recipe.resized(self.input_size)

    def facts(self, data: tuple[sources.Source, sources.Source]) -> dict[str, Any]:
        """Returns what else makes settings and their data what they are, for JSON.

        What is stored of a run begins with it, so that nothing goes on under another recipe, or
        with other images.
        """
        recipe = dataclasses.asdict(self.recipe)
        del recipe["source"]
        if recipe["optimizer"]["slots"] == "float32":
            # What was stored before there was a choice says nothing of it.
            del recipe["optimizer"]["slots"]
        return {
            # As it is when it is read again: with lists for tuples.
            "recipe": json.loads(json.dumps(recipe)),
            "classes": list(data[0].classes),
            "images": [len(part) for part in data],
        }

    def find_data(self) -> tuple[sources.Source, sources.Source]:
        """Returns what to train on and what to test on.

        Raises:
            DataError: If the data are not there or not right.
        """
        return sources.find(self.data, **self._source_options)

    def find_test_data(self) -> sources.Source:
        """Returns what to test on, without a look at what there is to train on.

        Raises:
            DataError: If the data are not there or not right.
        """
        return sources.find_test(self.data, **self._source_options)

    @property
    def _source_options(self) -> dict[str, Any]:
        return {
            "channels": len(self.recipe.images.mean),
            "classes": self.classes,
            "holdout": self.holdout,
            "skip_bad": self.skip_bad,
        }


def _recipe(network: str) -> Recipe:
    try:
        return zoo.recipe(network)
    except ValueError as error:
        raise RunError(str(error)) from error
