"""Policies as words of a command: `dfp16`, `dfp16:mantissa_bits=10:rounding=stochastic`."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras

from keras_dfp.number import DFPFormat
from keras_dfp.policy import NAMES, DFPPolicy

POLICIES = ("float32", *NAMES, "mixed_bfloat16")
OPTIONS = (*(field.name for field in dataclasses.fields(DFPFormat)), "scope")


def policy(spelling: str) -> keras.DTypePolicy:
    """Returns the policy that a word stands for.

    Args:
        spelling: One of `POLICIES`; a DFPPolicy may be followed by its `OPTIONS`, each as
            `:option=value`. Several products are joined by `+`; `fused` is true or false.

    Raises:
        ValueError: If there is no such policy, option or value.

    Example:

    >>> policy("dfp16:mantissa_bits=10:products=forward+input_gradient")
    DFPPolicy('dfp16', mantissa_bits=10, products=['forward', 'input_gradient'])
    """
    name, *options = spelling.split(":")
    if name not in POLICIES:
        raise ValueError(f"There is no policy {name!r}; there are {', '.join(POLICIES)}.")
    if name not in NAMES:
        if options:
            raise ValueError(f"{name} has no options; got {':'.join(options)!r}.")
        return keras.DTypePolicy(name)
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if key not in OPTIONS or not equals:
            raise ValueError(
                f"{name} takes :option=value with the options {', '.join(OPTIONS)}; got {option!r}."
            )
        values[key] = value.split("+") if key == "products" else value
        if key == "mantissa_bits" and value.isdecimal():
            values[key] = int(value)
        if key == "fused" and value in ("true", "false"):
            values[key] = value == "true"
    return DFPPolicy(name, **values)
