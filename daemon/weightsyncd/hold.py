"""Holds this node for one push of another daemon at a time, and lets go of it with nothing left under way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

from weightsync.errors import PushRefused
from weightsyncd.context import PushContext
from weightsyncd.held_push import HeldPush
from weightsyncd.rails import leave

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from weightsync.config import NodeConfig
    from weightsync.errors import ErrorRecord
    from weightsync.wire import messages as msg
    from weightsyncd.bridges import Bridge
    from weightsyncd.executor import NodeExecutor
    from weightsyncd.remote_calls import RemoteCalls
    from weightsyncd.waiting import Call

__all__ = ["Hold", "Leading"]

logger = logging.getLogger(__name__)


class Leading(Protocol):
    """What this node leads itself."""

    @property
    def busy(self) -> bool:
        """A push from here holds this node."""

    def holder(self, claimant: str) -> msg.Holder | None:
        """Return what another node that claims this one has to wait for here. "" is a node that only asks."""

    def awaits(self, group: str) -> bool:
        """Whether ranks of a trainer wait here for its push."""

    async def wind_up(self, until: float) -> None:
        """Wait for a push from here that has ended and only lets go of what it held."""

    def missed(self, call: msg.Gather, ranks: Collection[int], error: ErrorRecord) -> None:
        """Note a push from elsewhere that has failed, which ranks of this node may still call for."""

    def again(self, calls: Sequence[Call]) -> None:
        """Let calls wait that came too late for a push from elsewhere."""


class Hold:
    """The push that holds this node, if one does."""

    def __init__(
        self,
        config: NodeConfig,
        executor: NodeExecutor,
        bridges: Sequence[Bridge],
        calls: RemoteCalls,
        leading: Callable[[], Leading],
        on_free: Callable[[], None],
    ) -> None:
        """`calls` are those of other nodes for ranks that are here. `on_free` is called when the node is let go."""
        self.held: HeldPush | None = None
        self.stopping = False
        self.released: deque[tuple[bytes, str]] = deque(maxlen=64)  # pushes whose late instructions are refused
        self._config = config
        self._executor = executor
        self._bridges = bridges
        self._calls = calls
        self._leading = leading
        self._on_free = on_free
        self._free = asyncio.Event()
        self._free.set()

    def of(self, identity: bytes, push: str) -> HeldPush | None:
        """Return the push that holds this node, if it is this one, of this connection."""
        held = self.held
        return held if held is not None and (held.identity, held.context.push) == (identity, push) else None

    def take(self, identity: bytes, context: PushContext, node: str) -> HeldPush:
        """Hold this node for a push that `node` leads."""
        self._free.clear()
        self.held = HeldPush(identity, context, time.monotonic(), node)
        return self.held

    async def work(self, identity: bytes, push: str, node: str, model: str = "", version: int = 0) -> HeldPush:
        """Return the push for which there is work, which takes this node with its first instruction.

        Raises `PushRefused` while another holds it.
        """
        while True:
            self.check_free(identity)
            if (identity, push) in self.released:
                raise PushRefused(f"push {push} has ended")
            held = self.held
            if held is None:
                if self.stopping:
                    raise PushRefused(f"node {self._config.node.name} is stopping")
                held = self.take(identity, PushContext(push, model, version), node)
            if held.context.push == push and held.end is None:
                held.heard, held.begun = time.monotonic(), True
                return held
            await self.let_go(held, "its coordinator has gone on")

    def check_free(self, identity: bytes) -> None:
        """Raise `PushRefused` while a push that is not of this coordinator holds the node."""
        node = self._config.node.name
        if self._leading().busy:
            raise PushRefused(f"node {node} is busy with a push of its own")
        if self.held is not None and self.held.identity != identity:
            raise PushRefused(f"node {node} is busy with push {self.held.context.push}")

    async def let_go(self, held: HeldPush, why: str | None, error: ErrorRecord | None = None) -> None:
        """Let go of a push, and wait until that is done. `why`: what ended it, unless its coordinator did."""
        await asyncio.shield(self.letting_go(held, why, error))

    def letting_go(self, held: HeldPush, why: str | None, error: ErrorRecord | None = None) -> asyncio.Task[None]:
        """Begin to let go of a push, unless that has begun; return the task that does."""
        if held.end is None:
            self._calls.drop(held.identity, held.context.push)
            if why is not None:
                words = held.context.model, held.context.version, held.context.push, why
                logger.warning("[model=%s v=%d] push %s is let go: %s", *words, extra={"push": held.context.push})
            held.end = asyncio.create_task(self._end(held, why, error))
        return held.end

    async def finish(self, until: float) -> None:
        """Hold this node for nothing new. The push that holds it has half of the time to end, and is let go then."""
        self.stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout((until - time.monotonic()) / 2):
                await self._free.wait()
        if self.held is not None:
            await self.let_go(self.held, "weightsyncd is stopping")

    async def _end(self, held: HeldPush, why: str | None, error: ErrorRecord | None) -> None:
        timeouts = self._config.timeouts
        for task in held.tasks:
            task.cancel()
        await asyncio.gather(*held.tasks, return_exceptions=True)
        try:
            try:
                # nothing of a broadcast that was under way writes into a slot after this
                await asyncio.gather(*(leave(self._bridges[rail]) for rail in {rail for rail, _ in held.rails}))
                if held.branch is not None:
                    self._leading().again(await held.branch.end(why, error, grace=timeouts.grace))
            finally:
                await self._executor.let_go(held.context, time.monotonic() + timeouts.operation)
        finally:
            if self.held is held:
                self.held = None
                self._free.set()
                self._on_free()
