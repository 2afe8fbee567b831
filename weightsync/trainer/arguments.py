"""Checks the arguments of `push_weights` and `push_lora` before anything is done.

Without these checks, the daemon would have to refuse values that no message can carry.
"""

from __future__ import annotations

import operator
from typing import Any

from weightsync.errors import SourceError

__all__ = ["checked_model", "checked_timeout", "whole_number"]

_MOST = 2**60
_LONGEST = 1e9  # seconds: 30 years
_LETTERS = 256


def whole_number(name: str, value: Any) -> int:
    """Return `value` as an int. Integers of numpy and torch are accepted too. Raises `SourceError`."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number <= _MOST:
        raise SourceError(f"{name} = {value!r} is not a whole number from 0 to 2^60")
    return number


def checked_timeout(value: Any) -> float:
    """Return `value` as seconds. Raises `SourceError`."""
    try:
        seconds = -1.0 if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = -1.0
    if not 0 < seconds <= _LONGEST:
        raise SourceError(f"timeout = {value!r} is not a number of seconds above 0, and up to {_LONGEST:g}")
    return seconds


def checked_model(value: Any) -> str:
    """Return `value` if it can be the name of a model. Raises `SourceError`."""
    if not isinstance(value, str) or not 0 < len(value) <= _LETTERS or not value.isprintable():
        raise SourceError(f"model = {value!r} is not a name of 1 to {_LETTERS} characters")
    return value
