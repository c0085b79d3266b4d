"""Dataclasses from the tables of a TOML or JSON file, checked key by key."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from typing import Any, ClassVar, Protocol, TypeVar


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=_Dataclass)

_PLAIN = {
    str: ("a string", "strings"),
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
}


def make(cls: type[T], table: Any, prefix: str = "", finite: bool = True) -> T:
    """Returns an instance of a dataclass from a table whose keys are its fields.

    Values are checked against the fields' types: str, bool, int, float, lists, tuples and tables
    of them, `None`, and dataclasses, of which an instance may also be there already.

    Args:
        cls: The dataclass.
        table: What a file holds.
        prefix: What comes before a key in a message, such as `"schedule."`.
        finite: Whether numbers must be finite.

    Raises:
        ValueError: If it is no table, or a key is unknown, missing or has a wrong value; the
            message says which, and what would be right.

    Example:

    >>> make(Images, {"mean": [0.5], "std": [0.5]}, "images.")
    """
    if not isinstance(table, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'it'} must be a table; got {_short(table)}.")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in table.keys() - fields.keys():
        raise ValueError(f"unknown key '{prefix}{key}'; there are: {', '.join(fields)}.")
    for key, field in fields.items():
        defaults = (field.default, field.default_factory)
        if key not in table and defaults == (dataclasses.MISSING, dataclasses.MISSING):
            raise ValueError(f"key '{prefix}{key}' is missing.")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in table.items():
        hint, name = hints[key], f"{prefix}{key}"
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            whole = isinstance(value, hint)
            values[key] = value if whole else make(hint, value, f"{name}.", finite)
            continue
        try:
            values[key] = _converted(value, hint, finite)
        except TypeError:
            raise ValueError(f"{name} must be {_words(hint)[0]}; got {_short(value)}.") from None
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def _converted(value: Any, hint: Any, finite: bool) -> Any:
    """Returns a value as its type wants it; raises TypeError if it is of none such."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is types.UnionType:
        for one in inner:
            with contextlib.suppress(TypeError):
                return _converted(value, one, finite)
        raise TypeError
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise TypeError
        return origin(_converted(each, inner[0], finite) for each in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError
        return {
            _converted(key, inner[0], finite): _converted(each, inner[1], finite)
            for key, each in value.items()
        }
    # A bool is an int to Python, not to a reader of the file.
    if isinstance(value, bool) != (hint is bool):
        raise TypeError
    if hint is not float:
        if not isinstance(value, hint):
            raise TypeError
        return value
    if not isinstance(value, (int, float)):
        raise TypeError
    try:
        number = float(value)
    except OverflowError:
        raise TypeError from None
    if finite and not math.isfinite(number):
        raise TypeError
    return number


def _words(hint: Any) -> tuple[str, str]:
    """Returns what a type is called, one of them and several."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return _words(next(one for one in reversed(inner) if one is not types.NoneType))
    if origin in (list, tuple):
        several = _words(inner[0])[1]
        return f"a list of {several}", f"lists of {several}"
    if origin is dict:
        several = "values" if inner[1] is Any else _words(inner[1])[1]
        return f"a table of {several}", f"tables of {several}"
    return _PLAIN[hint]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
