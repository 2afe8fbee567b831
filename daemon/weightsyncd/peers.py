"""Other nodes, and how this daemon reaches their engines.

Every daemon can coordinate. The coordinator of a push sends instructions for another node's engines to that node,
inside `Execute`. Each outcome comes back as the event that it would be at home. The bytes go by `rails`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

import msgspec

from weightsync.errors import DaemonLost, ProtocolError, WeightSyncError
from weightsync.plan.exposure import Exposures
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.wire import messages as msg
from weightsync.wire.codec import plain, structured
from weightsync.wire.daemon_links import PeerLink
from weightsyncd.executor import phase_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightsync.config import NodeConfig
    from weightsync.errors import ErrorRecord
    from weightsync.wire.keys import ClusterKey
    from weightsyncd.context import PushContext

__all__ = ["EVENTS", "INSTRUCTIONS", "MANIFEST_UNKNOWN", "Peer"]

logger = logging.getLogger(__name__)

MANIFEST_UNKNOWN = "manifest"  # the phase of a follower's error about a digest that it does not know (any more)

EVENTS = {kind.__name__: kind for kind in vars(ev).values() if isinstance(kind, type) and issubclass(kind, ev.Event)}
INSTRUCTIONS = {
    kind.__name__: kind for kind in vars(do).values() if isinstance(kind, type) and issubclass(kind, do.Instruction)
}


class Peer:
    """One other node, kept attached for as long as this daemon lives."""

    def __init__(
        self,
        name: str,
        endpoint: str,
        config: NodeConfig,
        *,
        key: ClusterKey | None,
        on_lost: Callable[[str, ErrorRecord], None],
        on_rank: Callable[[str, msg.RankSays], None],
        on_free: Callable[[], None],
        taken: Callable[[str, Sequence[str]], str | None],
    ) -> None:
        """`key` is for TCP alone. `on_rank` gets what trainer ranks there say. `on_free` is called when the node has
        refused a claim and may be free now. `taken(node, engine names)` returns why the node cannot be attached, if it
        cannot.
        """
        self.name = name
        self.endpoint = endpoint
        self.info: msg.Attached | None = None
        self.problem = "not reached yet"
        self._config = config
        self._key = key if endpoint.startswith("tcp://") else None
        self._on_lost = on_lost
        self._on_rank = on_rank
        self._on_free = on_free
        self._taken = taken
        self._link: PeerLink | None = None
        self._lost_at = -float("inf")
        self._known: set[tuple[str, bytes]] = set()  # (incarnation, manifest digest) sent before
        self._engines: tuple[msg.EngineStatus, ...] = ()
        self._shown: dict[str, Exposures] = {}  # engine → the places that it has shown last

    @property
    def engines(self) -> tuple[msg.EngineStatus, ...]:
        """Its engines. A lost node's engines are shown as lost, not dropped: a push must say that it missed them."""
        if self.info is not None:
            return self.info.engines
        return tuple(msgspec.structs.replace(e, state="lost", error=self.problem) for e in self._engines)

    @property
    def state(self) -> str:
        """ "connected", or why it is not."""
        return "connected" if self.info is not None else self.problem

    async def keep(self) -> None:
        """Attach, ask again with every heartbeat, and attach again after a loss, for ever.

        After a connection broke, this attaches again at once, since both sides may live.
        """
        patience = self._config.timeouts.liveness
        try:
            while True:
                if self._link is not None and self._link.broken.is_set():
                    await self._hang_up("its connection broke")
                try:
                    self._link = self._link or PeerLink(
                        self.endpoint, patience=patience, key=self._key, on_news=self._hear
                    )
                except DaemonLost as error:
                    self.problem = error.message
                else:
                    await self._attach(self._link)
                if self._link is None or self.info is None:
                    await asyncio.sleep(patience / 5)
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience / 5):
                        await self._link.broken.wait()
        finally:
            self.info = None
            await self._hang_up("")

    async def _hang_up(self, reason: str) -> None:
        """Close the link. A node that was attached counts as lost."""
        link = self._link
        if link is not None and self.info is not None:
            await self._lose(link, reason)
        elif link is not None:
            self._link = None
            await link.close()

    def _hear(self, message: msg.Message) -> None:
        if isinstance(message, msg.RankSays):
            self._on_rank(self.name, message)
        elif isinstance(message, msg.Free):
            self._on_free()

    async def refresh(self, claim: msg.Claim | None = None) -> msg.Attached | None:
        """Ask the node for its engines and incarnation, and update `info`. Returns its answer, if it gives one.

        A node that was lost just now is asked, too: it may be back. With `claim`, a push that is about to begin claims
        the node.
        """
        lately = time.monotonic() - self._lost_at < self._config.timeouts.liveness
        if self._link is None or (self.info is None and not lately):
            return None
        return await self._attach(self._link, claim)

    async def _attach(
        self, link: PeerLink, claim: msg.Claim | None = None, *, again: bool = False
    ) -> msg.Attached | None:
        question = msg.Attach(node=self._config.node.name, claim=claim)
        patience = self._config.timeouts.liveness
        asked, late = time.monotonic(), []  # `late`: whether this event loop was far behind, half-way to the deadline
        half = asyncio.get_running_loop().call_later(
            patience / 2, lambda: late.append(time.monotonic() - asked > patience * 3 / 4)
        )
        try:
            answer = await link.ask(question, deadline=asked + patience)
        except WeightSyncError as error:
            if link is not self._link or (self.info is not None and not link.silent):
                return None  # the link was replaced; or the node lives, and answers too late
            if self.info is None:
                self.problem = error.message + (f"; {error.hint}" if error.hint else "")
            elif any(late) and not again:  # this event loop was held up, and could hear nothing
                return await self._attach(link, claim, again=True)
            else:
                await self._lose(link, f"it has not been heard for {patience:g} s")
            return None
        finally:
            half.cancel()
        if link is not self._link:
            return None  # replaced meanwhile
        problem = self._problem_of(answer)
        if problem is not None or not isinstance(answer, msg.Attached):
            self.problem = problem or "its answer makes no sense"
            if self.info is not None:
                await self._lose(link, self.problem)
            return None
        before, self.info, self._engines = self.info, answer, answer.engines
        if before is not None and _daemon_of(before) != _daemon_of(answer):
            link.fail(DaemonLost(f"node {self.name} was restarted"))
            self._on_lost(self.name, DaemonLost(f"node {self.name} was restarted").record())
        if before is None or before.incarnation != answer.incarnation:
            logger.info("[node=%s] attached: %d engines, %d bridges", self.name, len(answer.engines), len(answer.slots))
        return answer

    def _problem_of(self, answer: msg.Message) -> str | None:
        """Return why the daemon that gives this answer cannot be a peer, if it cannot."""
        if not isinstance(answer, msg.Attached) or answer.node != self.name:
            return f"the daemon there calls itself {getattr(answer, 'node', '?')!r}"
        if answer.slot_bytes < self._config.arena.slot_bytes:
            return (
                f"its slots hold {answer.slot_bytes} bytes, this node's {self._config.arena.slot_bytes}; "
                "set arena.slot_bytes alike on both"
            )
        return self._taken(self.name, [e.name for e in answer.engines])

    async def _lose(self, link: PeerLink, reason: str) -> None:
        """Take the node for lost. Messages queued for it are dropped: a daemon that comes back must not get them."""
        logger.warning("[node=%s] lost: %s", self.name, reason)
        self.info, self.problem, self._link = None, reason, None
        self._lost_at = time.monotonic()
        error = DaemonLost(f"node {self.name} was lost: {reason}")
        link.fail(error)
        self._on_lost(self.name, error.record())
        await link.close()

    async def ask(self, message: msg.Message, deadline: float) -> msg.Message:
        """Ask the node something and return the answer. Raises `DaemonLost`, or the error that the node answers."""
        if self._link is None or self.info is None:
            raise DaemonLost(f"node {self.name} is not connected: {self.problem}")
        return await self._link.ask(message, deadline=deadline)

    def tell(self, message: msg.Message) -> None:
        """Send a message that needs no answer."""
        if self._link is not None:
            self._link.tell(message)

    async def execute(self, context: PushContext, instruction: do.Instruction) -> ev.Event | None:
        """Have the node carry out one instruction. If it does not answer, returns `EngineFailed` or `NodeLost`."""
        incarnation = self.info.incarnation if self.info is not None else ""
        manifest = context.manifest
        send = manifest is not None and (incarnation, manifest.digest) not in self._known
        expected = context.expected_of(instruction.engine) if isinstance(instruction, do.VerifyEngine) else None
        shown = self._shown.get(instruction.engine) if isinstance(instruction, do.ShowPlaces) else None
        question = msg.Execute(
            push=context.push,
            model=context.model,
            version=context.version,
            instruction=plain(instruction),
            timeout=max(0.0, instruction.deadline - time.monotonic()),
            plan=manifest.digest if manifest is not None else None,
            manifest=manifest.pack() if send and manifest is not None else None,
            fingerprints=expected.tobytes() if expected is not None else None,
            places=shown.digest if shown is not None else None,
        )
        # the node keeps the same deadline; its answer takes a moment more
        try:
            answer = await self.ask(question, instruction.deadline + self._config.timeouts.liveness)
            if not isinstance(answer, msg.Executed):
                raise ProtocolError(f"node {self.name} answered Execute with {type(answer).__name__}")
            if send and manifest is not None:
                self._known.add((incarnation, manifest.digest))
            return self._event_of(answer, instruction, context)
        except WeightSyncError as error:
            if manifest is not None and not send and error.phase == MANIFEST_UNKNOWN:
                self._known.discard((incarnation, manifest.digest))  # it keeps only the latest: send it again
                return await self.execute(context, instruction)
            lost = isinstance(error, DaemonLost)
            engine = getattr(instruction, "engine", None)
            if engine is not None and not isinstance(instruction, (do.AwaitRelease, do.RevokeBucket)):
                return ev.EngineFailed(engine=engine, phase=phase_of(instruction), error=error.record(), lost=lost)
            return ev.NodeLost(node=self.name, error=error.record())

    def _event_of(self, answer: msg.Executed, instruction: do.Instruction, context: PushContext) -> ev.Event | None:
        """Return the event of an answer, if it has one.

        Raises `CodecError`; `ProtocolError` if the event is of another engine, or places are missing.
        """
        if not answer.event:
            return None
        event = structured(answer.event, EVENTS.get(str(answer.event.get("type")), ev.Tick))
        told, asked = (getattr(of, "engine", None) for of in (event, instruction))
        if told is not None and told != asked:
            raise ProtocolError(f"node {self.name} was asked for engine {asked!r} and answered for {told!r}")
        if isinstance(instruction, do.ShowPlaces) and isinstance(event, ev.PlacesShown) and not event.problem:
            engine = instruction.engine
            if answer.places is not None:
                self._shown = {e.name: self._shown[e.name] for e in self.engines if e.name in self._shown}
                self._shown[engine] = Exposures.unpack(answer.places)
            if engine not in self._shown:
                raise ProtocolError(f"node {self.name} has not told the places that engine {engine} shows")
            context.shown[engine] = self._shown[engine]
        return event


def _daemon_of(info: msg.Attached) -> str:
    """The part of the incarnation that changes with the daemon, and not with one of its bridges."""
    return info.incarnation.partition(":")[0]
