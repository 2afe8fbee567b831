"""Our version numbers in the one string that engines keep as their weight version.

"17" is a version of ours, "16>17" an engine on its way from one to the next: written before the first byte is loaded
and overwritten after the last, it tells whoever asks, a daemon restarted meanwhile above all, that the engine is torn.
Anything else ("default", a checkpoint's name) is none of ours.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["WeightVersion", "read", "serving", "updating"]

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
