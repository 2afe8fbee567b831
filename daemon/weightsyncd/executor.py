"""Carries out one node's part of a push: instructions in, one event each out.

The coordinating daemon calls it for its own engines and bridges; a following daemon calls it for a coordinator
elsewhere. The returned event tells how an instruction ended, failures included; only cancellation is raised.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

import msgspec

from weightsync.errors import EngineError, EngineLost, LocalProtocolError, WeightSyncError
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.session.words import buckets
from weightsyncd.delivery import Deliveries
from weightsyncd.engines import SOON
from weightsyncd.exports import NodeExports, joins_group

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from weightsyncd.bridges import Bridge
    from weightsyncd.context import PushContext
    from weightsyncd.engines import Engine, Engines

__all__ = ["NodeExecutor", "phase_of"]

logger = logging.getLogger(__name__)

_LATE_PAUSE = 60.0  # seconds after which a pause that was given up no longer takes effect


def phase_of(instruction: do.Instruction) -> str:
    """Return an engine instruction's phase in events and errors, such as "load" for `LoadBucket`; "" for others."""
    return {
        do.ProbeEngine: "probe",
        do.AcceptEngine: "accept",
        do.PauseEngine: "pause",
        do.BeginEngine: "begin",
        do.DrawWeights: "draw",
        do.ShowPlaces: "show",
        do.LoadBucket: "load",
        do.FinishEngine: "finish",
        do.VerifyEngine: "verify",
        do.ResumeEngine: "resume",
    }.get(type(instruction), "")


class NodeExecutor:
    """Carries out instructions on this node's engines and, through `exports`, on its bridges."""

    def __init__(self, node: str, address: str, engines: Engines, bridges: Sequence[Bridge]) -> None:
        self.engines = engines
        self.exports = NodeExports(node, address, engines, bridges)
        self.deliveries = Deliveries()
        self._letting_go: set[asyncio.Task[ev.Event]] = set()

    async def execute(self, context: PushContext, instruction: do.Instruction) -> ev.Event | None:
        """Carry out one instruction. Returns None for the kinds that end in no event."""
        match instruction:
            case do.ExportBucket():
                return await self.exports.export(context, instruction)
            case do.AwaitRelease():
                return await self.exports.await_release(context, instruction)
            case do.RevokeBucket():
                await self.exports.revoke(context, instruction.engine, instruction.bucket, instruction.deadline)
                return None
            case do.RetireBridge():
                self.exports.retire(instruction)
                return None
            case _:
                return await self._at_engine(context, instruction)

    # --- engines --------------------------------------------------------------------------------------------------

    async def _at_engine(self, context: PushContext, instruction: do.Instruction) -> ev.Event:
        name: str = getattr(instruction, "engine", "")
        phase = phase_of(instruction)
        first, count = getattr(instruction, "bucket", None), getattr(instruction, "count", 1)
        words, extra = (name, context.version, phase), {"phase": phase}
        if first is not None and count > 1:
            extra["buckets"] = f"{first}-{first + count - 1}"
        logger.debug("[engine=%s v=%d] %s.started bucket=%s", *words, first, extra=extra)
        try:
            engine = self.engines[name]
            async with asyncio.timeout_at(instruction.deadline), engine.lock:
                if not isinstance(instruction, do.ProbeEngine):
                    engine.done_to_at = time.monotonic()
                event = await self._ask(context, engine, instruction)
        except TimeoutError:
            error: WeightSyncError = EngineLost(
                f"engine {name} did not answer {phase!r} before its deadline", hint=self._hint(name)
            )
        except WeightSyncError as caught:
            error = caught
        except Exception as caught:
            logger.exception("[engine=%s v=%d] %s failed in an unexpected way", *words, extra=extra)
            error = EngineError(f"unexpected {type(caught).__name__} in the adapter of engine {name}: {caught}")
        else:
            logger.debug("[engine=%s v=%d] %s.complete bucket=%s", *words, first, extra=extra)
            return event
        lost = isinstance(error, EngineLost)
        if name in self.engines:
            if lost:
                self.engines[name].lost(error)
            if name in context.begun:  # it may not accept now what it accepted before
                self.engines[name].accepted.clear()
        extra |= {"error": type(error).__name__}
        record = error.record()
        bucket, message = first, record.message
        if first is not None and count > 1:  # name the bucket that failed, if it is known
            bucket = record.bucket if record.bucket in range(first, first + count) else None
            message = message if bucket is not None else f"{message} ({buckets(first, count)})"
        logger.warning("[engine=%s v=%d] %s.failed bucket=%s: %s", *words, bucket, message, extra=extra)
        record = msgspec.structs.replace(
            record,
            message=message,
            engine=name,
            phase=phase,  # whatever the engine itself calls it
            bucket=bucket,
            version=context.version,
            model=context.model,
        )
        return ev.EngineFailed(engine=name, phase=phase, error=record, lost=lost)

    def _hint(self, name: str) -> str | None:
        """Return what to do about a silent engine, if there is a likely cause."""
        if name in self.engines and joins_group(self.engines[name]) and self.engines[name].begun:
            return "its workers may wait in a broadcast that a bridge has left, over NCCL for ever: restart it"
        return None

    async def _ask(self, context: PushContext, engine: Engine, instruction: do.Instruction) -> ev.Event:
        hand, name, deadline = engine.adapter, engine.name, instruction.deadline
        match instruction:
            case do.ProbeEngine():
                info = await engine.look(deadline)
                context.incarnations[name] = info.incarnation
                return ev.EngineProbed(
                    engine=name, tp_size=info.tp_size, version=info.version, paused=info.paused, torn=info.torn
                )
            case do.AcceptEngine():
                manifest = context.known_manifest()
                if joins_group(engine):
                    await self.exports.offers_for(engine, deadline)  # raises now if the config is wrong
                broken = engine.info is not None and (engine.info.torn or engine.info.asleep)
                known = manifest.digest, broken
                if known not in engine.accepted or (broken and engine.accepted[known]):  # ask anew: it needs all
                    engine.accepted[known] = await hand.accept(manifest, deadline=deadline)
                names, draws = engine.accepted[known], hand.draws(manifest)  # an engine that can draw can show places
                left = None if names is None else len(names)
                return ev.EngineAccepted(engine=name, not_pushed=left, needs_all=broken, draws=draws)
            case do.PauseEngine():
                if name not in context.begun and (engine.info is None or not engine.info.paused):
                    engine.paused_by_us = True
                    engine.owed_until = time.monotonic() + _LATE_PAUSE
                context.modes[name] = instruction.mode
                await hand.pause(instruction.mode, deadline=deadline)  # type: ignore[arg-type]
                return ev.EnginePaused(engine=name)
            case do.BeginEngine():
                manifest, offers = context.known_manifest(), await self.exports.offers_for(engine, deadline)
                await self._check_unchanged(context, engine, deadline)
                context.shown.pop(name, None)  # places shown before are void
                context.begun.add(name)
                engine.begun, engine.paused_by_us = True, False  # only a whole update may take it back to serving
                begin = hand.begin(context.version, manifest, offers, deadline=deadline)
                if joins_group(engine):
                    await self._together(engine, begin, self.exports.join_groups(engine, deadline))
                else:
                    await begin
                return ev.EngineBegun(engine=name)
            case do.DrawWeights():
                if context.exposures is None:
                    raise LocalProtocolError("no trainer exposes its weights on this node")
                why_not = await hand.draw(context.exposures, deadline=deadline)
                if why_not:
                    logger.warning("[engine=%s v=%d] reads slots, not in place: %s", name, context.version, why_not)
                else:
                    context.drawn.add(name)
                return ev.WeightsDrawn(engine=name, drawn=not why_not)
            case do.ShowPlaces():
                shown = await hand.places(deadline=deadline)
                if isinstance(shown, str):
                    logger.warning("[engine=%s v=%d] is given buckets: %s", name, context.version, shown)
                    return ev.PlacesShown(engine=name, problem=shown)
                context.shown[name] = shown
                return ev.PlacesShown(engine=name)
            case do.LoadBucket(bucket=first, count=count):
                tickets = [context.tickets.pop((name, bucket), None) for bucket in range(first, first + count)]
                exported = [ticket for ticket in tickets if ticket is not None]
                if len(exported) < count or not exported:
                    what = f"{buckets(first, count)} {'was' if count == 1 else 'were'} not exported"
                    raise LocalProtocolError(f"{what} for engine {name}, or not all of it")
                await self._load(context, engine, first, exported, deadline)
                return ev.BucketLoaded(engine=name, bucket=first, count=count)
            case do.FinishEngine():
                await hand.finish(context.version, deadline=deadline)
                return ev.EngineFinished(engine=name)
            case do.VerifyEngine():
                expected = context.expected_of(name)
                if expected is None:
                    return ev.EngineVerified(engine=name)
                checked = await hand.verify(context.known_manifest(), expected, deadline=deadline)
                return ev.EngineVerified(engine=name, checked=checked or 0)
            case do.ResumeEngine():
                await hand.resume(deadline=deadline)
                if name in context.begun and engine.info is not None:  # it has been verified
                    info = msgspec.structs.replace(engine.info, version=context.version, torn=False, paused=False)
                    engine.learned(info)
                engine.begun = engine.paused_by_us = False
                context.modes.pop(name, None)
                context.begun.discard(name)
                return ev.EngineResumed(engine=name)
        raise LocalProtocolError(f"{type(instruction).__name__} is not for an engine")

    async def _load(
        self, context: PushContext, engine: Engine, first: int, tickets: Sequence[Sequence[bytes]], deadline: float
    ) -> None:
        load = engine.adapter.load_several(first, tickets, deadline=deadline)
        if joins_group(engine):
            await self._together(engine, load, self.exports.send_to_group(context, engine, first, tickets, deadline))
        else:
            await load

    async def _together(self, engine: Engine, *both: Coroutine[Any, Any, None]) -> None:
        """Run the engine's side and the bridges' side of a group operation. If one fails, the other is cancelled.

        The bridges then leave their groups with the engine: a member that was stopped half-way would take the next
        operation for the rest of this one.
        """
        works = [asyncio.ensure_future(one) for one in both]
        try:
            await asyncio.gather(*works)
        except BaseException:
            self.exports.leave_groups(engine.name)
            raise
        finally:
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)

    @staticmethod
    async def _check_unchanged(context: PushContext, engine: Engine, deadline: float) -> None:
        """Check that an engine has not restarted, and pause it again if it was resumed by somebody else.

        The first bytes may have been long in coming. An engine that restarted meanwhile serves: raises `EngineLost`. If
        it was probed a moment ago, it is not probed again.
        """
        known, expected = engine.info, context.incarnations.get(engine.name)
        same = known is not None and known.incarnation == expected and engine.error is None
        if same and time.monotonic() - engine.asked_at < SOON:
            return
        info = await engine.probe(deadline)
        if info.incarnation != context.incarnations.get(engine.name):
            raise EngineLost(
                f"engine {engine.name} was restarted during the push", hint="the next push brings it up to date"
            )
        mode = context.modes.get(engine.name)
        if mode not in (None, "none") and not info.paused:
            logger.warning("[engine=%s v=%d] was resumed by somebody else; pausing it", engine.name, context.version)
            await engine.adapter.pause(mode, deadline=deadline)  # type: ignore[arg-type]

    # --- the end of a push -------------------------------------------------------------------------------------------

    async def let_go(self, context: PushContext, deadline: float) -> None:
        """Let go of a push that is not driven any more.

        Engines that it paused and never touched are resumed. Engines that it touched are left torn, and paused. Returns
        once each operation waits for its engine's lock, ahead of later ones.
        """
        await self.exports.sweep(context)
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
        await asyncio.sleep(0)  # each task now holds or awaits its engine's lock

    async def settle(self, deadline: float) -> None:
        """Wait for what `let_go` began, and cancel the rest at `deadline`. For a daemon that stops."""
        if self._letting_go:
            await asyncio.wait(list(self._letting_go), timeout=max(0.0, deadline - time.monotonic()))
        for work in list(self._letting_go):
            work.cancel()
