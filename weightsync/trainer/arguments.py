"""What `push_weights` and `push_lora` are given, looked at before anything is done: the daemon would only send back
what a message cannot carry.
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
    """It, as an int; numpy's and torch's are as good. Raises `SourceError`."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number <= _MOST:
        raise SourceError(f"{name} = {value!r} is not a whole number from 0 to 2^60")
    return number


def checked_timeout(value: Any) -> float:
    """Seconds. Raises `SourceError`."""
    try:
        seconds = -1.0 if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = -1.0
    if not 0 < seconds <= _LONGEST:
        raise SourceError(f"timeout = {value!r} is not a number of seconds above 0, and up to {_LONGEST:g}")
    return seconds


def checked_model(value: Any) -> str:
    """The name of a model. Raises `SourceError`."""
    if not isinstance(value, str) or not 0 < len(value) <= _LETTERS or not value.isprintable():
        raise SourceError(f"model = {value!r} is not a name of 1 to {_LETTERS} characters")
    return value
