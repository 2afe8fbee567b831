"""This node's ranks in a push that another node coordinates: what they say goes there, and what they are told comes
from there. The slots they write into are this node's own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from weightsync.errors import CodecError, PushAborted, PushRefused, TransportBroken
from weightsync.wire import messages as msg
from weightsync.wire.codec import decode_untrusted, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightsync.errors import ErrorRecord
    from weightsyncd.bridges import Bridge

__all__ = ["Branch"]

logger = logging.getLogger(__name__)


@dataclass
class _Rank:
    identity: bytes
    number: int  # the rank's own number of this push; each message of and to it carries it
    heard: float
    told: bool = False  # the outcome
    leases: dict[int, int] = field(default_factory=dict)  # bucket that it may be writing → bridge


class Branch:
    """See the module. `send` reaches a rank by its identity, `forward` the node that coordinates."""

    def __init__(
        self,
        call: msg.Gather,
        bridges: Sequence[Bridge],
        *,
        send: Callable[[bytes, msg.Message], bool],
        forward: Callable[[msg.Message], bool],
    ) -> None:
        self.call = call
        self.ranks: dict[int, _Rank] = {}
        self._bridges = bridges
        self._send = send
        self._forward = forward
        self._at_rest = asyncio.Event()  # no rank may write
        self._at_rest.set()

    @property
    def ended(self) -> bool:
        """Its ranks have been told the outcome: one that calls now wants another push."""
        return bool(self.ranks) and all(rank.told for rank in self.ranks.values())

    # --- from the ranks -------------------------------------------------------------------------------------------

    def open(self, identity: bytes, message: msg.Open) -> None:
        """A rank has called `push_weights`."""
        known = self.ranks.get(message.rank)
        if known is not None:
            if known.identity != identity:
                reason = f"rank {message.rank} of this trainer takes part in the push already"
                error = PushRefused(reason, model=message.model, version=message.version)
                self._send(identity, msg.Ended(id=message.id, error=error.record()))
            return
        self.ranks[message.rank] = _Rank(identity, message.id, time.monotonic())
        self._say(message.rank, message)

    def heard(self, identity: bytes) -> int | None:
        """Which rank shows by this that it is alive, if one does."""
        for number, rank in self.ranks.items():
            if rank.identity == identity:
                rank.heard = time.monotonic()
                return number
        return None

    def route(self, identity: bytes, message: msg.Describe | msg.Filled | msg.Failed | msg.Stopped) -> bool:
        """Pass on what a rank says of this push. False where it is of another."""
        number = self.heard(identity)
        if number is None or self.ranks[number].number != message.id:
            return False
        match message:
            case msg.Filled():
                self.ranks[number].leases.pop(message.bucket, None)
            case msg.Failed() | msg.Stopped():
                self._rests(number)
        self._say(number, message)
        return True

    def check_alive(self, liveness: float) -> None:
        """Tell of ranks that have fallen silent. To be called now and then."""
        now = time.monotonic()
        for number, rank in self.ranks.items():
            if now - rank.heard > liveness:
                rank.heard = float("inf")
                logger.warning("[push=%s] rank %d has not been heard", self.call.push, number)
                self._forward(
                    msg.RankSays(push=self.call.push, rank=number, lost=f"it has not been heard for {liveness:g} s")
                )

    def _say(self, rank: int, message: msg.Message) -> None:
        self._forward(msg.RankSays(push=self.call.push, rank=rank, body=encode(message)))

    # --- to the ranks -----------------------------------------------------------------------------------------------

    def tell(self, message: msg.TellRank) -> None:
        """Give a rank what the coordinator has for it. Raises `CodecError` for what no rank is told."""
        rank = self.ranks.get(message.rank)
        if rank is None:
            return
        words = decode_untrusted(message.body)
        match words:
            case msg.AskDescription():
                pass
            case msg.Planned():
                offers = [bridge.offer for bridge in self._bridges if bridge.offer is not None]
                if len(offers) < len(self._bridges):
                    error = TransportBroken("a bridge of its node is being restarted", rank=message.rank)
                    self._say(message.rank, msg.Failed(id=rank.number, error=error.record()))
                    return
                words = msgspec.structs.replace(words, offers=tuple(offers))
            case msg.Lease():
                rank.leases[words.bucket] = words.bridge
                self._at_rest.clear()
            case msg.Ended():
                rank.told = True
            case _:
                raise CodecError(f"a rank is not told {type(words).__name__}")
        self._send(rank.identity, msgspec.structs.replace(words, id=rank.number))

    # --- its end ------------------------------------------------------------------------------------------------------

    async def end(self, why: str, *, grace: float) -> None:
        """The push is over here. Ranks that were not told its outcome hear `why`, and have `grace` seconds to stop
        writing; the arenas of those that do not are replaced. The coordinator, should it still live, hears of it.
        """
        untold = {number: rank for number, rank in self.ranks.items() if not rank.told}
        for number, rank in untold.items():
            rank.told = True
            self._send(rank.identity, msg.Ended(id=rank.number, error=self._abort(number, why)))
        if any(rank.leases for rank in self.ranks.values()):
            try:
                async with asyncio.timeout(grace):
                    await self._at_rest.wait()
            except TimeoutError:
                for index in sorted({bridge for rank in self.ranks.values() for bridge in rank.leases.values()}):
                    self._bridges[index].retire("a rank of a push that has ended may still write into it")
        for number, rank in untold.items():
            self._say(number, msg.Failed(id=rank.number, error=self._abort(number, why)))

    def _abort(self, rank: int, why: str) -> ErrorRecord:
        return PushAborted(why, model=self.call.model, version=self.call.version, rank=rank).record()

    def _rests(self, number: int) -> None:
        self.ranks[number].leases.clear()
        if not any(rank.leases for rank in self.ranks.values()):
            self._at_rest.set()
