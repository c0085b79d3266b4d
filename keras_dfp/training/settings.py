"""What a run is: its network, its data and every number that it depends on."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

from keras_dfp import zoo
from keras_dfp.recipe import Recipe
from keras_dfp.training import sources
from keras_dfp.training.errors import RunError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is. `None` stands for the recipe's value.

    Attributes:
        network: One of `zoo.list()`.
        data: As for `sources.find`.
        policy: As for `policies.policy`.
        seed: Of initial weights, order, augmentation and dropout.
        epochs: Length of the training. The recipe's schedule is stretched or compressed to it.
        steps: The same in steps; goes before `epochs`.
        batch_size: Images in a step; the learning rate changes in proportion to it.
        learning_rate: The highest learning rate, instead of the recipe's.
        label_smoothing: Share of the label that is spread over all classes.
        input_size: Pixels of a side of the network's input.
        classes: Number of classes of TFRecords.
        holdout: Share of the data to test on where they have no part for that.
        skip_bad: Whether unreadable images are skipped; they stop the run otherwise.
        deterministic: Whether TensorFlow's ops are made to give the same bits in every run.
    """

    network: str
    data: str
    policy: str | None = None
    seed: int = 1
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    label_smoothing: float = 0.0
    input_size: int | None = None
    classes: int = 1000
    holdout: float = 0.1
    skip_bad: bool = False
    deterministic: bool = False

    def resolved(self) -> Settings:
        """Returns these settings with the recipe's values where there were none."""
        recipe = zoo.recipe(self.network)
        batch_size = self.batch_size or recipe.batch_size
        rate = self.learning_rate or recipe.scaled(batch_size).schedule.learning_rate
        return dataclasses.replace(
            self,
            policy=self.policy or recipe.policy,
            epochs=self.epochs or recipe.epochs,
            batch_size=batch_size,
            learning_rate=rate,
            input_size=self.input_size or recipe.images.crop,
        )

    def differences(
        self, known: dict[str, Any], facts: dict[str, Any], ignore: Sequence[str] = ()
    ) -> list[str]:
        """Returns, in words, what a file says that these (resolved) settings and facts do not.

        Args:
            known: What the file holds: `settings`, and facts beside them. Where the data were does
                not matter: the same images may lie elsewhere now. Nor does what was to be done
                about unreadable images.
            facts: What `facts` returns, and more of the kind.
            ignore: Other settings that do not matter.
        """
        settings = known["settings"]
        return [
            f"{key} is {settings.get(key)}, not {value}"
            for key, value in dataclasses.asdict(self).items()
            if key not in ("data", "skip_bad", *ignore) and settings.get(key) != value
        ] + [f"not the same {key}" for key, value in facts.items() if known.get(key) != value]

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The network's recipe with these (resolved) settings; `epochs` stays the recipe's own."""
        recipe = zoo.recipe(self.network).scaled(self.batch_size)
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
        """Returns what else makes (resolved) settings and their data what they are, for JSON.

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
        }
