"""What Keras does differently under keras_dfp: one registry, put in place and taken back."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import keras


@dataclasses.dataclass(frozen=True)
class Replacement:
    """One attribute of Keras that is replaced while the plugin is installed.

    Args:
        owner: The module or class that holds the attribute.
        name: The attribute's name.
        make: Takes the original and returns what stands in its place.
        parameters: The parameter names the original must have for the replacement to be right,
            `"*"` standing for any name and a last `"..."` for any further ones; `None` if only its
            presence matters.
    """

    owner: Any
    name: str
    make: Callable[[Any], Any]
    parameters: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{getattr(self.owner, '__qualname__', self.owner.__name__)}.{self.name}"

    def check(self) -> None:
        """Raises RuntimeError if Keras's function is not the one this was written for."""
        original = getattr(self.owner, self.name, None)
        if original is None:
            raise self._unknown_keras("it does not exist")
        if self.parameters is None:
            return
        found = tuple(inspect.signature(original).parameters)
        expected, compared = self.parameters, found
        if expected[-1:] == ("...",):
            expected = expected[:-1]
            compared = found[: len(expected)]
        if len(compared) != len(expected) or any(
            wanted not in ("*", name) for wanted, name in zip(expected, compared, strict=True)
        ):
            raise self._unknown_keras(
                f"its parameters are ({', '.join(found)}), not ({', '.join(self.parameters)})"
            )

    def _unknown_keras(self, problem: str) -> RuntimeError:
        return RuntimeError(
            f"keras_dfp does not know Keras {keras.__version__}: {self}: {problem}. "
            "Nothing was installed. Use a Keras from 3.10 to 3.15, or a newer keras_dfp."
        )


REGISTRY: list[Replacement] = []
_originals: list[tuple[Replacement, Any]] = []


def replaces(owner: Any, name: str, parameters: str | None = None) -> Callable:
    """Decorator: registers `make(original) -> replacement` for `owner.name`."""

    def register(make):
        names = None if parameters is None else tuple(parameters.split())
        REGISTRY.append(Replacement(owner, name, make, names))
        return make

    return register


def install() -> None:
    """Puts every replacement of the registry in place; does nothing if it is already there.

    Raises:
        RuntimeError: If a function of this Keras does not look as expected. Nothing is replaced
            then.
    """
    if installed():
        return
    for replacement in REGISTRY:
        replacement.check()
    for replacement in REGISTRY:
        # Through `vars`, so that a static method or property comes back as what it was.
        original = vars(replacement.owner)[replacement.name]
        _originals.append((replacement, original))
        setattr(replacement.owner, replacement.name, replacement.make(original))


def uninstall() -> None:
    """Gives Keras back everything `install` replaced; policies of layers no longer matter then."""
    while _originals:
        replacement, original = _originals.pop()
        setattr(replacement.owner, replacement.name, original)


def installed() -> bool:
    """Returns whether Keras currently runs with the plugin."""
    return bool(_originals)
