"""This node's slots as its engines are given them: offers, exports, fences and revocations."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from weightsync.errors import (
    EngineLost,
    LocalProtocolError,
    TransportBroken,
    TransportError,
    TransportTimeout,
    WeightSyncError,
)
from weightsync.nccl_bridge import commands
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.transports.group import HELPERS, ONE_SENDER, GroupTicket

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsyncd.bridges import Bridge
    from weightsyncd.context import PushContext
    from weightsyncd.engines import Engine, Engines

__all__ = ["NodeExports", "joins_group"]

logger = logging.getLogger(__name__)

_REVOKE = 5.0  # seconds for a bridge to revoke a reader's hold


def joins_group(engine: Engine) -> bool:
    """Return whether the engine takes buckets from a process group, which has to be offered to it beforehand."""
    return engine.info is not None and engine.info.transport in HELPERS


class NodeExports:
    """This node's bridges, as the engines that read from them see them."""

    def __init__(self, node: str, address: str, engines: Engines, bridges: Sequence[Bridge]) -> None:
        """`address` is where engines elsewhere reach this node's bridges."""
        self.node = node
        self._address = address
        self.engines = engines
        self.bridges = bridges
        self._sequences = itertools.count(1)
        self._offers: dict[tuple[str, str, str], bytes] = {}  # (bridge incarnation, reader, transport) → offer
        self.leaks = 0  # exports whose reader never released them
        self._grouped: set[str] = set()  # engines that a group was offered to
        self._leaving: set[asyncio.Task[None]] = set()

    async def prompt(self, deadline: float) -> None:
        """Wait until every bridge answers and has its arena. Raises as `Bridge.prompt` does."""
        ready = False
        while not ready:
            await asyncio.gather(*(bridge.prompt(deadline=deadline) for bridge in self.bridges))
            ready = all(bridge.offer is not None for bridge in self.bridges)  # one may end while another is waited for

    async def offers_for(self, engine: Engine, deadline: float) -> list[list[bytes]]:
        """Return offers by tp rank of the engine: for each arena of this node, or for each group with its bridges."""
        readers = self._readers(engine)
        if joins_group(engine):  # an engine that restarted, or lost its group, gets another
            offers = [await self._offer_group(bridge, engine, deadline) for bridge in self._senders(engine)]
            return [offers] * len(readers)
        return [
            [await self._offer(bridge, reader, transport, deadline) for bridge in self.bridges]
            for reader, transport in readers.items()
        ]

    async def join_groups(self, engine: Engine, deadline: float) -> None:
        """Have the bridges join the groups that were offered to an engine. Raises `TransportError`."""
        join = commands.JoinGroup(engine=engine.name)
        await asyncio.gather(*(bridge.call(join, deadline=deadline) for bridge in self._senders(engine)))

    def leave_groups(self, engine: str) -> None:
        """Have the bridges leave their groups with an engine that has failed or is gone, in the background."""
        for bridge in self.bridges if engine in self._grouped else ():
            work = asyncio.create_task(self._leave_group(bridge, engine))
            self._leaving.add(work)
            work.add_done_callback(self._leaving.discard)
        self._grouped.discard(engine)

    @staticmethod
    async def _leave_group(bridge: Bridge, engine: str) -> None:
        try:
            await bridge.call(commands.LeaveGroup(engine=engine), deadline=time.monotonic() + _REVOKE)
        except TransportError as error:  # the bridge has ended, and its groups with it
            logger.debug("[engine=%s bridge=%s] leave: %s", engine, bridge.name, error.message)

    def _senders(self, engine: Engine) -> Sequence[Bridge]:
        """Return the bridges that the engine takes buckets from."""
        one = engine.info is not None and engine.info.transport in ONE_SENDER
        return self.bridges[:1] if one else self.bridges

    async def _offer_group(self, bridge: Bridge, engine: Engine, deadline: float) -> bytes:
        assert engine.info is not None, "it has readers"
        command = commands.OfferGroup(
            engine=engine.name,
            incarnation=engine.info.incarnation,
            readers=tuple(self._readers(engine)),
            host=self._address,
            helper=HELPERS[engine.info.transport],
        )
        self._grouped.add(engine.name)
        return (await bridge.call(command, deadline=deadline)).offer

    async def send_to_group(
        self, context: PushContext, engine: Engine, first: int, tickets: Sequence[Sequence[bytes]], deadline: float
    ) -> None:
        """Have bridges send the buckets from `first` on, in order, while the engine takes them from its groups.

        `tickets` has the tickets of each bucket. Raises `TransportError`.
        """
        manifest = context.known_manifest()
        for bucket, of_bucket in enumerate(tickets, first):
            slot, _ = context.slots[bucket]
            pieces = slice(manifest.bucket_pieces(bucket).start, manifest.bucket_pieces(bucket).stop)
            pairs = np.stack([manifest.piece_offset[pieces], manifest.piece_nbytes[pieces]], axis=1).astype("<i8")
            command = commands.SendGroup(
                engine=engine.name,
                group=GroupTicket.unpack(of_bucket[0]).group,
                slot=slot.index,
                pieces=pairs.tobytes(),
            )
            await self.bridges[slot.bridge].call(command, deadline=deadline)

    async def _offer(self, bridge: Bridge, reader: str, transport: str, deadline: float) -> bytes:
        """Return the offer by which one reader attaches to one arena; made once for each incarnation of the bridge."""
        key = (bridge.incarnation or "", reader, transport)
        if key not in self._offers:
            reply = await bridge.call(commands.Offer(reader=reader, transport=transport), deadline=deadline)
            alive = {b.incarnation for b in self.bridges}
            self._offers = {  # a bridge knows only the last transport of a reader
                known: offer for known, offer in self._offers.items() if known[0] in alive and known[:2] != key[:2]
            }
            self._offers[key] = reply.offer
        return self._offers[key]

    def forget(self, engine: str) -> None:
        """Forget the offers of an engine that is gone, so that a later engine of that name gets new ones."""
        self._offers = {key: offer for key, offer in self._offers.items() if key[1].rpartition("/")[0] != engine}
        self.leave_groups(engine)

    @staticmethod
    def _readers(engine: Engine) -> dict[str, str]:
        """Return the readers of an engine, by tp rank, and the transport of each."""
        if engine.info is None:
            raise EngineLost(f"engine {engine.name} has not been probed", engine=engine.name)
        return {f"{engine.name}/{rank}": engine.info.transport for rank in range(engine.info.tp_size)}

    async def export(self, context: PushContext, instruction: do.ExportBucket) -> ev.Event:
        """Export a bucket. This runs to its end even if the caller is cancelled: `sweep` has to revoke all exports."""
        work = asyncio.create_task(self._export_now(context, instruction))
        context.exporting.add(work)

        def ended(work: asyncio.Task[ev.Event]) -> None:
            context.exporting.discard(work)
            if not work.cancelled():
                work.exception()  # marks it as seen: asyncio need not log it if the caller is gone

        work.add_done_callback(ended)
        return await asyncio.shield(work)

    async def _export_now(self, context: PushContext, instruction: do.ExportBucket) -> ev.Event:
        slot, bucket = instruction.slot, instruction.bucket
        readers = {name: self._readers(self.engines[name]) for name in instruction.engines}
        sequence = self.sequence_of(context, bucket, slot)
        bridge = self.bridges[slot.bridge]
        command = commands.Export(
            slot=slot.index,
            nbytes=instruction.nbytes,
            sequence=sequence,
            readers=tuple(reader for ranks in readers.values() for reader in ranks),
            checksum=self.checksum_of(context, bucket, bridge),
        )
        incarnation = bridge.incarnation
        if context.arenas.get(bucket, incarnation) != incarnation:
            gone = TransportBroken(f"bridge {bridge.name} was replaced after bucket {bucket} had arrived in it")
            return ev.BridgeLost(node=self.node, bridge=slot.bridge, error=gone.record())
        context.held.update((name, bucket) for name in readers)
        try:
            for ranks in readers.values():
                for reader, transport in ranks.items():
                    if transport not in HELPERS:  # they got their offers when they accepted the manifest
                        await self._offer(bridge, reader, transport, instruction.deadline)
            reply = await bridge.call(command, deadline=instruction.deadline)
        except (TransportError, LocalProtocolError) as error:
            logger.warning("[model=%s v=%d bucket=%d] export.failed: %s", *context.at(bucket), error.message)
            return self.bridge_lost(slot.bridge, incarnation, error, bucket)
        for name, ranks in readers.items():
            context.tickets[name, bucket] = tuple(reply.tickets[reader] for reader in ranks)
        return ev.BucketExported(bucket=bucket, node=self.node)

    @staticmethod
    def checksum_of(context: PushContext, bucket: int, bridge: Bridge) -> int | None:
        """Return the checksum of a bucket on a GPU, as its ranks told it. None: the bridge knows or computes it."""
        return context.sums.get(bucket) if bridge.config.gpu else None

    def bridge_lost(
        self, index: int, incarnation: str | None, error: WeightSyncError, bucket: int | None = None
    ) -> ev.BridgeLost:
        """Return the event for a bridge that failed while it was `incarnation`.

        The bridge is replaced if it still is that incarnation: the session takes its arena for gone.
        """
        bridge = self.bridges[index]
        if incarnation is not None and bridge.incarnation == incarnation:
            bridge.retire(error.message)
        record = error.record()
        return ev.BridgeLost(
            node=self.node,
            bridge=index,
            error=msgspec.structs.replace(record, bucket=bucket if record.bucket is None else record.bucket),
        )

    def sequence_of(self, context: PushContext, bucket: int, slot: do.Slot) -> int:
        """Return the sequence number under which a bucket in a slot is exported; new for every filling of a slot."""
        place = context.slots.get(bucket)
        if place is None or place[0] != slot:
            place = context.slots[bucket] = (slot, next(self._sequences))
        return place[1]

    async def receive(self, context: PushContext, bucket: int, slot: do.Slot, ticket: bytes, deadline: float) -> None:
        """Take part in the broadcast of a bucket into `slot`. Raises `TransportError`."""
        # numbered by this node, because its bridge counts on: a restarted coordinator would begin at 1 again
        sequence = next(self._sequences)
        receive = commands.Receive(ticket=ticket, slot=slot.index, sequence=sequence)
        bridge = self.bridges[slot.bridge]
        context.arenas[bucket] = bridge.incarnation
        await bridge.call(receive, deadline=deadline)
        context.slots[bucket] = (slot, sequence)

    async def await_release(self, context: PushContext, instruction: do.AwaitRelease) -> ev.Event:
        engine, bucket = instruction.engine, instruction.bucket
        place = context.slots.get(bucket)
        released = ev.BucketReleased(engine=engine, bucket=bucket)
        if place is None:
            return released
        slot, readers = place[0], tuple(self._readers(self.engines[engine]))
        wait = commands.AwaitReleased(slot=slot.index, readers=readers)
        try:
            reply = await self.bridges[slot.bridge].call(wait, deadline=instruction.deadline)
        except TransportTimeout as error:
            logger.error("[model=%s v=%d bucket=%d] never given back: %s", *context.at(bucket), error.message)  # noqa: TRY400
            self.leaks += 1
            await self.revoke(context, engine, bucket, time.monotonic() + _REVOKE)
            return ev.BucketReleased(engine=engine, bucket=bucket, leaked=True)
        except TransportError as error:  # the arena is gone, and all holds on it: on_lost tells the session
            logger.debug("[engine=%s bucket=%d] fence: %s", engine, bucket, error.message)
            return released
        context.held.discard((engine, bucket))
        if reply.damaged:
            logger.error("[model=%s v=%d bucket=%d] %s read back other bytes", *context.at(bucket), reply.damaged)
        return msgspec.structs.replace(released, damaged=bool(reply.damaged))

    async def revoke(self, context: PushContext, engine: str, bucket: int, deadline: float) -> None:
        context.tickets.pop((engine, bucket), None)
        held = (engine, bucket) in context.held
        context.held.discard((engine, bucket))
        place = context.slots.get(bucket)
        if place is None or engine not in self.engines:
            return
        slot = place[0]
        bridge = self.bridges[slot.bridge]
        if held and "torch-cuda" in self._readers(self.engines[engine]).values():
            context.suspects.add(slot.bridge)
        calls = (
            bridge.call(commands.Revoke(reader=reader, slot=slot.index), deadline=deadline)
            for reader in self._readers(self.engines[engine])
        )
        for failure in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(failure, TransportError):
                logger.debug("[engine=%s bucket=%d] revoke: %s", engine, bucket, failure.message)
            elif isinstance(failure, BaseException):
                raise failure

    def retire(self, instruction: do.RetireBridge) -> None:
        bridge = self.bridges[instruction.bridge]
        logger.warning("[bridge=%s] retired: %s", bridge.name, instruction.reason)
        bridge.retire(instruction.reason)

    async def sweep(self, context: PushContext) -> None:
        """Revoke everything that readers still hold after a push, so that the next push may use every slot."""
        if context.exporting:
            await asyncio.wait(list(context.exporting), timeout=_REVOKE)
        until = time.monotonic() + _REVOKE
        await asyncio.gather(*(self.revoke(context, *hold, until) for hold in list(context.held)))
        for index in context.suspects:
            # if a reader still has a slot open, torch gives it the same storage again, and counts the new export as
            # given back at once: only memory at another address is safe from that
            self.bridges[index].retire("a stock engine may still have its slots open")
        context.suspects.clear()
