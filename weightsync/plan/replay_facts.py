"""What a worker says of its replay of one model; read by the daemon too, so nothing of torch is here."""

from __future__ import annotations

import msgspec

__all__ = ["LAYOUTS", "NOT_WHOLE", "ReplayFacts", "least"]

LAYOUTS = 4  # that are remembered, the latest ones pushed
NOT_WHOLE = "its loader has to see some of this push"


class ReplayFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Counts are of pushed tensors (checkpoint names), as the layout has them that was pushed last."""

    phase: str  # of the last push: record | prove | replay; loader: nothing can be replayed; off: see `note`
    replayed: int = 0  # tensors that are replayed, or will be once that is proved
    replayed_bytes: int = 0
    by_loader: int = 0  # tensors that stay with the loader
    by_loader_bytes: int = 0
    pulled: int = 0  # buckets of the last push that were read where they lay, and not copied first
    moves: int = 0  # copies that a push comes to, neighbours joined
    why: dict[str, list[str]] = {}  # why tensors stay with the loader → the first of them, and "… and n more"
    note: str = ""  # why all began anew, or is off
    compares: bool = False  # whether it can say what lies in the engine's memory, where that is proved
    seconds: dict[str, float] = {}  # phase → seconds of loading in its last push; on a GPU, of queueing that


def least(workers: list[ReplayFacts]) -> ReplayFacts | None:
    """What the worker says that replays least; None if there is none."""
    return min(workers, key=lambda facts: facts.replayed_bytes if facts.phase == "replay" else -1, default=None)
