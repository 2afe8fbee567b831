"""The trainer ranks of a push: which have called, on this node or on another, and how each is reached."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from weightsync.processes import at_work
from weightsync.wire import messages as msg
from weightsync.wire.codec import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from weightsync.errors import ErrorRecord
    from weightsyncd.peers import Peer

__all__ = ["Rank", "Ranks", "is_lost"]

logger = logging.getLogger(__name__)

_BUSY = 3  # times `timeouts.liveness` that a rank may be silent while its process runs


def is_lost(silent: float, liveness: float, call: msg.Open) -> bool:
    """Return whether the rank of this node that made this call is lost after `silent` seconds without a message.

    A process that runs, and was not stopped, has longer: something may keep Python's other threads from running, such
    as a library that comes from a slow disk. If the process cannot be seen, silence alone decides.
    """
    if silent <= liveness:
        return False
    return silent > _BUSY * liveness or not at_work(call.pid, call.started)


@dataclass
class Rank:
    """A rank that has called."""

    identity: bytes  # of its connection; b"" on another node, whose daemon knows it
    call: msg.Open
    heard: float
    node: str

    @property
    def number(self) -> int:
        """The id of the rank's call. Each message from and to the rank carries it."""
        return self.call.id

    @property
    def layout(self) -> bytes:
        """The digest of its layout."""
        return self.call.layout


class Ranks:
    """See the module. `home` is this node."""

    def __init__(
        self,
        call: msg.Gather,
        world: int,
        home: str,
        send: Callable[[bytes, msg.Message], bool],
        peers: Mapping[str, Peer],
    ) -> None:
        """`call` asks other nodes for their ranks; `send` reaches a rank of this node by its identity."""
        self.world = world
        self._call = call
        self._home = home
        self._send = send
        self._peers = peers
        self._known: dict[int, Rank] = {}
        self._called: set[str] = set()  # nodes that `call` was sent to

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, rank: int) -> Rank:
        return self._known[rank]

    def get(self, rank: int) -> Rank | None:
        """Return a rank, if it has called."""
        return self._known.get(rank)

    @property
    def complete(self) -> bool:
        """Whether all ranks have called."""
        return len(self._known) >= self.world

    def add(self, rank: int, known: Rank) -> None:
        """Note that a rank has called."""
        self._known[rank] = known

    def rank_of(self, identity: bytes) -> int | None:
        """Note that the rank of this node with this identity is alive, and return its number; None if it has none."""
        for rank, known in self._known.items():
            if known.node == self._home and known.identity == identity:
                known.heard = time.monotonic()
                return rank
        return None

    def is_on(self, rank: int, node: str) -> bool:
        """Return whether the rank has called on that node."""
        known = self._known.get(rank)
        return known is not None and known.node == node

    def silent(self, liveness: float) -> list[int]:
        """Return the ranks of this node that are lost (`is_lost`), each only once. Other nodes watch their own."""
        now = time.monotonic()
        here = {rank: known for rank, known in self._known.items() if known.node == self._home}
        found = [rank for rank, known in here.items() if is_lost(now - known.heard, liveness, known.call)]
        for rank in found:
            self._known[rank].heard = float("inf")
        return found

    def nodes(self) -> list[str]:
        """Return the nodes with ranks: this node, and then the others by name."""
        return [self._home, *sorted({known.node for known in self._known.values()} - {self._home})]

    def slots_there(self, node: str) -> tuple[int, ...]:
        """Return another node's number of slots by bridge; empty while it is not connected."""
        peer = self._peers.get(node)
        return peer.info.slots if peer is not None and peer.info is not None else ()

    def tell(self, rank: int, message: msg.Message, to: Rank | None = None) -> None:
        """Send a message to a rank, or to `to`, another caller that takes itself for this rank."""
        known = to or self._known[rank]
        message = msgspec.structs.replace(message, id=known.number)
        if known.node == self._home:
            self._send(known.identity, message)
        elif (peer := self._peers.get(known.node)) is not None:
            peer.tell(msg.TellRank(push=self._call.push, rank=rank, body=encode(message)))

    # --- other nodes ----------------------------------------------------------------------------------------------

    def call_on_nodes(self) -> None:
        """Call on other nodes for ranks of this trainer; again on a node that was lost and is back."""
        if self.world == 1 or self.complete:
            return
        for node, peer in self._peers.items():
            if node not in self._called and peer.info is not None:
                peer.tell(self._call)
                self._called.add(node)

    def node_lost(self, node: str) -> None:
        """Note that a node has forgotten the call."""
        self._called.discard(node)

    def release(self, nodes: set[str], error: ErrorRecord | None) -> None:
        """Release these nodes and those with ranks. Unless all ranks have called, they are told the push's error."""
        over = msg.Release(push=self._call.push, error=None if self.complete else error)
        for node in (nodes | self._called | set(self.nodes())) - {self._home}:
            if (peer := self._peers.get(node)) is not None:
                peer.tell(over)
