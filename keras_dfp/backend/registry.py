"""What Keras does differently under keras_dfp: one registry, put in place and taken back."""

from __future__ import annotations

import dataclasses
import dis
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from keras_dfp import internals


@dataclasses.dataclass(frozen=True)
class Replacement:
    """One attribute of Keras that is replaced while the plugin is installed.

    Args:
        owner: The module or class that holds the attribute itself, not by inheritance.
        name: The attribute's name.
        make: Takes the original and returns what stands in its place.
        parameters: The parameter names the original must have for the replacement to be right
            (a property: its setter), `"*"` standing for any name and a last `"..."` for any
            further ones.
        called_by: A function of Keras whose code must look the attribute up in its owner: else
            Keras calls something else, and the replacement would never run. `None` where any call
            of a public method is one.
        kind: The type that the attribute must have, if it is not a function.
    """

    owner: Any
    name: str
    make: Callable[[Any], Any]
    parameters: tuple[str, ...] = ("...",)
    called_by: Callable | None = None
    kind: type | None = None

    def __str__(self) -> str:
        return f"{getattr(self.owner, '__qualname__', self.owner.__name__)}.{self.name}"

    def check(self) -> None:
        """Raises RuntimeError if Keras's function is not the one this was written for."""
        if not hasattr(self.owner, self.name):
            raise internals.unknown(f"{self} does not exist")
        # Not `getattr`: `install` takes it from here, so that what is static stays static.
        if self.name not in vars(self.owner):
            raise internals.unknown(f"{self} is inherited")
        original = vars(self.owner)[self.name]
        if not (callable(original) if self.kind is None else isinstance(original, self.kind)):
            raise internals.unknown(f"{self} is a {type(original).__name__}")
        if self.kind is not types.ModuleType:
            self._check_parameters(
                original.fset
                if self.kind is property
                else original.__func__
                if self.kind is classmethod
                else original
            )
        if self.called_by is not None and not _looks_up(self.called_by, self.owner, self.name):
            raise internals.unknown(
                f"{self} is not what {self.called_by.__module__}.{self.called_by.__qualname__} "
                "calls"
            )

    def _check_parameters(self, original) -> None:
        try:
            found = tuple(inspect.signature(original).parameters)
        except (TypeError, ValueError):
            raise internals.unknown(f"{self} does not tell its parameters") from None
        expected, compared = self.parameters, found
        if expected[-1:] == ("...",):
            expected = expected[:-1]
            compared = found[: len(expected)]
        if len(compared) != len(expected) or any(
            wanted not in ("*", name) for wanted, name in zip(expected, compared, strict=True)
        ):
            raise internals.unknown(
                f"the parameters of {self} are ({', '.join(found)}), "
                f"not ({', '.join(self.parameters)})"
            )


def _looks_up(function: Callable, owner, name: str) -> bool:
    """Tells whether the code of a function looks up `name` in `owner`.

    That of a class counts wherever `name` is looked up in something that is not a module.
    """
    function = inspect.unwrap(function)
    if not hasattr(function, "__code__"):
        return False
    scope, found = function.__globals__, None
    for instruction in _instructions(function.__code__):
        within, found = found, None
        match instruction.opname:
            case "LOAD_GLOBAL":
                within = sys.modules.get(function.__module__)
                found = scope.get(instruction.argval)
            case "IMPORT_NAME":
                found = sys.modules.get(instruction.argval)
                continue
            case "LOAD_ATTR" | "LOAD_METHOD" | "IMPORT_FROM":
                found = getattr(within, instruction.argval, None)
            case _:
                continue
        if instruction.argval == name and (
            within is owner
            or (isinstance(owner, type) and not isinstance(within, types.ModuleType))
        ):
            return True
    return False


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Yields the instructions of a function and of the functions inside it."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _instructions(constant)


REGISTRY: list[Replacement] = []
_originals: list[tuple[Replacement, Any]] = []


def replaces(
    owner: Any,
    name: str,
    parameters: str = "...",
    *,
    called_by: Callable | None = None,
    kind: type | None = None,
) -> Callable:
    """Decorator: registers `make(original) -> replacement` for `owner.name`, as `Replacement`."""

    def register(make):
        names = tuple(parameters.split())
        REGISTRY.append(Replacement(owner, name, make, names, called_by, kind))
        return make

    return register


def check() -> None:
    """Raises RuntimeError unless everything in Keras is as the plugin expects it."""
    if installed():
        return
    if internals.missing:
        raise internals.unknown(f"{internals.missing[0]} does not exist")
    for replacement in REGISTRY:
        replacement.check()


def install() -> None:
    """Puts every replacement of the registry in place; does nothing if it is already there.

    Raises:
        RuntimeError: If a function of this Keras does not look as expected. Nothing is replaced
            then.
    """
    if installed():
        return
    check()
    try:
        for replacement in REGISTRY:
            original = vars(replacement.owner)[replacement.name]
            made = replacement.make(original)
            setattr(replacement.owner, replacement.name, made)
            _originals.append((replacement, original))
    except BaseException:
        uninstall()
        raise


def uninstall() -> None:
    """Gives Keras back everything `install` replaced; policies of layers no longer matter then."""
    while _originals:
        replacement, original = _originals.pop()
        setattr(replacement.owner, replacement.name, original)


def installed() -> bool:
    """Returns whether Keras currently runs with the plugin."""
    return bool(_originals)
