"""This node's ranks in a push that another node coordinates: what they say goes there, and what they are told comes
from there. The slots they write into are this node's own.
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
    taken: bool = False  # the coordinator has spoken to it
    told: bool = False  # the outcome
    stopped: bool = False  # it writes nothing more
    leases: dict[int, tuple[int, str | None]] = field(default_factory=dict)  # bucket it may be writing → bridge, arena

    @property
    def identity(self) -> bytes:
        return self.call.identity

    @property
    def number(self) -> int:
        """The rank's own of this push; each message of and to it carries it."""
        return self.call.message.id


class Branch:
    """See the module. `send` reaches a rank by its identity, `forward` the node that coordinates."""

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
        self._arenas: tuple[str | None, ...] = ()  # incarnations of the bridges that ranks were offered
        self._at_rest = asyncio.Event()  # no rank may write

    def takes(self, identity: bytes, message: msg.Open) -> bool:
        """Whether this call is for this push. One of a rank that has called for it, by another number, is for the next;
        it may have given this one up, or have been told its outcome before the others.
        """
        known = self.ranks.get(message.rank)
        return known is None or known.identity != identity or known.number == message.id

    # --- from the ranks -------------------------------------------------------------------------------------------

    def open(self, call: Call) -> None:
        """A rank has called `push_weights`."""
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
        """Which rank shows by this that it is alive, if one does."""
        for number, rank in self.ranks.items():
            if rank.identity == identity:
                rank.heard = time.monotonic()
                return number
        return None

    def route(self, identity: bytes, message: msg.RankWords) -> bool:
        """Pass on what a rank says of this push. False where it is of another."""
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
        """Tell of ranks that have fallen silent. To be called now and then."""
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
        """Give a rank what the coordinator has for it. Raises `CodecError` for what no rank is told."""
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
        """Raise `TransportBroken` where the bridge is not the one whose arena the ranks were offered."""
        if self._arenas and self._bridges[index].incarnation != self._arenas[index]:
            raise TransportBroken(f"bridge {self._bridges[index].name} was replaced after ranks had written into it")

    def bridge_lost(self, error: WeightSyncError) -> None:
        """With its arena goes what ranks have written: the coordinator has to know before it takes that for sent."""
        for number, rank in self.ranks.items():
            if self._arenas and not rank.told and not rank.stopped:
                self._say(number, msg.Failed(id=rank.number, error=error.record()))

    # --- its end ------------------------------------------------------------------------------------------------------

    async def end(self, why: str | None, error: ErrorRecord | None, *, grace: float) -> list[Call]:
        """The push is over here: its coordinator is done with it, or nobody waits for that one, for the reason `why`.

        Ranks that were not told its outcome hear `error`, or else `why`, and have `grace` seconds to stop writing; the
        arenas of those that do not are replaced. The coordinator, should it still live, hears of it. Returns the calls
        of ranks that it has not spoken to, if it had all that it needed: they came too late for this push, and are for
        the next.
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
        """Bridges into whose arenas ranks may still write."""
        leases = {lease for rank in self.ranks.values() if not rank.stopped for lease in rank.leases.values()}
        return sorted(index for index, arena in leases if self._bridges[index].incarnation == arena)
