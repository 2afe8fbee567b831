"""This node's ranks in a push that another node coordinates.

The ranks' messages are forwarded to the coordinator, and its messages to the ranks. Ranks write into slots of their own
node.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from weightsync.errors import CodecError, PushAborted, PushRefused, TransportBroken
from weightsync.wire import messages as msg
from weightsync.wire.codec import decode_untrusted, encode
from weightsyncd.ranks import is_lost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightsync.errors import ErrorRecord, WeightSyncError
    from weightsyncd.bridges import Bridge
    from weightsyncd.waiting import Call

__all__ = ["Branch"]

logger = logging.getLogger(__name__)


@dataclass
class _Rank:
    call: Call
    heard: float
    taken: bool = False  # the coordinator has sent it something
    told: bool = False  # it knows the outcome
    stopped: bool = False  # it writes nothing more
    leases: dict[int, tuple[int, str | None]] = field(default_factory=dict)  # bucket → bridge and its incarnation

    @property
    def identity(self) -> bytes:
        return self.call.identity

    @property
    def number(self) -> int:
        """The id of the rank's call. Each message from and to the rank carries it."""
        return self.call.message.id


class Branch:
    """See the module. `send` reaches a rank by its identity, `forward` the coordinator."""

    def __init__(
        self,
        node: str,
        call: msg.Gather,
        bridges: Sequence[Bridge],
        *,
        send: Callable[[bytes, msg.Message], bool],
        forward: Callable[[msg.Message], bool],
    ) -> None:
        self._node = node
        self.call = call
        self.ranks: dict[int, _Rank] = {}
        self._bridges = bridges
        self._send = send
        self._forward = forward
        self._arenas: tuple[str | None, ...] = ()  # incarnations of the bridges when ranks got their offers
        self._at_rest = asyncio.Event()  # set once every rank has stopped

    def takes(self, identity: bytes, message: msg.Open) -> bool:
        """Return whether this call is for this push.

        A second call of a rank, with another number, is for the next push. The rank may have given up this one, or have
        heard its outcome before the others.
        """
        known = self.ranks.get(message.rank)
        return known is None or known.identity != identity or known.number == message.id

    # --- from the ranks -------------------------------------------------------------------------------------------

    def open(self, call: Call) -> None:
        """Take a rank's call of `push_weights`, and forward it."""
        identity, message = call.identity, call.message
        known = self.ranks.get(message.rank)
        if known is not None:
            if known.identity != identity:
                reason = f"rank {message.rank} of this trainer takes part in the push already"
                error = PushRefused(reason, model=message.model, version=message.version)
                self._send(identity, msg.Ended(id=message.id, error=error.record()))
            return
        self.ranks[message.rank] = _Rank(call, time.monotonic())
        self._say(message.rank, message)

    def heard(self, identity: bytes) -> int | None:
        """Note that the rank with this identity is alive, and return its number. None if it takes no part."""
        for number, rank in self.ranks.items():
            if rank.identity == identity:
                rank.heard = time.monotonic()
                return number
        return None

    def route(self, identity: bytes, message: msg.RankWords) -> bool:
        """Forward a rank's message to the coordinator. Returns False if it is not about this push."""
        number = self.heard(identity)
        if number is None or self.ranks[number].number != message.id:
            return False
        match message:
            case msg.Filled():
                self.ranks[number].leases.pop(message.bucket, None)
            case msg.Failed() | msg.Stopped():
                self.ranks[number].stopped = True
                if all(rank.stopped for rank in self.ranks.values()):
                    self._at_rest.set()
        self._say(number, message)
        return True

    def check_alive(self, liveness: float) -> None:
        """Report silent ranks to the coordinator as lost. Call it regularly."""
        now = time.monotonic()
        for number, rank in self.ranks.items():
            if is_lost(now - rank.heard, liveness, rank.call.message):
                rank.heard = float("inf")
                extra = {"rank": number, "push": self.call.push}
                words = (self.call.model, self.call.version, number)
                logger.warning("[model=%s v=%d] rank %d has not been heard", *words, extra=extra)
                self._forward(
                    msg.RankSays(push=self.call.push, rank=number, lost=f"it has not been heard for {liveness:g} s")
                )

    def _say(self, rank: int, message: msg.Message) -> None:
        self._forward(msg.RankSays(push=self.call.push, rank=rank, body=encode(message)))

    # --- to the ranks -----------------------------------------------------------------------------------------------

    def tell(self, message: msg.TellRank) -> None:
        """Pass the coordinator's message on to a rank. Raises `CodecError` if it is not one for ranks."""
        rank = self.ranks.get(message.rank)
        if rank is None:
            return
        words = decode_untrusted(message.body)
        rank.taken = True
        match words:
            case msg.AskDescription():
                pass
            case msg.Planned():
                offers = [bridge.offer for bridge in self._bridges if bridge.offer is not None]
                if len(offers) < len(self._bridges):
                    error = TransportBroken(
                        f"a bridge of the node of rank {message.rank} is being restarted", rank=message.rank
                    )
                    self._say(message.rank, msg.Failed(id=rank.number, error=error.record()))
                    return
                self._arenas = tuple(bridge.incarnation for bridge in self._bridges)
                words = msgspec.structs.replace(words, offers=tuple(offers))
            case msg.Lease():
                if words.bridge >= len(self._arenas):
                    raise CodecError(f"a lease on bridge {words.bridge} of {len(self._arenas)} that ranks know")
                rank.leases[words.bucket] = (words.bridge, self._arenas[words.bridge])
            case msg.Ended():
                rank.told = True
            case _:
                raise CodecError(f"a rank is not told {type(words).__name__}")
        self._send(rank.identity, msgspec.structs.replace(words, id=rank.number))

    # --- bridges ------------------------------------------------------------------------------------------------------

    def check_arena(self, index: int) -> None:
        """Raise `TransportBroken` if the bridge was replaced since ranks were offered its arena."""
        if self._arenas and self._bridges[index].incarnation != self._arenas[index]:
            raise TransportBroken(f"bridge {self._bridges[index].name} was replaced after ranks had written into it")

    def bridge_lost(self, error: WeightSyncError) -> None:
        """Report the ranks as failed: the bytes they wrote are lost, and the coordinator must not count them in."""
        for number, rank in self.ranks.items():
            if self._arenas and not rank.told and not rank.stopped:
                self._say(number, msg.Failed(id=rank.number, error=error.record()))

    # --- its end ------------------------------------------------------------------------------------------------------

    async def end(self, why: str | None, error: ErrorRecord | None, *, grace: float) -> list[Call]:
        """End the push on this node. `why` is the reason unless its coordinator released it.

        Ranks that do not know the outcome are told `error`, or else `why`. All have `grace` seconds to stop writing.
        Then arenas that they may still write into are replaced. The coordinator is told, if it still lives. Without
        `why` and `error`, returns the calls of ranks that the coordinator never addressed: they came too late for this
        push, and are for the next.
        """
        late = []
        if why is None and error is None:
            late = [number for number, rank in self.ranks.items() if not (rank.taken or rank.told)]
        calls = [self.ranks.pop(number).call for number in late]
        why = f"node {self._node} let go of the push: {why or 'its coordinator was done with it'}"
        untold = {number: rank for number, rank in self.ranks.items() if not rank.told}
        for number, rank in untold.items():
            rank.told = True
            self._send(rank.identity, msg.Ended(id=rank.number, error=error or self._abort(number, why)))
        if self._written_into():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await self._at_rest.wait()
        for index in self._written_into():
            self._bridges[index].retire("a rank of a push that has ended may still write into it")
        for number, rank in untold.items():
            self._say(number, msg.Failed(id=rank.number, error=self._abort(number, why)))
        return calls

    def _abort(self, rank: int, why: str) -> ErrorRecord:
        return PushAborted(why, model=self.call.model, version=self.call.version, rank=rank).record()

    def _written_into(self) -> list[int]:
        """Return the bridges, by index, with arenas that ranks may still write into."""
        leases = {lease for rank in self.ranks.values() if not rank.stopped for lease in rank.leases.values()}
        return sorted(index for index, arena in leases if self._bridges[index].incarnation == arena)
