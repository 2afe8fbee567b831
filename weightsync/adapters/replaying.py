"""What adapters share whose engines can have our plugin, and with it a load plan.

Where all of a manifest's tensors were compared in the engine's memory after its last push, nothing of the next has to
be checked on its way: workers read of a bucket what they need and no more, or draw that out of the trainer's memory, or
show where others may write it. All of that is compared once it is loaded.
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
    """The way through our plugin."""

    replay: ReplayFacts | None  # what the workers said of the last push

    async def draw(self, exposures: Exposures, *, deadline: float) -> str:
        """Have all workers read what they need out of the trainer's memory; why one cannot, or ""."""

    async def places(self, *, deadline: float) -> Exposures | str:
        """Where all workers have places for what they need; or why one has none."""


class ReplayingAdapter(EngineAdapter):
    """Draws, shows places and verifies through the plugin, where that is the way in."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._held = HeldCheck(name)
        self._pull = False  # buckets of the last update were not checked on their way
        self._drawn = False  # the last update, and not through buckets

    @abstractmethod
    def _replaying(self) -> ReplayingPath | None:
        """The way in, where that is our plugin."""

    def _unchecked(self, manifest: Manifest) -> tuple[bool, bool]:
        """For an update that begins: `pull`, what it loads will be compared, so that buckets need not be; and `anew`,
        what was learnt of the loader led to something wrong.
        """
        self._pull, self._drawn = self.draws(manifest), False
        return self._pull, self._compares and self._held.doubtful

    def draws(self, manifest: Manifest) -> bool:
        """See the base class: what comes so is not checked, so it has to be compared afterwards."""
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
        """None where our plugin cannot tell: engines keep weights fused, sharded and packed for their kernels. What
        came unchecked is asked for even if the workers no longer say that they compare.
        """
        path = self._replaying()
        if path is None or not (self._pull or self._drawn or self._compares):
            self._held.forget(manifest)
            return None
        return await self._held.verify(path, manifest, expected, drawn=self._drawn, deadline=deadline)

    @property
    def _compares(self) -> bool:
        """Whether its workers can say what lies in their memory."""
        path = self._replaying()
        return path is not None and path.replay is not None and path.replay.compares
