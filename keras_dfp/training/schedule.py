"""The learning rate of each step, as the recipe says."""

from __future__ import annotations

import dataclasses
import math

from keras_dfp.recipe import Cosine, Plateau, Polynomial, Recipe, Steps


@dataclasses.dataclass
class Plateaus:
    """What the kind of schedule that waits for plateaus remembers.

    Attributes:
        best: The highest validation accuracy so far.
        waited: Epochs since then, or since the last reduction.
        reductions: How often the rate was reduced.
    """

    best: float = -math.inf
    waited: int = 0
    reductions: int = 0

    def update(self, schedule: Plateau, accuracy: float, patience: int) -> None:
        """Takes note of an epoch's validation accuracy."""
        if accuracy > self.best:
            self.best, self.waited = accuracy, 0
            return
        self.waited += 1
        if self.waited >= patience and self.reductions < schedule.reductions:
            self.reductions, self.waited = self.reductions + 1, 0


def learning_rate(recipe: Recipe, progress: float, reductions: int = 0) -> float:
    """Returns the learning rate of one step.

    Args:
        recipe: The recipe, scaled to the batch size.
        progress: How much of the training has passed, 0 to 1. A run of another length than the
            recipe's goes through the same schedule, faster or slower.
        reductions: How often the rate was reduced on a plateau, where the recipe does that.
    """
    schedule, epoch = recipe.schedule, progress * recipe.epochs
    rate = schedule.learning_rate
    if epoch < schedule.warmup_epochs:
        risen = epoch / schedule.warmup_epochs
        return schedule.warmup_from + risen * (rate - schedule.warmup_from)
    match schedule:
        case Steps(at_epochs=at_epochs, factor=factor):
            # A boundary that coincides with a step counts for it, however the epoch was rounded.
            return rate * factor ** sum(epoch >= at - 1e-6 for at in at_epochs)
        case Polynomial(power=power):
            return rate * (1 - progress) ** power
        case Cosine():
            return rate * (1 + math.cos(math.pi * progress)) / 2
        case Plateau(factor=factor):
            return rate * factor**reductions
    raise TypeError(f"There is no rate for a {type(schedule).__name__}.")
