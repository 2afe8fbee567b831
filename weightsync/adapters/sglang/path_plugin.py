"""The path through our plugin: orders in plain MessagePack, buckets straight out of the node's arenas.

Nothing is pickled, and tensors may be cut over several buckets. Every rank's bytes are checksummed as they arrive,
unless the result is compared afterwards. Names that the model does not know are refused before anything is touched. A
failure of any rank comes back as an answer.
"""

from __future__ import annotations

from secrets import token_hex
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from weightsync.adapters.held import HeldSums
from weightsync.adapters.http import EngineAnswer
from weightsync.adapters.places import ToldPlaces
from weightsync.adapters.sglang import orders
from weightsync.adapters.sglang.path import SELECTORS, EnginePath, Session
from weightsync.errors import CodecError, EngineError, EngineLost, EngineRefused
from weightsync.plan.told import ToldExposures, ToldManifests

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.adapters.sglang.profiles import Profile
    from weightsync.adapters.sglang.server import Server
    from weightsync.plan.exposure import Exposures
    from weightsync.plan.manifest import Manifest

__all__ = ["PluginPath"]

_SHOWN = 5


class PluginPath(EnginePath):
    """Talks to this folder's `plugin.py`, inside the scheduler of every rank."""

    name = "plugin"
    transport = "mapped"

    def __init__(self, server: Server, profile: Profile, target: str, ranks: int) -> None:
        self._server = server
        self._session = Session(server, profile, target)
        self._target, self._ranks = SELECTORS[target], ranks
        self._told, self._shown, self._places = ToldManifests(), ToldExposures(), ToldPlaces(server.engine)
        self._update = ""  # a random name for each update, so that workers tell its steps from another daemon's

    async def accept(self, manifest: Manifest, *, deadline: float) -> tuple[str, ...] | None:
        self._told.forget()  # send the manifest whole: the engine may have restarted
        self._shown.forget()
        order = orders.Accept(manifest=self._told.tell(manifest), target=self._target)
        with self._told.unless_it_fails():
            answer = await self._order(order, deadline, "accept")
        try:
            accepted = msgspec.json.decode(answer, type=orders.Accepted)
        except msgspec.DecodeError as error:
            raise self._none_of_ours(error) from error
        if accepted.refused:
            raise EngineRefused(
                f"SGLang cannot take weights: {accepted.refused}", engine=self._server.engine, phase="accept"
            )
        if accepted.unknown:
            names = ", ".join(map(repr, accepted.unknown[:_SHOWN]))
            more = len(accepted.unknown) - _SHOWN
            raise EngineRefused(
                f"its model has no place for {names}" + (f" and {more} more" if more > 0 else ""),
                engine=self._server.engine,
                phase="accept",
                hint="names as in the model's own checkpoint",
            )
        return accepted.untouched

    async def begin(
        self,
        manifest: Manifest,
        offers: Sequence[Sequence[bytes]],
        *,
        pull: bool = False,
        anew: bool = False,
        deadline: float,
    ) -> None:
        """See the base class; `pull` and `anew` as in `orders.Begin`."""
        await self._session.open(deadline=deadline)
        self._update = token_hex(16)
        order = orders.Begin(
            update=self._update,
            manifest=self._told.tell(manifest),
            target=self._target,
            offers=tuple(tuple(rank) for rank in offers),
            seconds=_seconds(deadline),
            pull=pull,
            anew=anew,
        )
        with self._told.unless_it_fails():
            await self._in_session(order, deadline, "begin")

    async def load(self, bucket: int, tickets: Sequence[bytes], *, deadline: float) -> None:
        await self.load_several(bucket, [tickets], deadline=deadline)

    async def load_several(self, first: int, tickets: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        """See the base class. Sends all of them in one call."""
        order = orders.Load(
            update=self._update, bucket=first, tickets=tuple(map(tuple, tickets)), seconds=_seconds(deadline)
        )
        await self._in_session(order, deadline, "load")

    async def draw(self, exposures: Exposures, *, deadline: float) -> str:
        """Have all ranks read what they need out of the trainer's memory. Returns why a rank cannot, or ""."""
        order = orders.Draw(update=self._update, exposures=self._shown.tell(exposures), seconds=_seconds(deadline))
        with self._shown.unless_it_fails():
            answer = await self._in_session(order, deadline, "draw")
            try:
                return next((why.decode(errors="replace") for why in orders.unpack_answers(answer) if why), "")
            except CodecError as error:
                raise self._none_of_ours(error) from error

    async def places(self, *, deadline: float) -> Exposures | str:
        """Return the places of all ranks, or why a rank has none."""
        order = orders.Places(update=self._update, known=tuple(self._places.known))
        answer = await self._in_session(order, deadline, "places")
        try:
            return self._places.of(orders.unpack_answers(answer), self._ranks)
        except CodecError as error:
            raise self._none_of_ours(error) from error

    async def finish(self, *, deadline: float) -> None:
        await self._in_session(orders.Finish(update=self._update), deadline, "finish")
        await self._session.end(deadline=deadline)

    async def sums(self, manifest: Manifest, *, deadline: float) -> list[HeldSums]:
        """Ask every rank what it holds of the push that has ended."""
        told = await self._answers(orders.Sums(manifest=manifest.digest, target=self._target), deadline)
        try:
            return [msgspec.msgpack.decode(one, type=HeldSums) for one in told]
        except msgspec.DecodeError as error:
            raise self._none_of_ours(error) from error

    async def boxes(self, manifest: Manifest, *, deadline: float) -> list[bytes]:
        """Ask every rank for the boxes behind its `sums`, as packed `ResidentBoxes`."""
        return await self._answers(orders.Boxes(manifest=manifest.digest, target=self._target), deadline)

    async def _answers(self, order: orders.Order, deadline: float) -> list[bytes]:
        answer = await self._order(order, deadline, "verify")
        try:
            return orders.unpack_answers(answer)
        except CodecError as error:
            raise self._none_of_ours(error) from error

    def _none_of_ours(self, error: Exception) -> EngineError:
        return EngineError(f"an answer that is none of our plugin's: {error}", engine=self._server.engine)

    async def _in_session(self, order: orders.Order, deadline: float, phase: str) -> str:
        try:
            return await self._order(order, deadline, phase)
        except EngineLost:
            raise
        except EngineError:
            await self._session.abandon(deadline=deadline)
            raise

    async def _order(self, order: orders.Order, deadline: float, phase: str) -> str:
        try:
            return await self._server.call("/weights_checker", {"action": orders.encode(order)}, deadline=deadline)
        except EngineAnswer as answer:
            raise EngineError(answer.reason, engine=self._server.engine, phase=phase) from answer


def _seconds(deadline: float) -> float:
    """Turn a deadline into the seconds left, for a worker with a clock of its own."""
    return min(max(deadline - monotonic(), 0.001), 86400.0)
