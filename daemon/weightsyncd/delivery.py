"""Weights into an engine of another node without slots: this node's bridges pack what it has places for out of the
memory that trainer ranks expose, and that node's write it there.

Every rank of the engine is served by the rail whose bridge is nearest to it, all at the same time.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import TYPE_CHECKING, NamedTuple

from weightsync.errors import LocalProtocolError, WeightSyncError
from weightsync.nccl_bridge import commands
from weightsync.plan.exposure import Exposures, gpu_of
from weightsync.plan.told import ToldExposures, ToldManifests
from weightsync.session import events as ev
from weightsync.wire import messages as msg
from weightsyncd.rails import MOMENT, quietly, sentences

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.errors import ErrorRecord
    from weightsync.session import instructions as do
    from weightsyncd.bridges import Bridge
    from weightsyncd.context import PushContext
    from weightsyncd.rails import Rails

__all__ = ["Deliveries"]

logger = logging.getLogger(__name__)

_PIECE = 256 * 2**20  # bytes at most: long enough for any wire, and a dozen of them in a GPU's slots
_PASSING = ("TransportTimeout", "TransportClosed", "DaemonLost")  # kinds of errors that the next push may not meet


class _Told(NamedTuple):
    """What one bridge remembers."""

    incarnation: str | None
    manifests: ToldManifests
    exposures: ToldExposures
    places: ToldExposures


class _Deal(NamedTuple):
    """One rail's share of a delivery."""

    rail: int
    ranks: tuple[int, ...]  # of the engine
    turn: int


class Deliveries:
    """Those that this node's bridges send and take."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}  # by bridge
        self._refused: dict[str, tuple[tuple[object, ...], str]] = {}  # engine → what cannot be delivered, and why

    async def deliver(self, rails: Rails, context: PushContext, instruction: do.DeliverWeights) -> ev.WeightsDelivered:
        """Bring an engine elsewhere what it has places for. Where that fails, buckets bring everything."""
        engine = instruction.engine
        try:
            problem = await self._deliver(rails, context, instruction)
        except WeightSyncError as error:
            problem = error.message
        if problem:
            logger.warning("[engine=%s v=%d] is given buckets: %s", engine, context.version, problem)
        else:
            context.drawn.add(engine)
        return ev.WeightsDelivered(engine=engine, problem=problem)

    async def prepare_to_collect(
        self, context: PushContext, bridge: Bridge, message: msg.Prepare, until: float
    ) -> None:
        """Get ready for what a coordinator delivers to an engine of this node. Raises `TransportError`."""
        shown = context.shown.get(message.engine)
        if shown is None:
            raise LocalProtocolError("it has not shown its places in this push", engine=message.engine)
        await self._prepare(context, bridge, message, _those(shown, message.ranks), None, until)

    async def _deliver(self, rails: Rails, context: PushContext, instruction: do.DeliverWeights) -> str:
        """Why it was not, or ""."""
        engine, node, until = instruction.engine, instruction.node, instruction.deadline
        info = rails.peer(node).info
        shown, exposures = context.shown.get(engine), context.exposures
        if shown is None or exposures is None or info is None:
            raise LocalProtocolError("places and weights are shown first", engine=engine)
        bridges = tuple(bridge.incarnation for bridge in rails.bridges)
        key = shown.digest, exposures.digest, info.incarnation, bridges
        known = self._refused.get(engine)
        if known is not None and known[0] == key:
            return known[1]
        served = _served(shown, info.gpus, rails.count([node]))
        deals = [_Deal(rail, ranks, turn) for turn, (rail, ranks) in enumerate(sorted(served.items()))]
        token = secrets.randbits(59)
        failed = await self._prepare_all(rails, context, instruction, deals, token)
        if failed:
            if not any(error.kind in _PASSING for error in failed.values()):
                self._refused[engine] = key, sentences(failed)
            return sentences(failed)
        failed = {} if rails.stands([node]) else await rails.form([node], until)
        return sentences(failed or await _carry(rails, context, node, deals, token, until))

    async def _prepare_all(
        self, rails: Rails, context: PushContext, instruction: do.DeliverWeights, deals: Sequence[_Deal], token: int
    ) -> dict[str, ErrorRecord]:
        """Have both ends of every rail get ready. Returns the nodes that cannot, and why."""
        node, until = instruction.node, instruction.deadline
        info = rails.peer(node).info
        shown, exposures = context.shown[instruction.engine], context.exposures
        slot_bytes = min(rails.bridges[0].config.slot_bytes, info.slot_bytes if info is not None else _PIECE)
        works: dict[asyncio.Task[object], str] = {}  # → the node that it is done on
        for deal in deals:
            question = msg.Prepare(
                push=context.push,
                rail=deal.rail,
                engine=instruction.engine,
                ranks=deal.ranks,
                token=token,
                piece=min(slot_bytes, _PIECE) // 256 * 256,
                turn=deal.turn,
                turns=len(deals),
                timeout=max(0.0, until - time.monotonic()),
            )
            places = _those(shown, deal.ranks)
            here = self._prepare(context, rails.bridges[deal.rail], question, places, exposures, until)
            works[asyncio.create_task(here)] = rails.home
            works[asyncio.create_task(rails.peer(node).ask(question, until + MOMENT))] = node
        try:
            await asyncio.wait(works, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for work in works:
                work.cancel()  # where one cannot, nobody waits for the others to get ready
            outcomes = await asyncio.gather(*works, return_exceptions=True)
        failed: dict[str, ErrorRecord] = {}
        for where, outcome in zip(works.values(), outcomes, strict=True):
            if isinstance(outcome, WeightSyncError):
                failed.setdefault(where, outcome.record())
            elif isinstance(outcome, Exception):
                raise outcome
        return failed

    async def _prepare(
        self,
        context: PushContext,
        bridge: Bridge,
        terms: msg.Prepare,
        places: Exposures,
        exposures: Exposures | None,
        until: float,
    ) -> None:
        told = self._told_to(bridge)
        with told.manifests.unless_it_fails(), told.places.unless_it_fails(), told.exposures.unless_it_fails():
            command = commands.Prepare(
                token=terms.token,
                piece=terms.piece,
                turn=terms.turn,
                turns=terms.turns,
                manifest=told.manifests.tell(context.known_manifest()),
                places=told.places.tell(places),
                exposures=told.exposures.tell(exposures) if exposures is not None else None,
            )
            await bridge.call(command, deadline=until)

    def _told_to(self, bridge: Bridge) -> _Told:
        known = self._told.get(bridge.name)
        if known is None or known.incarnation != bridge.incarnation:
            known = _Told(bridge.incarnation, ToldManifests(), ToldExposures(), ToldExposures())
            self._told[bridge.name] = known
        return known


async def _carry(
    rails: Rails, context: PushContext, node: str, deals: Sequence[_Deal], token: int, until: float
) -> dict[str, ErrorRecord]:
    """What was prepared, on all rails at a time. Returns the node that broke it, and how; nothing where all is there.
    One that fails breaks the communicators, whoever broke it.
    """
    generation = rails.generation
    broken: dict[str, ErrorRecord] = {}

    async def give_up(who: str, problem: ErrorRecord) -> None:
        if not broken:  # the others' errors follow from the first
            broken[who] = problem
            await asyncio.gather(*(rails.give_up(rails.bridges[deal.rail], generation) for deal in deals))

    async def take(rail: int) -> None:
        timeout = max(0.0, until - time.monotonic())
        question = msg.Collect(push=context.push, rail=rail, generation=generation, token=token, timeout=timeout)
        try:
            await rails.peer(node).ask(question, until + MOMENT)
        except WeightSyncError as error:
            await give_up(node, error.record())

    async def send(rail: int) -> None:
        command = commands.Deliver(generation=generation, token=token)
        problem = await quietly(rails.bridges[rail].call(command, deadline=until))
        if problem is not None:
            await give_up(rails.home, problem)

    async with asyncio.TaskGroup() as group:
        for deal in deals:
            group.create_task(take(deal.rail))
            group.create_task(send(deal.rail))
    if broken:
        rails.break_up(generation)
    return broken


def _those(shown: Exposures, ranks: Sequence[int]) -> Exposures:
    """The places of these ranks of an engine. Raises `LocalProtocolError` for one that it has not."""
    if any(rank >= len(shown.ranks) for rank in ranks):
        raise LocalProtocolError(f"rank {max(ranks)} of an engine of {len(shown.ranks)} is to be delivered to")
    return Exposures(tuple(shown.ranks[rank] for rank in ranks), tuple(shown.digests[rank] for rank in ranks))


def _served(shown: Exposures, gpus: Sequence[str], rails: int) -> dict[int, tuple[int, ...]]:
    """By rail, the ranks of the engine: each by the bridge on its own GPU, as far as rails go."""
    served: dict[int, tuple[int, ...]] = {}
    for rank, packed in enumerate(shown.ranks):
        gpu = gpu_of(packed)
        rail = (gpus.index(gpu) if gpu in gpus else rank) % rails
        served[rail] = (*served.get(rail, ()), rank)
    return served
