"""Our version numbers in the one string that engines keep as their weight version.

"17" is a version of ours, "16>17" an engine on its way from one to the next: written before the first byte is loaded
and overwritten after the last, it tells whoever asks, a daemon restarted meanwhile above all, that the engine is torn.
Anything else ("default", a checkpoint's name) is none of ours.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from weightsync.errors import EngineLost

__all__ = ["WeightVersion", "check_marked", "read", "serving", "updating"]

_SERVING = re.compile(r"0|[1-9]\d{0,17}")
_UPDATING = re.compile(r"(?:0|[1-9]\d{0,17}|[^>]{0,64})>(0|[1-9]\d{0,17})")


class WeightVersion(NamedTuple):
    """What an engine's weight version says."""

    version: int | None  # None: none of ours
    torn: bool


def serving(version: int) -> str:
    """The string of an engine that holds all of `version`."""
    return str(version)


def updating(old: int | None, new: int) -> str:
    """The string of an engine that is being taken from `old` to `new`."""
    return f"{'' if old is None else old}>{new}"


def check_marked(text: object, version: int, engine: str) -> None:
    """Whoever answers at its address is the one that was marked as on its way to `version`: one that restarted since
    holds weights of its own. Raises `EngineLost`.
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
    """What an engine's weight version means; anything that is none of ours reads as no version, not torn."""
    if not isinstance(text, str):
        return WeightVersion(None, False)
    if _SERVING.fullmatch(text):
        return WeightVersion(int(text), False)
    if _UPDATING.fullmatch(text):
        old = text.partition(">")[0]
        return WeightVersion(int(old) if _SERVING.fullmatch(old) else None, True)
    return WeightVersion(None, False)
