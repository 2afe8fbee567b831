"""Sizes in words."""

from __future__ import annotations

__all__ = ["size"]


def size(nbytes: int) -> str:
    """Return a size in a form for people, in GiB, MiB or KiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}".replace(".0 ", " ")
    return f"{nbytes / 2**10:.0f} KiB"
