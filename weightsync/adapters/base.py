"""What the daemon asks of an engine, whatever its brand.

One push calls, in this order and each with an absolute `deadline` (seconds of `time.monotonic()`):

    probe → accept → pause → begin → load × buckets, or draw, or places → finish → verify → resume

Until `begin` is called the engine's weights are untouched, and `resume` alone takes it back to serving. From `begin`
on, until `verify` succeeded, a failure leaves it *torn*; `begin` of a later push must repair it, so `begin` has to
cope with an engine that is in the middle of an earlier update. Engines' own words (`start_weight_update`, …) stay
inside their adapter.

Every method raises `EngineLost` when the engine does not answer (any more) or the deadline passes, `EngineRefused`
from `accept` when the engine cannot take these weights, and `EngineError` for any other answer that is no success.
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
"""What happens to requests in flight: kept and continued on the new weights, waited for, aborted, or not even
paused.
"""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine says of itself when probed."""

    software: str  # name and version, such as "vllm 0.33.0"
    profile: str  # the protocol variant the adapter chose, and why
    tp_size: int  # readers of every bucket, one per tensor-parallel rank
    version: int | None  # the version it serves; None: none of ours
    paused: bool
    torn: bool  # an update began and did not end
    transport: str = "mapped"  # whose tickets its readers take, see weightsync.transports
    incarnation: str = ""  # changes when the engine restarts
    asleep: bool = False  # its weights are not in memory: `begin` wakes it, `resume` wakes the rest
    replay: ReplayFacts | None = None  # of its last push, where our plugin is in it and loaded one


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing `weightsync doctor` looked at."""

    level: Literal["ok", "warn", "fail"]
    what: str  # what was found, as a sentence
    fix: str = ""  # the flag or variable that mends it


class LoadsBuckets(ABC):
    """An engine, or one way into it."""

    @abstractmethod
    async def load(self, bucket: int, tickets: Sequence[bytes], *, deadline: float) -> None:
        """Load one bucket; `tickets[tp_rank]` is that rank's own export of the slot, to be opened once."""

    async def load_several(self, first: int, tickets: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        """Load the buckets from `first` on, of which `tickets` has those of each. For engines that are told of one at a
        time this is `load` again and again.
        """
        for bucket, of_bucket in enumerate(tickets, first):
            await self.load(bucket, of_bucket, deadline=deadline)


class EngineAdapter(LoadsBuckets):
    """The daemon's hand inside one engine. Instances are used from one asyncio loop."""

    loras: LoraRoutes | None = None
    """How it takes LoRA adapters beside its weights; None: not at all."""

    @abstractmethod
    async def probe(self, *, deadline: float) -> EngineInfo:
        """Ask who it is and what it serves; changes nothing. Each push does so twice, and the second time the engine is
        paused: one that is known should be asked for what can have changed, its incarnation above all, and no more.
        """

    @abstractmethod
    async def accept(self, manifest: Manifest, *, deadline: float) -> tuple[str, ...] | None:
        """Show the engine what would come. Raises `EngineRefused` naming each tensor it cannot take.

        Returns the names the engine holds that this manifest would leave as they are; None where it cannot tell. Not
        called again for a manifest (by digest) that this incarnation of the engine has accepted; but once more if it is
        torn or asleep, and was not then: a part of the model is no use to it.
        """

    @abstractmethod
    async def pause(self, mode: PauseMode, *, deadline: float) -> None:
        """Stop generation as `mode` says. Pausing a paused engine succeeds."""

    @abstractmethod
    async def begin(
        self, version: int, manifest: Manifest, offers: Sequence[Sequence[bytes]], *, deadline: float
    ) -> None:
        """Open an update to `version`. `offers[tp_rank]` holds one attach descriptor per arena it may read from."""

    def draws(self, manifest: Manifest) -> bool:
        """Whether it can do without buckets of this manifest, which it has accepted: read the tensors where ranks of
        its node expose them, or show bridges of its node where to write them.
        """
        return False

    async def draw(self, exposures: Exposures, *, deadline: float) -> str:
        """After `begin`, instead of buckets: read all that is needed out of the trainer's memory. When this returns,
        nobody reads there any more. Returns "", or why it cannot after all, and has to be given buckets.
        """
        return "this engine has no way to it"

    async def places(self, *, deadline: float) -> Exposures | str:
        """After `begin`, instead of buckets: where each of its ranks has places for what it needs, by tp rank, for
        bridges of its node to write into. Or, in words, why it cannot say so, and has to be given buckets.

        `finish` may follow when all of it was written. Buckets that come after all take its place: nothing of what was
        shown counts then. Told again while nothing has moved, it is the same, by digest.
        """
        return "this engine has no way to it"

    @abstractmethod
    async def finish(self, version: int, *, deadline: float) -> None:
        """Everything is loaded: post-process, flush caches, take the version number."""

    @abstractmethod
    async def verify(self, manifest: Manifest, expected: Words, *, deadline: float) -> int | None:
        """Compare what lies in the engine's memory now with the fingerprints of the manifest's tensors.

        `expected[i]` is that of `manifest.tensors` i. Returns how many tensors were compared, all of them equal, or
        None where this engine does not let one look. Raises `EngineError` naming the first tensor that differs, whose
        replicas differ, or of which elements are missing.
        """

    @abstractmethod
    async def resume(self, *, deadline: float) -> None:
        """Serve again. Resuming a serving engine succeeds."""

    async def examine(self, *, deadline: float) -> Sequence[Finding]:
        """What would hinder a push, found by questions that change nothing. Raises as `probe` does."""
        info = await self.probe(deadline=deadline)
        return [Finding(level="ok", what=f"{info.software}: {info.profile}")]

    @abstractmethod
    async def close(self) -> None:
        """Let go of connections; the engine itself is left as it is."""
