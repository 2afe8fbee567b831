"""The interface through which the daemon drives an engine, whatever its brand.

One push calls, in this order and each with an absolute `deadline` (seconds of `time.monotonic()`):

    probe → accept → pause → begin → load × buckets, or draw, or places → finish → verify → resume

Until `begin` is called the engine's weights are untouched, and `resume` alone makes it serve again. From `begin` until
`verify` has succeeded, a failure leaves the engine *torn*. The `begin` of a later push repairs it, so `begin` must
accept an engine that is in the middle of an earlier update. Engines' own words (`start_weight_update`, …) stay inside
their adapter.

Every method raises `EngineLost` if the engine does not answer or the deadline passes, and `EngineError` for any other
unsuccessful answer. `accept` raises `EngineRefused` if the engine cannot take these weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal

import msgspec

from weightsync.plan.replay_facts import ReplayFacts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.adapters.lora import LoraRoutes
    from weightsync.plan.boxes import Words
    from weightsync.plan.exposure import Exposures
    from weightsync.plan.manifest import Manifest

__all__ = ["EngineAdapter", "EngineInfo", "Finding", "PauseMode"]

PauseMode = Literal["keep", "wait", "abort", "none"]
"""What happens to requests in flight: they continue on the new weights, are waited for, are aborted, or ("none") are
not even paused.
"""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's answer to a probe."""

    software: str  # name and version, such as "vllm 0.33.0"
    profile: str  # the protocol variant the adapter chose, and why
    tp_size: int  # readers of every bucket, one per tensor-parallel rank
    version: int | None  # the version it serves; None: not a version of ours
    paused: bool
    torn: bool  # an update began and did not end
    transport: str = "mapped"  # the transport whose tickets its readers take; see weightsync.transports
    incarnation: str = ""  # changes when the engine restarts
    asleep: bool = False  # its weights are not in memory: `begin` wakes them, `resume` wakes the rest
    replay: ReplayFacts | None = None  # of its last push; None: without our plugin, or before its first push


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that `weightsync doctor` looked at."""

    level: Literal["ok", "warn", "fail"]
    what: str  # what was found, as a sentence
    fix: str = ""  # the flag or variable that mends it


class LoadsBuckets(ABC):
    """Loads buckets into one engine: the base of adapters and of paths."""

    @abstractmethod
    async def load(self, bucket: int, tickets: Sequence[bytes], *, deadline: float) -> None:
        """Load one bucket. `tickets[tp_rank]` is that rank's own export of the slot, which it opens once."""

    async def load_several(self, first: int, tickets: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        """Load consecutive buckets from `first` on; `tickets[i][tp_rank]` is for bucket `first + i`.

        Calls `load` for each bucket; a path that can load several in one call overrides it.
        """
        for bucket, of_bucket in enumerate(tickets, first):
            await self.load(bucket, of_bucket, deadline=deadline)


class EngineAdapter(LoadsBuckets):
    """Drives one engine for the daemon. Instances are used from one asyncio loop."""

    loras: LoraRoutes | None = None
    """The routes that load and unload LoRA adapters; None: the engine takes none."""

    @abstractmethod
    async def probe(self, *, deadline: float) -> EngineInfo:
        """Ask the engine what it is and what it serves, without changing anything.

        A push probes up to twice, the second time while the engine is paused. So an adapter asks an engine that it
        knows only what can have changed, above all its incarnation.
        """

    @abstractmethod
    async def accept(self, manifest: Manifest, *, deadline: float) -> tuple[str, ...] | None:
        """Show the engine what would be pushed, and return the names it holds that the push leaves as they are.

        Returns None if the engine cannot tell. Raises `EngineRefused` naming each tensor that it cannot take.

        The daemon does not ask again about a manifest (by digest) that this incarnation has accepted. It asks once more
        if the engine has become torn or asleep since: such an engine needs the whole model.
        """

    @abstractmethod
    async def pause(self, mode: PauseMode, *, deadline: float) -> None:
        """Stop generation as `mode` says. Pausing a paused engine succeeds."""

    @abstractmethod
    async def begin(
        self, version: int, manifest: Manifest, offers: Sequence[Sequence[bytes]], *, deadline: float
    ) -> None:
        """Open an update to `version`. `offers[tp_rank]` has one offer for each arena that the rank may read from."""

    def draws(self, manifest: Manifest) -> bool:
        """Whether the engine can take this accepted manifest without buckets.

        It then reads the tensors where ranks of its node expose them, or shows the bridges of its node where to write
        them.
        """
        return False

    async def draw(self, exposures: Exposures, *, deadline: float) -> str:
        """Read all needed weights out of the trainer's memory, after `begin` and instead of buckets.

        When this returns, the engine no longer reads there. Returns "", or the reason why the engine needs buckets
        after all.
        """
        return "this engine has no way to it"

    async def places(self, *, deadline: float) -> Exposures | str:
        """Return each rank's places, by tp_rank, for bridges of its node to write into; or why it needs buckets.

        Called after `begin`, instead of buckets. `finish` may follow once everything was written. If buckets come after
        all, only they count, and the places no longer do. As long as nothing has moved, the answer has the same digest.
        """
        return "this engine has no way to it"

    @abstractmethod
    async def finish(self, version: int, *, deadline: float) -> None:
        """End an update that is loaded whole: post-process, flush caches, take the version number."""

    @abstractmethod
    async def verify(self, manifest: Manifest, expected: Words, *, deadline: float) -> int | None:
        """Compare the engine's memory with the fingerprints of the manifest's tensors; return how many were compared.

        `expected[i]` is the fingerprint of tensor i of the manifest. Returns None if this engine cannot tell what it
        holds. Raises `EngineError` naming the first tensor that differs, whose replicas differ, or that lacks elements.
        """

    @abstractmethod
    async def resume(self, *, deadline: float) -> None:
        """Make the engine serve again. Resuming a serving engine succeeds."""

    async def examine(self, *, deadline: float) -> Sequence[Finding]:
        """Find what would hinder a push, without changing anything. Raises as `probe` does."""
        info = await self.probe(deadline=deadline)
        return [Finding(level="ok", what=f"{info.software}: {info.profile}")]

    @abstractmethod
    async def close(self) -> None:
        """Close connections, and leave the engine as it is."""
