"""Process groups of this bridge with engines that have none of ours, one for each engine: made, used, made anew.

A group is offered before it is there; when the engine is told of it and joins, a thread joins as rank 0. One that has
broken, or whose engine has restarted, is left behind for another under another name.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsync.errors import ConfigError, TransportBroken, TransportClosed, TransportError, TransportTimeout
from weightsync.nccl_bridge.gloo import GlooCommunicator
from weightsync.nccl_bridge.rendezvous import Rendezvous, prefixed
from weightsync.transports.base import seconds_left
from weightsync.transports.group import GroupOffer, GroupSender, GroupTicket

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightsync.ipc.arena import Arena
    from weightsync.ipc.ledger import Ledger
    from weightsync.nccl_bridge import commands as c
    from weightsync.transports.exports import Checksums

__all__ = ["Groups"]

logger = logging.getLogger(__name__)

_JOINING = 20.0  # seconds for an engine that was told to join; other communicators wait for it
_LEAVING = 1.0  # seconds that the last broadcast of an old group has to end by itself
_BACKEND = "gloo"
_OVER = "over"  # name of a group that there is none of


class _EngineStore:
    """A rendezvous where torch's helper for process groups looks for its keys: under the group's name, once for
    whoever wrote the engine's function and once for torch's, and under the device that comes first for the backend.
    """

    def __init__(self, rendezvous: Rendezvous, name: str) -> None:
        self.sockets = rendezvous.sockets
        self._rendezvous = rendezvous
        self._name = name

    def store(self, key: str, generation: int) -> Any:
        """See `Rendezvous.store`; the name alone is the secret, and says which."""
        return prefixed(self._rendezvous.raw, self._name, f"{self._name}/", "cpu/")


@dataclass
class _Group:
    incarnation: str  # of the engine
    rendezvous: Rendezvous  # the engine stays connected to it
    communicator: GlooCommunicator
    sender: GroupSender
    joining: bool = False  # or joined

    def stands(self, incarnation: str, world: int) -> bool:
        """Whether it is one with this incarnation of the engine, and may be used."""
        same = (self.incarnation, self.sender.terms.world) == (incarnation, world)
        return same and not self.communicator.unusable


class Groups:
    """Those of one bridge, whose slots lie in host memory."""

    def __init__(
        self, bridge: str, arena: Arena, *, ledger: Ledger, checksums: Checksums, one_by_one: threading.Lock
    ) -> None:
        """`one_by_one` is shared with the other communicators of this process."""
        self._one_by_one = one_by_one
        self._bridge = bridge
        self._arena = arena
        self._ledger = ledger
        self._checksums = checksums
        self._groups: dict[str, _Group] = {}
        self._lock = threading.Lock()

    def offer(self, command: c.OfferGroup, *, deadline: float) -> bytes:
        """How the engine joins its group; one that stands is offered again as it is. Raises `TransportError`."""
        if self._arena.memory is not None:
            raise ConfigError(
                f'engine {command.engine}: path = "group" sends from host memory so far, and the slots of bridge '
                f"{self._bridge} lie on a GPU",
                hint='arena.device = "cpu" on this node, or a weightsyncd on the engine\'s own',
            )
        with self._alone(deadline):
            known = self._groups.get(command.engine)
            world = len(command.readers) + 1
            if known is None or not known.stands(command.incarnation, world):
                self._leave(command.engine)
                known = self._groups[command.engine] = self._new(command, world, deadline)
            if command.join and not known.joining:
                known.joining = True
                self._join(command.engine, known, deadline)
            return known.sender.terms.pack()

    def export(self, engine: str, slot: int, nbytes: int, sequence: int, reader: str) -> dict[str, bytes]:
        """The ticket of one reader. Where its group is over that is a ticket for it all the same, which fails when the
        bucket is sent: what an engine has brought about is told of that engine, and not of this bridge.
        """
        group = self._groups.get(engine)
        if group is not None and not group.sender.closed:
            with suppress(TransportClosed):  # by now
                return group.sender.export(slot, nbytes, sequence, [reader])
        return {reader: GroupTicket(group=_OVER, sequence=sequence).pack()}

    def pending(self, slot: int) -> tuple[str, ...]:
        """Readers that may still read from `slot`: none of a group that is being left."""
        found: list[str] = []
        for group in list(self._groups.values()):
            with suppress(TransportClosed):
                found += group.sender.pending(slot)
        return tuple(found)

    def revoke(self, slot: int, reader: str) -> None:
        """Take the hold of a reader away, and its group with it."""
        group = self._groups.get(reader.rpartition("/")[0])
        if group is not None:
            with suppress(TransportClosed):
                group.sender.revoke(slot, reader)

    def send(self, command: c.SendGroup, *, deadline: float) -> None:
        """Send a bucket to an engine, which is about to be told to take it. Raises `TransportError`."""
        group = self._groups.get(command.engine)
        if group is None or group.sender.terms.name != command.group:
            raise TransportBroken(f"the group of bridge {self._bridge} with engine {command.engine} is over")
        try:
            group.sender.send_pieces(command.slot, command.pieces, deadline=deadline)
        except TransportError:  # the engine's ranks must not wait for what comes no more
            with self._alone(time.monotonic() + _LEAVING):
                if self._groups.get(command.engine) is group:
                    self._leave(command.engine)
            raise

    @contextmanager
    def _alone(self, deadline: float) -> Iterator[None]:
        """While groups are made and left."""
        what = f"bridge {self._bridge} makes or leaves another group"
        if not self._lock.acquire(timeout=seconds_left(deadline, what)):
            raise TransportTimeout(f"{what}, and did so until the deadline")
        try:
            yield
        finally:
            self._lock.release()

    def _new(self, command: c.OfferGroup, world: int, deadline: float) -> _Group:
        rendezvous = Rendezvous.host(command.host, deadline=deadline)
        name = f"weightsync-{secrets.token_hex(8)}"
        terms = GroupOffer(name=name, host=command.host, port=rendezvous.port, world=world, backend=_BACKEND)
        communicator = GlooCommunicator(
            generation=0, rank=0, world=world, address=command.host, one_by_one=self._one_by_one
        )
        sender = GroupSender(communicator, self._arena, terms, ledger=self._ledger, checksums=self._checksums)
        for reader in command.readers:
            sender.offer(reader)
        return _Group(command.incarnation, rendezvous, communicator, sender)

    def _join(self, engine: str, group: _Group, deadline: float) -> None:
        name, until = group.sender.terms.name, min(deadline, time.monotonic() + _JOINING)

        def join() -> None:
            try:
                group.communicator.join(_EngineStore(group.rendezvous, name), name, deadline=until)
            except TransportError as error:  # the engine's own answer says why; this one is for the log
                logger.warning("[engine=%s group=%s] join.failed %s", engine, name, error.message)
            else:
                logger.info("[engine=%s group=%s] join.complete", engine, name)

        threading.Thread(target=join, name=f"join {engine}", daemon=True).start()

    def _leave(self, engine: str) -> None:
        group = self._groups.pop(engine, None)
        if group is not None:
            group.sender.close()
            group.communicator.abort()
            group.communicator.close(deadline=time.monotonic() + _LEAVING)
