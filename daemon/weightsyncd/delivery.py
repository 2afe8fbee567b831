"""Deliveries: weights for engines on other nodes, without slots, on all rails at the same time.

This node's bridges pack the weights out of the memory that trainer ranks expose. The other nodes' bridges write them
into the engines' places.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from weightsync.errors import LocalProtocolError, PushAborted, WeightSyncError
from weightsync.nccl_bridge import commands
from weightsync.nccl_bridge.replies import NEVER
from weightsync.plan.exposure import Exposures, gpu_of
from weightsync.plan.told import ToldExposures, ToldManifests
from weightsync.session import events as ev
from weightsync.wire import messages as msg
from weightsyncd.rails import MOMENT, quietly, sentences

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from weightsync.errors import ErrorRecord
    from weightsync.session import instructions as do
    from weightsyncd.bridges import Bridge
    from weightsyncd.context import PushContext
    from weightsyncd.rails import Rails

__all__ = ["Deliveries"]

logger = logging.getLogger(__name__)

_PARCEL = 256 * 2**20  # bytes at most: long enough for any wire, and a dozen of them fit into a GPU's slots
_LONGEST = 300.0  # seconds for a bridge to work out a layout; a later push uses it if this one does not wait
_REMEMBERED = 600.0  # seconds before an impossible delivery is tried again


class _Told(NamedTuple):
    """What one bridge has been told and remembers."""

    incarnation: str | None
    manifests: ToldManifests
    exposures: ToldExposures
    places: ToldExposures


class _Deal(NamedTuple):
    """One rail's part of a delivery."""

    rail: int
    turn: int  # the number of this deal …
    turns: int  # among so many
    ranks: tuple[int, ...] = ()  # of the only engine; empty: the rail brings a share of the model to all engines


class Deliveries:
    """The deliveries that this node's bridges send and take."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}  # by bridge
        self._refused: tuple[tuple[object, ...], float, str] | None = None  # what is impossible, until when, and why

    async def deliver(
        self, rails: Rails, context: PushContext, instruction: do.DeliverWeights, ended: asyncio.Event
    ) -> ev.WeightsDelivered:
        """Deliver to engines on other nodes; if that fails, they are given buckets. Given up once the push `ended`."""
        engines = instruction.engines
        try:
            problem = await _unless(ended, self._deliver(rails, context, instruction))
        except WeightSyncError as error:
            problem = error.message
        if problem and not ended.is_set():
            logger.warning("[engine=%s v=%d] is given buckets: %s", ",".join(engines), context.version, problem)
        if not problem:
            context.drawn.update(engines)
        return ev.WeightsDelivered(engines=engines, problem=problem)

    async def prepare_to_collect(
        self, context: PushContext, bridge: Bridge, message: msg.Prepare, until: float
    ) -> None:
        """Have a bridge prepare for a coordinator's delivery to engines of this node. Raises `WeightSyncError`."""
        if missing := [name for name in message.engines if name not in context.shown]:
            raise LocalProtocolError(f"engine {missing[0]} has not shown its places in this push", engine=missing[0])
        shown = [context.shown[name] for name in message.engines]
        await self._prepare(context, bridge, message, places=_together(shown, message.ranks), until=until)

    async def _deliver(self, rails: Rails, context: PushContext, instruction: do.DeliverWeights) -> str:
        """Deliver. Returns why that failed, or ""."""
        until, names = instruction.deadline, sorted(set(instruction.nodes))
        exposures, shown = context.exposures, [context.shown[name] for name in instruction.engines]
        infos = [info for node in names if (info := rails.peer(node).info) is not None]
        if exposures is None:
            raise LocalProtocolError("no trainer exposes its weights on this node")
        alive = [bridge.incarnation for bridge in rails.bridges] + [info.incarnation for info in infos]
        key = exposures.digest, *instruction.engines, *alive
        if self._refused is not None and self._refused[0] == key and time.monotonic() < self._refused[1]:
            return self._refused[2]
        slot_bytes = min([rails.bridges[0].config.slot_bytes, *(info.slot_bytes for info in infos)])
        deals = _dealt(shown, infos[0].gpus if infos else (), rails.count(names))
        token = secrets.randbits(59)
        failed = await self._prepare_all(rails, context, instruction, deals, token, min(slot_bytes, _PARCEL))
        if failed:
            if any(error.phase == NEVER for error in failed.values()):
                self._refused = key, time.monotonic() + _REMEMBERED, sentences(failed)
            return sentences(failed)
        failed = {} if rails.stands(names) else await rails.form(names, until)
        return sentences(failed or await _carry(rails, context, names, deals, token, until))

    async def _prepare_all(
        self,
        rails: Rails,
        context: PushContext,
        instruction: do.DeliverWeights,
        deals: Sequence[_Deal],
        token: int,
        parcel: int,
    ) -> dict[str, ErrorRecord]:
        """Have all ends of every rail prepare. Returns the nodes that cannot, and why."""
        until = instruction.deadline
        by_node: dict[str, tuple[str, ...]] = {}
        for engine, node in zip(instruction.engines, instruction.nodes, strict=True):
            by_node[node] = (*by_node.get(node, ()), engine)
        shown = [context.shown[name] for name in instruction.engines]
        works: dict[asyncio.Task[object], str] = {}  # → the node that does it
        for deal in deals:
            question = msg.Prepare(
                push=context.push,
                rail=deal.rail,
                engines=instruction.engines,
                ranks=deal.ranks,
                token=token,
                parcel=parcel // 256 * 256,
                turn=deal.turn,
                turns=deal.turns,
                timeout=max(0.0, until - time.monotonic()),
            )
            places = _together(shown, deal.ranks) if deal.ranks else None
            here = self._prepare(
                context, rails.bridges[deal.rail], question, places=places, exposures=context.exposures, until=until
            )
            works[asyncio.create_task(here)] = rails.home
            for node, engines in by_node.items():
                there = rails.peer(node).ask(msgspec.structs.replace(question, engines=engines), until + MOMENT)
                works[asyncio.create_task(there)] = node
        try:
            await asyncio.wait(works, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for work in works:
                work.cancel()  # if one end cannot, the others need not be waited for
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
        *,
        places: Exposures | None,
        exposures: Exposures | None = None,
        until: float,
    ) -> None:
        told = self._told_to(bridge)
        with told.manifests.unless_it_fails(), told.places.unless_it_fails(), told.exposures.unless_it_fails():
            command = commands.Prepare(
                token=terms.token,
                parcel=terms.parcel,
                turn=terms.turn,
                turns=terms.turns,
                whole=not terms.ranks,
                manifest=told.manifests.tell(context.known_manifest()),
                places=told.places.tell(places) if places is not None else None,
                exposures=told.exposures.tell(exposures) if exposures is not None else None,
            )
            await bridge.work(command, "preparing a delivery", longest=_LONGEST, deadline=until)

    def _told_to(self, bridge: Bridge) -> _Told:
        known = self._told.get(bridge.name)
        if known is None or known.incarnation != bridge.incarnation:
            known = _Told(bridge.incarnation, ToldManifests(), ToldExposures(), ToldExposures())
            self._told[bridge.name] = known
        return known


async def _unless(ended: asyncio.Event, delivery: Coroutine[None, None, str]) -> str:
    work, end = asyncio.ensure_future(delivery), asyncio.ensure_future(ended.wait())
    try:
        await asyncio.wait([work, end], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise PushAborted("the push of this delivery has ended")
        return work.result()
    finally:
        end.cancel()
        work.cancel()
        await asyncio.gather(work, end, return_exceptions=True)  # until bridges have let go of it


async def _carry(
    rails: Rails, context: PushContext, nodes: Sequence[str], deals: Sequence[_Deal], token: int, until: float
) -> dict[str, ErrorRecord]:
    """Carry out the prepared delivery, on all rails at the same time.

    Returns the node that broke it, and its error; empty if all arrived. A failure breaks the communicators for every
    node.
    """
    generation = rails.generation
    broken: dict[str, ErrorRecord] = {}

    async def give_up(who: str, problem: ErrorRecord) -> None:
        if not broken:  # the others' errors follow from the first
            broken[who] = problem
            await asyncio.gather(*(rails.give_up(rails.bridges[deal.rail], generation) for deal in deals))

    async def take(node: str, rail: int) -> None:
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

    try:
        async with asyncio.TaskGroup() as group:
            for deal in deals:
                for node in nodes:
                    group.create_task(take(node, deal.rail))
                group.create_task(send(deal.rail))
    except asyncio.CancelledError:  # the push has ended: after this, bridges read nothing that ranks expose
        await give_up(rails.home, PushAborted("the push of this delivery has ended").record())
        raise
    finally:
        if broken:
            rails.break_up(generation)
    return broken


def _dealt(shown: Sequence[Exposures], gpus: Sequence[str], rails: int) -> list[_Deal]:
    """Divide a delivery among the rails.

    A single engine's ranks are served by the bridges on their own GPUs, as far as there are rails. To several engines,
    each rail brings a share of the model.
    """
    if len(shown) > 1:
        return [_Deal(rail, rail, rails) for rail in range(rails)]
    served: dict[int, tuple[int, ...]] = {}
    for rank, packed in enumerate(shown[0].ranks):
        gpu = gpu_of(packed)
        rail = (gpus.index(gpu) if gpu in gpus else rank) % rails
        served[rail] = (*served.get(rail, ()), rank)
    return [_Deal(rail, turn, len(served), ranks) for turn, (rail, ranks) in enumerate(sorted(served.items()))]


def _together(shown: Sequence[Exposures], ranks: Sequence[int]) -> Exposures:
    """Return the places of all engines, or of these ranks if there is one engine.

    Raises `LocalProtocolError` for ranks that the engine does not have.
    """
    every = [one for engine in shown for one in zip(engine.ranks, engine.digests, strict=True)]
    if any(rank >= len(every) for rank in ranks) or (ranks and len(shown) > 1):
        raise LocalProtocolError(
            f"ranks {', '.join(map(str, ranks))} of engines of {len(every)} are to be delivered to"
        )
    mine = [every[rank] for rank in ranks] or every
    return Exposures(tuple(packed for packed, _ in mine), tuple(digest for _, digest in mine))
