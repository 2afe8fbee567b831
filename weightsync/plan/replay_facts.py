"""What a worker says of its replay of one model. The daemon reads it too, so nothing here imports torch."""

from __future__ import annotations

import msgspec

__all__ = ["LAYOUTS", "NOT_WHOLE", "ReplayFacts", "least"]

LAYOUTS = 4  # remembered: those pushed last
NOT_WHOLE = "its loader has to see some of this push"


class ReplayFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The state of replay after the last push. Counts are of tensors (checkpoint names) of the layout pushed last."""

    phase: str  # of the last push: record | prove | replay; loader: nothing can be replayed; off: see `note`
    replayed: int = 0  # tensors that are replayed, or will be once the plan is proved
    replayed_bytes: int = 0
    by_loader: int = 0  # tensors that stay with the loader
    by_loader_bytes: int = 0
    pulled: int = 0  # buckets of the last push that were read where they lay, without a copy first
    moves: int = 0  # copies that one push takes, neighbours joined
    why: dict[str, list[str]] = {}  # reason to stay with the loader → the first such tensors, and "… and n more"
    note: str = ""  # why replay began anew, or is off
    compares: bool = False  # whether the worker can say what lies in the engine's memory, once the plan is proved
    seconds: dict[str, float] = {}  # phase → seconds of loading in its last push; on a GPU, of queueing the loading


def least(workers: list[ReplayFacts]) -> ReplayFacts | None:
    """Return the facts of the worker that replays least; None without workers."""
    return min(workers, key=lambda facts: facts.replayed_bytes if facts.phase == "replay" else -1, default=None)
