"""A push that another daemon coordinates and that holds this node, and what this node is doing for it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weightsync.wire import messages as msg

if TYPE_CHECKING:
    from weightsyncd.branch import Branch
    from weightsyncd.context import PushContext

__all__ = ["HeldPush", "Working"]


@dataclass(eq=False)
class HeldPush:
    """A push elsewhere that holds this node."""

    identity: bytes  # of the coordinator's connection
    context: PushContext
    heard: float
    node: str = ""  # that coordinates it
    claim: msg.Claim | None = None  # that it began with
    begun: bool = True  # it has done more than to claim this node
    branch: Branch | None = None  # this node's ranks in it
    rails: set[tuple[int, asyncio.Task[object] | None]] = field(default_factory=set)  # what may be under way on each
    tasks: set[asyncio.Task[object]] = field(default_factory=set)  # instructions under way
    end: asyncio.Task[None] | None = None  # set once it is being let go

    def holder(self) -> msg.Holder:
        """Return the push as other nodes are told of it."""
        context, claim = self.context, self.claim
        call = claim or (self.branch.call if self.branch is not None else None)
        return msg.Holder(
            node=self.node or "?",
            push=context.push,
            group=call.group if call is not None else "",
            model=context.model or "?",
            version=context.version,
            pending=not self.begun,
            ending=self.end is not None,
            repeat=claim is not None and claim.repeat,
        )


class Working:
    """Marks the current task as work for a push, and a rail as busy.

    Letting go of the push cancels the task, and leaves the rail's communicator unless the task has ended well.
    """

    def __init__(self, held: HeldPush, rail: int | None = None) -> None:
        self._held = held
        self._rail = rail
        self._task: asyncio.Task[object] | None = asyncio.current_task()
        self._lines = held.context.lines()

    def __enter__(self) -> None:
        assert self._task is not None, "instructions are carried out in tasks"
        self._lines.__enter__()
        self._held.tasks.add(self._task)
        if self._rail is not None:
            self._held.rails.add((self._rail, self._task))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._task is not None
        self._lines.__exit__()
        if self._rail is not None and kind is None:
            self._held.rails.discard((self._rail, self._task))
        self._held.tasks.discard(self._task)
        self._held.heard = time.monotonic()
