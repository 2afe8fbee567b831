"""Our version numbers in the one string that engines keep as their weight version.

"17" is a version of ours. "16>17" marks an engine that is being taken from 16 to 17. The mark is written before the
first byte is loaded and overwritten after the last, so that even a restarted daemon sees that the engine is torn. Any
other string ("default", a checkpoint's name) is not ours.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from weightsync.errors import EngineLost

__all__ = ["WeightVersion", "check_marked", "read", "serving", "updating"]

_SERVING = re.compile(r"0|[1-9]\d{0,17}")
_UPDATING = re.compile(r"(?:0|[1-9]\d{0,17}|[^>]{0,64})>(0|[1-9]\d{0,17})")


class WeightVersion(NamedTuple):
    """The meaning of an engine's weight version."""

    version: int | None  # None: not a version of ours
    torn: bool


def serving(version: int) -> str:
    """Return the string for an engine that holds all of `version`."""
    return str(version)


def updating(old: int | None, new: int) -> str:
    """Return the string that marks an engine as being taken from `old` to `new`."""
    return f"{'' if old is None else old}>{new}"


def check_marked(text: object, version: int, engine: str) -> None:
    """Raise `EngineLost` unless `text` marks an engine that is being taken to `version`.

    An engine that was restarted meanwhile has no such mark: it holds its own checkpoint.
    """
    found = _UPDATING.fullmatch(text) if isinstance(text, str) else None
    if found is None or int(found[1]) != version:
        raise EngineLost(
            f"engine {engine} was restarted during the push: its weight version is {text!r}, not the mark of {version}",
            engine=engine,
            phase="resume",
            hint="the next push brings it up to date; if it was not restarted, let nobody else set its weight version",
        )


def read(text: object) -> WeightVersion:
    """Read an engine's weight version; a string that is not ours reads as no version and not torn."""
    if not isinstance(text, str):
        return WeightVersion(None, False)
    if _SERVING.fullmatch(text):
        return WeightVersion(int(text), False)
    if _UPDATING.fullmatch(text):
        old = text.partition(">")[0]
        return WeightVersion(int(old) if _SERVING.fullmatch(old) else None, True)
    return WeightVersion(None, False)
