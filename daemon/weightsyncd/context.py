"""What one node knows of a push under way."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weightsync.errors import LocalProtocolError
from weightsync.logs import about

if TYPE_CHECKING:
    import asyncio

    import numpy as np
    import numpy.typing as npt

    from weightsync.plan.exposure import Exposures
    from weightsync.plan.manifest import Manifest
    from weightsync.session import events as ev
    from weightsync.session import instructions as do

__all__ = ["PushContext"]


@dataclass
class PushContext:
    """What one node knows of a push under way."""

    push: str
    model: str
    version: int
    since: float = field(default_factory=time.monotonic)
    manifest: Manifest | None = None
    expected: npt.NDArray[np.uint64] | None = None  # fingerprint of each tensor, from what ranks fill into slots
    measured: npt.NDArray[np.uint64] | None = None  # the same, from what ranks expose
    exposures: Exposures | None = None  # where exposed weights lie, once all ranks have told
    shown: dict[str, Exposures] = field(default_factory=dict)  # engine → its places, by tp rank
    drawn: set[str] = field(default_factory=set)  # engines that drew their weights, or had them delivered
    slots: dict[int, tuple[do.Slot, int]] = field(default_factory=dict)  # bucket → its slot here and its sequence
    arenas: dict[int, str | None] = field(default_factory=dict)  # bucket from elsewhere → its bridge's incarnation
    tickets: dict[tuple[str, int], tuple[bytes, ...]] = field(default_factory=dict)  # (engine, bucket) → by tp rank
    incarnations: dict[str, str] = field(default_factory=dict)  # engine → its incarnation when it was probed
    modes: dict[str, str] = field(default_factory=dict)  # engine paused here and not resumed → mode of the pause
    begun: set[str] = field(default_factory=set)  # engines touched here and not resumed
    sums: dict[int, int] = field(default_factory=dict)  # bucket → its checksum, from what its ranks wrote
    suspects: set[int] = field(default_factory=set)  # bridges whose slots a stock engine did not give back
    held: set[tuple[str, int]] = field(default_factory=set)  # (engine, bucket) exported, not released
    exporting: set[asyncio.Task[ev.Event]] = field(default_factory=set)

    def lines(self) -> about:
        """Return a context manager that marks log lines as about this push."""
        return about(push=self.push, model=self.model, version=self.version)

    def at(self, bucket: int) -> tuple[str, int, int]:
        """Return the arguments of `[model=%s v=%d bucket=%d]` in a log line."""
        return self.model, self.version, bucket

    def expected_of(self, engine: str) -> npt.NDArray[np.uint64] | None:
        """Return the fingerprint of each tensor as the engine has to hold it."""
        return self.measured if engine in self.drawn else self.expected

    def known_manifest(self) -> Manifest:
        if self.manifest is None:
            raise LocalProtocolError("the push has no manifest yet", version=self.version)
        return self.manifest
