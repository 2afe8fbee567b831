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
from weightsync.plan.exposure import gpu_of
from weightsync.plan.told import ToldExposures, ToldManifests
from weightsync.session import events as ev
from weightsync.wire import messages as msg
from weightsyncd.rails import MOMENT, quietly, sentences

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.errors import ErrorRecord
    from weightsync.plan.exposure import Exposures
    from weightsync.plan.manifest import Manifest
    from weightsync.session import instructions as do
    from weightsyncd.bridges import Bridge
    from weightsyncd.context import PushContext
    from weightsyncd.rails import Rails

__all__ = ["Deliveries"]

logger = logging.getLogger(__name__)

_PIECE = 256 * 2**20  # bytes at most: long enough for any wire, and a dozen of them in a GPU's slots


class _Told(NamedTuple):
    """What one bridge remembers."""

    incarnation: str | None
    manifests: ToldManifests
    exposures: ToldExposures
    places: ToldExposures


class Deliveries:
    """Those that this node's bridges send and take."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}  # by bridge

    async def deliver(self, rails: Rails, context: PushContext, instruction: do.DeliverWeights) -> ev.WeightsDelivered:
        """Bring an engine elsewhere what it has places for. It takes half of the time that is left: where it fails,
        buckets bring everything.
        """
        engine, node, now = instruction.engine, instruction.node, time.monotonic()
        until = now + (instruction.deadline - now) / 2
        try:
            failed = {} if rails.stands([node]) else await rails.form([node], until)
            failed = failed or await self._attempt(rails, context, instruction, until)
        except WeightSyncError as error:
            failed = {node: error.record()}
        if not failed:
            context.drawn.add(engine)
            return ev.WeightsDelivered(engine=engine)
        problem = sentences(failed)
        logger.warning("[engine=%s v=%d] is given buckets: %s", engine, context.version, problem)
        return ev.WeightsDelivered(engine=engine, problem=problem)

    async def collect(self, context: PushContext, bridge: Bridge, message: msg.Collect, until: float) -> None:
        """Take part in what a coordinator delivers to an engine of this node. Raises `TransportError`."""
        shown = context.shown.get(message.engine)
        if shown is None:
            raise LocalProtocolError("it has not shown its places in this push", engine=message.engine)
        manifest = context.known_manifest()
        told = self._told_to(bridge)
        with told.manifests.unless_it_fails(), told.places.unless_it_fails():
            command = commands.Collect(
                generation=message.generation,
                token=message.token,
                piece=message.piece,
                turn=message.turn,
                turns=message.turns,
                ranks=message.ranks,
                manifest=told.manifests.tell(manifest),
                places=told.places.tell(shown),
            )
            await bridge.call(command, deadline=until)

    async def _attempt(
        self, rails: Rails, context: PushContext, instruction: do.DeliverWeights, until: float
    ) -> dict[str, ErrorRecord]:
        """Returns the node that broke it, and how; nothing where all is there. One that fails breaks the communicators,
        whoever broke it.
        """
        node, generation, token = instruction.node, rails.generation, secrets.randbits(59)
        info = rails.peer(node).info
        shown, exposures = context.shown.get(instruction.engine), context.exposures
        if shown is None or exposures is None or info is None:
            raise LocalProtocolError("places and weights are shown first", engine=instruction.engine)
        served = _served(shown, info.gpus, rails.count([node]))
        piece = min(rails.bridges[0].config.slot_bytes, info.slot_bytes, _PIECE) // 256 * 256
        broken: dict[str, ErrorRecord] = {}

        async def take(turn: int, rail: int, ranks: tuple[int, ...]) -> None:
            question = msg.Collect(
                push=context.push,
                rail=rail,
                engine=instruction.engine,
                generation=generation,
                token=token,
                piece=piece,
                turn=turn,
                turns=len(served),
                ranks=ranks,
                timeout=max(0.0, until - time.monotonic()),
            )
            try:
                await rails.peer(node).ask(question, until + MOMENT)
            except WeightSyncError as error:
                await give_up(node, error.record())

        async def send(turn: int, rail: int, ranks: tuple[int, ...]) -> None:
            bridge = rails.bridges[rail]
            told = self._told_to(bridge)
            manifest: Manifest = context.known_manifest()
            command = commands.Deliver(
                generation=generation,
                token=token,
                piece=piece,
                turn=turn,
                turns=len(served),
                ranks=ranks,
                manifest=told.manifests.tell(manifest),
                places=told.places.tell(shown),
                exposures=told.exposures.tell(exposures),
            )
            problem = await quietly(bridge.call(command, deadline=until))
            if problem is not None:
                for known in (told.manifests, told.places, told.exposures):
                    known.forget()
                await give_up(rails.home, problem)

        async def give_up(who: str, problem: ErrorRecord) -> None:
            if not broken:  # the others' errors follow from the first
                broken[who] = problem
                await asyncio.gather(*(rails.give_up(rails.bridges[rail], generation) for rail in served))

        async with asyncio.TaskGroup() as group:
            for turn, (rail, ranks) in enumerate(sorted(served.items())):
                group.create_task(take(turn, rail, ranks))
                group.create_task(send(turn, rail, ranks))
        if broken:
            rails.break_up(generation)
        return broken

    def _told_to(self, bridge: Bridge) -> _Told:
        known = self._told.get(bridge.name)
        if known is None or known.incarnation != bridge.incarnation:
            known = _Told(bridge.incarnation, ToldManifests(), ToldExposures(), ToldExposures())
            self._told[bridge.name] = known
        return known


def _served(shown: Exposures, gpus: Sequence[str], rails: int) -> dict[int, tuple[int, ...]]:
    """By rail, the ranks of the engine: each by the bridge on its own GPU, as far as rails go."""
    served: dict[int, tuple[int, ...]] = {}
    for rank, packed in enumerate(shown.ranks):
        gpu = gpu_of(packed)
        rail = (gpus.index(gpu) if gpu in gpus else rank) % rails
        served[rail] = (*served.get(rail, ()), rank)
    return served
