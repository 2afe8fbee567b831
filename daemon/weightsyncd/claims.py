"""Claims: before a push begins, the nodes that it is for are held for it, or say what is in its way.

Trainers on several nodes may call at the same time. A push that found half of its nodes taken would bring its version
to the other half alone, and two that each held what the other needs would wait for ever. So a call that is to lead a
push asks all nodes at once, in the look at them that there is anyway. Whoever is not given all of them gives back the
rest, and waits without holding anything. Of claims that meet, the one from the first node by name goes on.
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

_MOMENT = 0.05  # seconds; others that have claimed a node begin within that, or give it back


@dataclass(eq=False)
class Claim:
    """That of one call."""

    call: Call
    terms: msg.Claim
    nodes: set[str] = field(default_factory=set)  # that are held for it, or may be
    granted: bool = False  # its push may begin


class Claims:
    """Those of one node, one at a time. `following` is the push elsewhere that holds this node."""

    def __init__(
        self, config: NodeConfig, peers: Mapping[str, Peer], following: Callable[[], msg.Holder | None]
    ) -> None:
        self._home = config.node.name
        self._timeouts = config.timeouts
        self._peers = peers
        self._following = following

    def new(self, call: Call) -> Claim:
        """Nobody has heard of it yet."""
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
        """Returns what is in its way; None: all nodes that answer are held for it."""
        while True:
            if (held := self._following()) is not None:
                return await self._as_its_leader_says(held)
            found = await self._ask(claim)
            if (held := self._following()) is not None:  # it has given way meanwhile
                found.append(await self._as_its_leader_says(held))
            certain = [holder for holder in found if not holder.pending or holder.node < self._home]
            if certain:
                return min(certain, key=lambda holder: not is_refused(claim.call, holder))
            if not found:
                return None
            if time.monotonic() - claim.call.since > claim.call.message.timeout:
                return found[0]
            await asyncio.sleep(_MOMENT)  # those that come after this node give way, or have begun

    def withdraw(self, claim: Claim) -> None:
        """Its push does not begin."""
        for node in claim.nodes:
            if (peer := self._peers.get(node)) is not None:
                peer.tell(msg.Release(push=claim.terms.push))

    async def _ask(self, claim: Claim) -> list[msg.Holder]:
        """What stands in its way at any node. One that has engines for it and was heard lately has until it is lost to
        say so; of others that do not answer soon, the push finds out itself.
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
        """The push that holds this node may have ended: its leader alone knows, and is asked where it is a peer."""
        peer = self._peers.get(held.node)
        answer = await peer.refresh() if peer is not None else None
        if answer is not None and answer.holder is not None and answer.holder.push == held.push:
            return answer.holder
        return msgspec.structs.replace(held, ending=True)


def is_refused(call: Call, holder: msg.Holder) -> bool:
    """Whether what holds a node is no reason to wait: another trainer pushes the same model."""
    words = call.message
    another = holder.group not in ("", words.group)
    trainers = not (holder.repeat or words.engines)  # who has new weights need not know of a repeat
    return holder.model == words.model and another and trainers and not holder.ending
