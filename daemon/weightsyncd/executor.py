"""Carries out one node's part of a push: instructions in, one event each out.

The coordinating daemon calls it for its own engines and bridges; a following daemon calls it for a coordinator
elsewhere. Whatever happens to an instruction is told in the event it returns; only cancellation gets out as an
exception.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from weightsync.adapters.verify import compare
from weightsync.errors import (
    EngineError,
    EngineLost,
    LocalProtocolError,
    TransportError,
    TransportTimeout,
    WeightSyncError,
)
from weightsync.nccl_bridge import commands
from weightsync.session import events as ev
from weightsync.session import instructions as do

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from weightsync.plan.manifest import Manifest
    from weightsyncd.bridges import Bridge
    from weightsyncd.engines import Engine, Engines

__all__ = ["NodeExecutor", "PushContext", "phase_of"]

logger = logging.getLogger(__name__)

_POLL_FIRST, _POLL_LAST = 0.0005, 0.02  # seconds between looks at a fence that has not passed
_LATE_PAUSE = 60.0  # seconds after which a pause that was given up comes no more
_REVOKE = 5.0  # seconds for a bridge to take a reader's hold away


@dataclass
class PushContext:
    """What one node knows of a push under way."""

    push: str
    model: str
    version: int
    manifest: Manifest | None = None
    expected: npt.NDArray[np.uint64] | None = None  # fingerprint of each tensor of the manifest
    places: dict[int, tuple[do.Slot, int]] = field(default_factory=dict)  # bucket → its slot here and its sequence
    tickets: dict[tuple[str, int], tuple[bytes, ...]] = field(default_factory=dict)  # (engine, bucket) → by tp rank
    incarnations: dict[str, str] = field(default_factory=dict)  # engine → what it was when it was probed
    modes: dict[str, str] = field(default_factory=dict)  # engine that was paused here and not resumed → how
    begun: set[str] = field(default_factory=set)  # engines touched here and not resumed
    held: set[tuple[str, int]] = field(default_factory=set)  # (engine, bucket) exported, not released
    exporting: set[asyncio.Task[ev.Event]] = field(default_factory=set)

    def known_manifest(self) -> Manifest:
        if self.manifest is None:
            raise LocalProtocolError("the push has no manifest yet", version=self.version)
        return self.manifest


def phase_of(instruction: do.Instruction) -> str:
    """The phase an engine instruction is called by in events and errors: "load" for `LoadBucket`."""
    return {
        do.ProbeEngine: "probe",
        do.AcceptEngine: "accept",
        do.PauseEngine: "pause",
        do.BeginEngine: "begin",
        do.LoadBucket: "load",
        do.FinishEngine: "finish",
        do.VerifyEngine: "verify",
        do.ResumeEngine: "resume",
    }.get(type(instruction), "wire")


class NodeExecutor:
    """This node's engines and bridges, as instructions see them."""

    def __init__(self, node: str, engines: Engines, bridges: Sequence[Bridge]) -> None:
        self.node = node
        self.engines = engines
        self.bridges = bridges
        self._sequences = itertools.count(1)
        self._offers: dict[tuple[str, str, str], bytes] = {}  # (bridge incarnation, reader, transport) → offer
        self._letting_go: set[asyncio.Task[ev.Event]] = set()
        self.leaks = 0  # exports whose reader never released them

    async def execute(self, context: PushContext, instruction: do.Instruction) -> ev.Event | None:
        """Carry out one instruction. None for the kinds that end in no event."""
        match instruction:
            case do.ExportBucket():
                return await self._export(context, instruction)
            case do.AwaitRelease():
                return await self._await_release(context, instruction)
            case do.RevokeBucket():
                await self._revoke(context, instruction.engine, instruction.bucket, instruction.deadline)
                return None
            case do.RetireBridge():
                self._retire(instruction)
                return None
            case _:
                return await self._at_engine(context, instruction)

    # --- engines --------------------------------------------------------------------------------------------------

    async def _at_engine(self, context: PushContext, instruction: do.Instruction) -> ev.Event:
        name: str = getattr(instruction, "engine", "")
        phase = phase_of(instruction)
        bucket: int | None = getattr(instruction, "bucket", None)
        logger.debug("[engine=%s v=%d] %s.started bucket=%s", name, context.version, phase, bucket)
        try:
            engine = self.engines[name]
            async with asyncio.timeout_at(instruction.deadline), engine.lock:
                event = await self._ask(context, engine, instruction)
        except TimeoutError:
            error: WeightSyncError = EngineLost(f"did not answer {phase!r} before its deadline")
        except WeightSyncError as caught:
            error = caught
        except Exception as caught:
            logger.exception("[engine=%s v=%d] %s failed in an unexpected way", name, context.version, phase)
            error = EngineError(f"unexpected {type(caught).__name__} in its adapter: {caught}")
        else:
            logger.debug("[engine=%s v=%d] %s.complete bucket=%s", name, context.version, phase, bucket)
            return event
        lost = isinstance(error, EngineLost)
        if lost and name in self.engines:
            self.engines[name].lost(error)
        logger.warning("[engine=%s v=%d] %s.failed bucket=%s: %s", name, context.version, phase, bucket, error.message)
        record = msgspec.structs.replace(
            error.record(),
            engine=name,
            phase=phase,  # whatever the engine itself calls it
            bucket=bucket,
            version=context.version,
            model=context.model,
        )
        return ev.EngineFailed(engine=name, phase=phase, error=record, lost=lost)

    async def _ask(self, context: PushContext, engine: Engine, instruction: do.Instruction) -> ev.Event:
        hand, name, deadline = engine.adapter, engine.name, instruction.deadline
        match instruction:
            case do.ProbeEngine():
                info = await engine.probe(deadline)
                context.incarnations[name] = info.incarnation
                return ev.EngineProbed(
                    engine=name, tp_size=info.tp_size, version=info.version, paused=info.paused, torn=info.torn
                )
            case do.AcceptEngine():
                manifest = context.known_manifest()
                untouched = engine.accepted.get(manifest.digest)
                broken = engine.info is not None and (engine.info.torn or engine.info.asleep)
                if untouched is None or (broken and untouched):  # it needs every tensor: let it say so
                    untouched = await hand.accept(manifest, deadline=deadline)
                    engine.accepted[manifest.digest] = untouched
                return ev.EngineAccepted(engine=name, untouched=len(untouched))
            case do.PauseEngine():
                if name not in context.begun and (engine.info is None or not engine.info.paused):
                    engine.paused_by_us = True
                    engine.owed_until = time.monotonic() + _LATE_PAUSE
                context.modes[name] = instruction.mode
                await hand.pause(instruction.mode, deadline=deadline)  # type: ignore[arg-type]
                return ev.EnginePaused(engine=name)
            case do.BeginEngine():
                manifest, offers = context.known_manifest(), await self._offers_for(engine, deadline)
                await self._check_unchanged(context, engine, deadline)
                context.begun.add(name)
                engine.paused_by_us = False  # from here on only a whole update may take it back to serving
                await hand.begin(context.version, manifest, offers, deadline=deadline)
                return ev.EngineBegun(engine=name)
            case do.LoadBucket():
                tickets = context.tickets.pop((name, instruction.bucket), None)
                if tickets is None:
                    raise LocalProtocolError(f"bucket {instruction.bucket} was not exported for engine {name}")
                await hand.load(instruction.bucket, tickets, deadline=deadline)
                return ev.BucketLoaded(engine=name, bucket=instruction.bucket)
            case do.FinishEngine():
                await hand.finish(context.version, deadline=deadline)
                return ev.EngineFinished(engine=name)
            case do.VerifyEngine():
                residents = await hand.verify(deadline=deadline)
                if residents is None or context.expected is None:
                    return ev.EngineVerified(engine=name)
                return ev.EngineVerified(
                    engine=name, checked=compare(residents, context.known_manifest(), context.expected)
                )
            case do.ResumeEngine():
                await hand.resume(deadline=deadline)
                if name in context.begun and engine.info is not None:  # it said so in `finish`, and was found right
                    info = msgspec.structs.replace(engine.info, version=context.version, torn=False, paused=False)
                    engine.learned(info)
                engine.paused_by_us = False
                context.modes.pop(name, None)
                context.begun.discard(name)
                return ev.EngineResumed(engine=name)
        raise LocalProtocolError(f"{type(instruction).__name__} is not for an engine")

    @staticmethod
    async def _check_unchanged(context: PushContext, engine: Engine, deadline: float) -> None:
        """The bytes may have been long in coming. An engine that restarted meanwhile is another one, and serves; one
        that somebody resumed must not serve while it loads.
        """
        info = await engine.probe(deadline)
        if info.incarnation != context.incarnations.get(engine.name):
            raise EngineLost("it was restarted during the push", hint="the next push brings it up to date")
        mode = context.modes.get(engine.name)
        if mode not in (None, "none") and not info.paused:
            logger.warning("[engine=%s v=%d] was resumed by somebody else; pausing it", engine.name, context.version)
            await engine.adapter.pause(mode, deadline=deadline)  # type: ignore[arg-type]

    async def _offers_for(self, engine: Engine, deadline: float) -> list[list[bytes]]:
        """One attach descriptor for each tp rank of the engine and each arena of this node."""
        return [
            [await self._offer(bridge, reader, transport, deadline) for bridge in self.bridges]
            for reader, transport in self._readers(engine).items()
        ]

    async def _offer(self, bridge: Bridge, reader: str, transport: str, deadline: float) -> bytes:
        """The descriptor with which one reader attaches to one arena; made once for each incarnation of the bridge."""
        key = (bridge.incarnation or "", reader, transport)
        if key not in self._offers:
            reply = await bridge.call(commands.Offer(reader=reader, transport=transport), deadline=deadline)
            alive = {b.incarnation for b in self.bridges}
            self._offers = {known: offer for known, offer in self._offers.items() if known[0] in alive}
            self._offers[key] = reply.offer
        return self._offers[key]

    @staticmethod
    def _readers(engine: Engine) -> dict[str, str]:
        """The readers of an engine, by tp rank, and the transport of each."""
        if engine.info is None:
            raise EngineLost("it has not been probed", engine=engine.name)
        return {f"{engine.name}/{rank}": engine.info.transport for rank in range(engine.info.tp_size)}

    # --- the wire -------------------------------------------------------------------------------------------------

    async def _export(self, context: PushContext, instruction: do.ExportBucket) -> ev.Event:
        """Runs to its end even when nobody waits any more: what was exported has to be revoked by `sweep`."""
        work = asyncio.create_task(self._export_now(context, instruction))
        context.exporting.add(work)

        def ended(work: asyncio.Task[ev.Event]) -> None:
            context.exporting.discard(work)
            if not work.cancelled():
                work.exception()  # whoever asked may be gone: then it is no fault worth a log line

        work.add_done_callback(ended)
        return await asyncio.shield(work)

    async def _export_now(self, context: PushContext, instruction: do.ExportBucket) -> ev.Event:
        slot, bucket = instruction.slot, instruction.bucket
        readers = {name: self._readers(self.engines[name]) for name in instruction.engines}
        sequence = self.sequence_of(context, bucket, slot)
        command = commands.Export(
            slot=slot.index,
            nbytes=instruction.nbytes,
            sequence=sequence,
            readers=tuple(reader for ranks in readers.values() for reader in ranks),
        )
        bridge = self.bridges[slot.bridge]
        incarnation = bridge.incarnation
        context.held.update((name, bucket) for name in readers)
        try:
            for ranks in readers.values():
                for reader, transport in ranks.items():
                    await self._offer(bridge, reader, transport, instruction.deadline)
            reply = await bridge.call(command, deadline=instruction.deadline)
        except (TransportError, LocalProtocolError) as error:
            logger.warning("[v=%d bucket=%d] export.failed: %s", context.version, bucket, error.message)
            return self.bridge_lost(slot.bridge, incarnation, error, bucket)
        for name, ranks in readers.items():
            context.tickets[name, bucket] = tuple(reply.tickets[reader] for reader in ranks)
        return ev.BucketExported(bucket=bucket, node=self.node)

    def bridge_lost(
        self, index: int, incarnation: str | None, error: WeightSyncError, bucket: int | None = None
    ) -> ev.BridgeLost:
        """The event for a bridge that failed while it was `incarnation`. If it still is, it is replaced: the session
        takes its arena for gone.
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
        """The number under which this bucket's bytes in this slot are exported; new for every filling of a slot."""
        place = context.places.get(bucket)
        if place is None or place[0] != slot:
            place = context.places[bucket] = (slot, next(self._sequences))
        return place[1]

    async def receive(self, context: PushContext, bucket: int, slot: do.Slot, ticket: bytes, deadline: float) -> None:
        """Take part in the broadcast of a bucket into `slot`. Raises `TransportError`."""
        # numbered by this node, whose bridge counts on: a coordinator that was restarted begins at 1 again
        sequence = next(self._sequences)
        receive = commands.Receive(ticket=ticket, slot=slot.index, sequence=sequence)
        await self.bridges[slot.bridge].call(receive, deadline=deadline)
        context.places[bucket] = (slot, sequence)

    async def _await_release(self, context: PushContext, instruction: do.AwaitRelease) -> ev.Event:
        engine, bucket = instruction.engine, instruction.bucket
        place = context.places.get(bucket)
        released = ev.BucketReleased(engine=engine, bucket=bucket)
        if place is None:
            return released
        slot, pause = place[0], _POLL_FIRST
        while time.monotonic() < instruction.deadline:
            try:
                reply = await self.bridges[slot.bridge].call(
                    commands.Pending(slot=slot.index), deadline=instruction.deadline
                )
            except TransportTimeout:
                break
            except TransportError as error:  # the arena is gone, and every hold on it: on_lost tells the session
                logger.debug("[engine=%s bucket=%d] fence: %s", engine, bucket, error.message)
                return released
            if not any(reader.rpartition("/")[0] == engine for reader in reply.readers):
                context.held.discard((engine, bucket))
                damaged = [reader for reader in reply.damaged if reader.rpartition("/")[0] == engine]
                if damaged:
                    logger.error("[v=%d bucket=%d] %s read back other bytes", context.version, bucket, damaged)
                return msgspec.structs.replace(released, damaged=bool(damaged))
            await asyncio.sleep(pause)
            pause = min(2 * pause, _POLL_LAST)
        logger.error("[engine=%s v=%d bucket=%d] never released its slot", engine, context.version, bucket)
        self.leaks += 1
        await self._revoke(context, engine, bucket, time.monotonic() + _REVOKE)
        return ev.BucketReleased(engine=engine, bucket=bucket, leaked=True)

    async def _revoke(self, context: PushContext, engine: str, bucket: int, deadline: float) -> None:
        context.tickets.pop((engine, bucket), None)
        context.held.discard((engine, bucket))
        place = context.places.get(bucket)
        if place is None or engine not in self.engines:
            return
        slot = place[0]
        bridge = self.bridges[slot.bridge]
        calls = (
            bridge.call(commands.Revoke(reader=reader, slot=slot.index), deadline=deadline)
            for reader in self._readers(self.engines[engine])
        )
        for failure in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(failure, TransportError):
                logger.debug("[engine=%s bucket=%d] revoke: %s", engine, bucket, failure.message)
            elif isinstance(failure, BaseException):
                raise failure

    def _retire(self, instruction: do.RetireBridge) -> None:
        bridge = self.bridges[instruction.bridge]
        logger.warning("[bridge=%s] retired: %s", bridge.name, instruction.reason)
        bridge.retire(instruction.reason)

    # --- the end of a push -------------------------------------------------------------------------------------------

    async def sweep(self, context: PushContext) -> None:
        """The push is over: take away whatever its readers still hold, so that the next may use every slot."""
        if context.exporting:
            await asyncio.wait(list(context.exporting), timeout=_REVOKE)
        until = time.monotonic() + _REVOKE
        await asyncio.gather(*(self._revoke(context, *hold, until) for hold in list(context.held)))

    async def let_go(self, context: PushContext, deadline: float) -> None:
        """Nobody drives the push any more: engines that it paused and never touched are resumed, and those that it has
        touched are left torn, and paused. Returns when that is on its way, and before anything that comes later.
        """
        await self.sweep(context)
        ends: list[do.Instruction] = [
            do.ResumeEngine(engine=name, deadline=deadline)
            for name in sorted(set(context.modes) - context.begun)
            if self.engines[name].paused_by_us
        ]
        for name in sorted(context.begun):
            logger.warning("[engine=%s v=%d] is left torn and paused: its push ended half-way", name, context.version)
            if context.modes.get(name, "none") == "none":
                ends.append(do.PauseEngine(engine=name, mode="abort", deadline=deadline))
        for instruction in ends:
            work = asyncio.create_task(self._at_engine(context, instruction))
            self._letting_go.add(work)
            work.add_done_callback(self._letting_go.discard)
        await asyncio.sleep(0)  # each stands in line for its engine now

    async def settle(self, deadline: float) -> None:
        """Wait until every engine that was let go has heard of it; for a daemon that ends."""
        if self._letting_go:
            await asyncio.wait(list(self._letting_go), timeout=max(0.0, deadline - time.monotonic()))
        for work in list(self._letting_go):
            work.cancel()
