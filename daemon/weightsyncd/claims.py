"""Claims: before a push begins, each node that it concerns is held for it, or says what is in its way.

Trainers on several nodes may call at the same time. A push that found half of its nodes taken would bring its version
to the other half alone. Two pushes that each held nodes that the other needs would wait for ever. So a call that is to
begin a push claims all nodes at once, with the `attach` that each push sends anyway. If one node is not granted, the
others are given back, and the call waits without holding anything. If two claims meet, the one from the first node by
name goes on.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from weightsync.wire import messages as msg

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from weightsync.config import NodeConfig
    from weightsyncd.peers import Peer
    from weightsyncd.waiting import Call

__all__ = ["Claim", "Claims", "is_refused"]

logger = logging.getLogger(__name__)

_MOMENT = 0.05  # seconds; other claims begin their push within that time, or give their nodes back


@dataclass(eq=False)
class Claim:
    """The claim of one call."""

    call: Call
    terms: msg.Claim
    nodes: set[str] = field(default_factory=set)  # nodes that are held for it, or may be
    granted: bool = False  # its push may begin


class Claims:
    """Makes the claims of one node, one at a time. `following` returns the push elsewhere that holds this node."""

    def __init__(
        self, config: NodeConfig, peers: Mapping[str, Peer], following: Callable[[], msg.Holder | None]
    ) -> None:
        self._home = config.node.name
        self._timeouts = config.timeouts
        self._peers = peers
        self._following = following
        self._given_back = -float("inf")  # when this node last gave back nodes that it had claimed

    def new(self, call: Call) -> Claim:
        """Return a claim of which no node has heard yet."""
        words = call.message
        terms = msg.Claim(
            push=f"{self._home}-{secrets.token_hex(8)}",
            group=words.group,
            model=words.model,
            version=words.version,
            engines=words.engines,
        )
        return Claim(call, terms)

    async def make(self, claim: Claim) -> msg.Holder | None:
        """Claim all nodes. Returns what is in the way; None if all nodes that answer are held for the claim."""
        # nodes given back let other claims try again, and theirs let this one: not at full speed
        await asyncio.sleep(max(0.0, self._given_back + _MOMENT - time.monotonic()))
        while True:
            if (held := self._following()) is not None:
                return await self._as_its_leader_says(held)
            found = await self._ask(claim)
            if (held := self._following()) is not None:  # this node has given way to another claim meanwhile
                found.append(await self._as_its_leader_says(held))
            certain = [holder for holder in found if not holder.pending or holder.node < self._home]
            if certain:
                return min(certain, key=lambda holder: not is_refused(claim.call, holder))
            if not found:
                return None
            if time.monotonic() - claim.call.since > claim.call.message.timeout:
                return found[0]
            await asyncio.sleep(_MOMENT)  # claims of nodes after this one by name give way, unless they have begun

    def withdraw(self, claim: Claim) -> None:
        """Give back all nodes, because the push does not begin."""
        if claim.nodes:
            self._given_back = time.monotonic()
        for node in claim.nodes:
            if (peer := self._peers.get(node)) is not None:
                peer.tell(msg.Release(push=claim.terms.push))

    async def _ask(self, claim: Claim) -> list[msg.Holder]:
        """Claim each node once. Returns what is in the way, from the nodes that answer.

        A connected node with engines of the model may take until it counts as lost. Other nodes are not waited for:
        the push finds out itself.
        """
        terms, known = claim.terms, self._timeouts.liveness
        concerned: list[asyncio.Task[msg.Attached | None]] = []
        others: list[asyncio.Task[msg.Attached | None]] = []
        for name, peer in self._peers.items():
            claim.nodes.add(name)
            look = asyncio.create_task(peer.refresh(terms), name=f"claim {name}")
            look.add_done_callback(functools.partial(self._answered, claim, name))
            expected = peer.info is not None and any(e.model == terms.model and not e.frozen for e in peer.engines)
            (concerned if expected else others).append(look)
        if looks := concerned + others:
            await asyncio.wait(looks, timeout=known / 5)
        if concerned:
            await asyncio.wait(concerned, timeout=known * 4 / 5)
        told = [look.result() for look in looks if look.done() and not look.cancelled() and look.exception() is None]
        return [answer.holder for answer in told if answer is not None and answer.holder is not None]

    @staticmethod
    def _answered(claim: Claim, node: str, look: asyncio.Task[msg.Attached | None]) -> None:
        if look.cancelled():
            return
        if (error := look.exception()) is not None:
            logger.error("a look at another node failed in an unexpected way", exc_info=error)
        elif (answer := look.result()) is not None and not answer.claimed:
            claim.nodes.discard(node)

    async def _as_its_leader_says(self, held: msg.Holder) -> msg.Holder:
        """Ask the leader of the push that holds this node whether the push has ended; only the leader knows."""
        peer = self._peers.get(held.node)
        answer = await peer.refresh() if peer is not None else None
        if answer is not None and answer.holder is not None and answer.holder.push == held.push:
            return answer.holder
        return msgspec.structs.replace(held, ending=True)


def is_refused(call: Call, holder: msg.Holder) -> bool:
    """Whether the call is refused because of `holder`, rather than waits: another trainer pushes the same model."""
    words = call.message
    another = holder.group not in ("", words.group)
    trainers = not (holder.repeat or words.engines)  # a trainer with new weights need not know of a repeat
    return holder.model == words.model and another and trainers and not holder.ending
