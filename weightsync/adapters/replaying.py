"""The common part of the vLLM and SGLang adapters: pushes that our plugin's load plans allow to go unchecked.

If all tensors of a manifest were compared in the engine's memory after its last push, the next push needs no checks
under way. Workers then read only the bytes they need of a bucket, or draw them out of the trainer's memory, or show
where bridges may write them. The comparison after loading covers all three.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Protocol

from weightsync.adapters.base import EngineAdapter
from weightsync.adapters.held import HeldCheck, Workers

if TYPE_CHECKING:
    from weightsync.plan.boxes import Words
    from weightsync.plan.exposure import Exposures
    from weightsync.plan.manifest import Manifest
    from weightsync.plan.replay_facts import ReplayFacts

__all__ = ["ReplayingAdapter", "ReplayingPath"]


class ReplayingPath(Workers, Protocol):
    """The path through our plugin."""

    replay: ReplayFacts | None  # what the workers said of the last push

    async def draw(self, exposures: Exposures, *, deadline: float) -> str:
        """Have all workers read what they need out of the trainer's memory. Returns why a worker cannot, or ""."""

    async def places(self, *, deadline: float) -> Exposures | str:
        """Return the places of all workers, or why a worker has none."""


class ReplayingAdapter(EngineAdapter):
    """Draws, shows places and verifies, if the path into the engine is our plugin."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._held = HeldCheck(name)
        self._pull = False  # the last update allowed its workers to read buckets unchecked
        self._drawn = False  # the last update came without buckets: drawn, or written into places

    @abstractmethod
    def _replaying(self) -> ReplayingPath | None:
        """Return the path into the engine if it is our plugin, else None."""

    def _unchecked(self, manifest: Manifest) -> tuple[bool, bool]:
        """Return `(pull, anew)` for an update that begins.

        `pull`: the loaded weights will be compared, so buckets need no check. `anew`: the last comparison failed, so
        the workers must forget their load plans.
        """
        self._pull, self._drawn = self.draws(manifest), False
        return self._pull, self._compares and self._held.doubtful

    def draws(self, manifest: Manifest) -> bool:
        """See the base class. Weights without buckets come unchecked, so everything must be comparable afterwards."""
        return self._compares and self._held.covers(manifest)

    async def draw(self, exposures: Exposures, *, deadline: float) -> str:
        path = self._replaying()
        if path is None:
            return await super().draw(exposures, deadline=deadline)
        with self._held.unless_it_fails():
            why_not = await path.draw(exposures, deadline=deadline)
        self._drawn = not why_not
        return why_not

    async def places(self, *, deadline: float) -> Exposures | str:
        path = self._replaying()
        if path is None:
            return await super().places(deadline=deadline)
        with self._held.unless_it_fails():
            found = await path.places(deadline=deadline)
        self._drawn = not isinstance(found, str)
        return found

    async def verify(self, manifest: Manifest, expected: Words, *, deadline: float) -> int | None:
        """See the base class. Returns None without our plugin: engines fuse, shard and pack weights for their kernels.

        After an unchecked push the workers are asked even if they no longer say that they can compare.
        """
        path = self._replaying()
        if path is None or not (self._pull or self._drawn or self._compares):
            self._held.forget(manifest)
            return None
        return await self._held.verify(path, manifest, expected, drawn=self._drawn, deadline=deadline)

    @property
    def _compares(self) -> bool:
        """Whether the workers can say what lies in their memory."""
        path = self._replaying()
        return path is not None and path.replay is not None and path.replay.compares
