"""Whose push begins next: the call whose claim every node that it concerns has granted."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from weightsync.wire import messages as msg
from weightsyncd.claims import Claim, Claims, is_refused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from weightsync.config import NodeConfig
    from weightsyncd.follower import Follower
    from weightsyncd.peers import Peer
    from weightsyncd.waiting import Call, Waiting

__all__ = ["Turns"]


class Turns:
    """Claims for one call at a time. A call that does not get all nodes is refused, or waits for what is in its way."""

    def __init__(
        self,
        config: NodeConfig,
        peers: Mapping[str, Peer],
        follower: Follower,
        waiting: Waiting,
        *,
        begun: Callable[[], str | None],
        take_turns: Callable[[], None],
        refuse: Callable[[Call, str, str], None],
    ) -> None:
        """`take_turns` lets every call that waits try again; `begun` names the push of this node, if there is one."""
        self._node = config.node.name
        self._peers = peers
        self._follower = follower
        self._waiting = waiting
        self._begun = begun
        self._take_turns = take_turns
        self._refuse = refuse
        self._claims = Claims(config, peers, lambda: follower.holder)
        self.claim: Claim | None = None  # of the call that is to begin the next push
        self._claiming: asyncio.Task[None] | None = None
        self._behind: list[tuple[Call, msg.Holder]] = []  # calls that wait, each with the push in its way
        self._freed = False  # a push has ended since the last claim was made

    def has(self, call: Call) -> bool:
        """Whether the call's push may begin. If that is not known yet, nodes are asked, and the call waits.

        Asking also looks at the other nodes anew: one that has restarted since its last heartbeat would be lost to the
        push that finds out.
        """
        if not self._peers:
            return self._follower.following is None
        if self.claim is not None:
            return self.claim.granted and self.claim.call is call
        if self.in_the_way(call) is None:
            self._freed, self.claim = False, self._claims.new(call)
            self._claiming = asyncio.create_task(self._make(self.claim), name="claim")
        return False

    def in_the_way(self, call: Call) -> msg.Holder | None:
        """Return the push elsewhere that the call waits for, if that is known."""
        return next((holder for waits, holder in self._behind if waits is call), None)

    def again(self) -> None:
        """A push has ended, here or elsewhere: let every call try again."""
        self._freed, self._behind = True, []
        self._take_turns()

    def look_again(self) -> None:
        """Let calls try again that wait for other nodes: what is in their way may have gone without a word."""
        if self._behind:
            self.again()

    def holder(self, claimant: str) -> msg.Holder | None:
        """Return the claim that node `claimant` has to wait for. "" is a node that only asks.

        A claimant that comes before this node by name waits for no claim.
        """
        if self.claim is None or "" < claimant < self._node:
            return None
        terms = self.claim.terms
        return msg.Holder(
            node=self._node,
            push=terms.push,
            group=terms.group,
            model=terms.model,
            version=terms.version,
            pending=True,
            repeat=terms.repeat,
        )

    async def close(self) -> None:
        """Claim nothing any more."""
        if self._claiming is not None:
            self._claiming.cancel()
            await asyncio.gather(self._claiming, return_exceptions=True)

    async def _make(self, claim: Claim) -> None:
        """Claim nodes for a call. Its push begins, or it waits, or it is refused."""
        call, begun = claim.call, False
        try:
            holder = await self._claims.make(claim)
            claim.granted = holder is None and self._begun() is None
            if claim.granted:
                self._take_turns()
                begun = self._begun() == claim.terms.push
        finally:
            self.claim = None
            if not begun:
                self._claims.withdraw(claim)
                if self._follower.following is None:
                    self._follower.tell_free()
        if holder is not None and call in self._waiting:
            if is_refused(call, holder) or (call.message.engines and self._follower.following is None):
                self._waiting.drop(call)
                reason = f"a push of version {holder.version} of {holder.model!r} by another trainer is under way"
                hint = "one push of a model at a time; try again when it has ended"
                self._refuse(call, f"{reason}, which node {holder.node} leads", hint)
            elif not self._freed:
                self._behind.append((call, holder))
        if not begun:
            self._take_turns()
