"""Process groups of this bridge with engines that do not run our plugin, one group for each engine.

A group is offered before it exists: when the engine is told of it and joins, the bridge joins as rank 0. A group that
broke, or whose engine restarted or failed, is dropped for a new one under another name.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsync.errors import ConfigError, TransportBroken, TransportClosed, TransportError, TransportTimeout
from weightsync.nccl_bridge.gloo import GlooCommunicator
from weightsync.nccl_bridge.meetings import TorchMeeting, VllmMeeting
from weightsync.nccl_bridge.nccl_group import NcclGroup
from weightsync.nccl_bridge.rendezvous import Rendezvous
from weightsync.transports.base import seconds_left
from weightsync.transports.group import (
    DeviceGroupSender,
    GroupOffer,
    GroupSender,
    GroupTicket,
    HostGroupSender,
    why_not,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from weightsync.ipc.arena import Arena
    from weightsync.ipc.cuda import DeviceSlots
    from weightsync.ipc.ledger import Ledger
    from weightsync.nccl_bridge import commands as c
    from weightsync.transports.exports import Checksums

__all__ = ["Groups"]

logger = logging.getLogger(__name__)

_JOINING = 20.0  # seconds for an engine to join over gloo; other communicators of this process wait meanwhile
_LEAVING = 1.0  # seconds that the last broadcast of an old group has to end by itself
_OVER = "over"  # a group name that no group has


@dataclass
class _Group:
    incarnation: str  # of the engine
    rendezvous: Rendezvous  # the engine stays connected to it
    communicator: GlooCommunicator | NcclGroup
    sender: GroupSender
    meet: Callable[[float], None]  # joins as rank 0, by a deadline
    joined: bool = False

    def stands(self, incarnation: str, world: int) -> bool:
        """Whether the group is with this incarnation of the engine, has `world` ranks, and is usable."""
        same = (self.incarnation, self.sender.terms.world) == (incarnation, world)
        return same and not self.communicator.unusable


class Groups:
    """One bridge's groups: over NCCL if its slots lie on a GPU, else over gloo."""

    def __init__(
        self,
        bridge: str,
        arena: Arena,
        slots: DeviceSlots | None = None,
        *,
        ledger: Ledger,
        checksums: Checksums,
        one_by_one: threading.Lock,
    ) -> None:
        """`one_by_one` is shared with the other communicators of this process."""
        self._one_by_one = one_by_one
        self._bridge = bridge
        self._arena = arena
        self._slots = slots
        self._books: Any = {"ledger": ledger, "checksums": checksums}
        self._groups: dict[str, _Group] = {}
        self._lock = threading.Lock()
        self._taking = threading.Lock()

    def offer(self, command: c.OfferGroup, *, deadline: float) -> bytes:
        """Return what the engine needs to join its group. A group that is still usable is offered again.

        Raises `TransportError`, or `ConfigError` if the engine could not join such a group.
        """
        self._check(command)
        with self._alone(deadline):
            known = self._groups.get(command.engine)
            world = len(command.readers) + 1
            if known is None or not known.stands(command.incarnation, world):
                self._leave(command.engine)
                known = self._groups[command.engine] = self._new(command, world, deadline)
            return known.sender.terms.pack()

    def join(self, engine: str, *, deadline: float) -> None:
        """Join the group that was offered to `engine`, unless joined already. Raises `TransportError`."""
        group = self._groups.get(engine)
        if group is None:
            raise self._over(engine)
        if group.joined:
            return
        try:
            group.meet(deadline)
        except TransportError as error:
            logger.warning("[engine=%s group=%s] join.failed %s", engine, group.sender.terms.name, error)
            self._end(engine, group)
            raise
        group.joined = True
        logger.info("[engine=%s group=%s] join.complete", engine, group.sender.terms.name)

    def leave(self, engine: str) -> None:
        """End the group of an engine that is gone or may be in the middle of an operation. Returns at once."""
        group = self._groups.get(engine)
        if group is not None:
            group.communicator.abort()
            threading.Thread(target=self._end, args=(engine, group), name=f"leave {engine}", daemon=True).start()

    def export(self, engine: str, slot: int, nbytes: int, sequence: int, reader: str) -> dict[str, bytes]:
        """Return the ticket of one reader.

        If its group is over, the ticket names no group, so that `send` fails and not the export: only the engine that
        caused the failure must bear it.
        """
        group = self._groups.get(engine)
        if group is not None and not group.sender.closed:
            with suppress(TransportClosed):  # closed since the check
                return group.sender.export(slot, nbytes, sequence, [reader])
        return {reader: GroupTicket(group=_OVER, sequence=sequence).pack()}

    def pending(self, slot: int) -> tuple[str, ...]:
        """Return readers that may still read from `slot`. A group that is being left has none."""
        found: list[str] = []
        for group in list(self._groups.values()):
            with suppress(TransportClosed):
                found += group.sender.pending(slot)
        return tuple(found)

    def revoke(self, slot: int, reader: str) -> None:
        """Stop waiting for a reader that is lost, which ends its group."""
        group = self._groups.get(reader.rpartition("/")[0])
        if group is not None:
            with suppress(TransportClosed):
                group.sender.revoke(slot, reader)

    def send(self, command: c.SendGroup, *, deadline: float) -> None:
        """Send a bucket to an engine, which will be told to take it. Raises `TransportError`."""
        group = self._groups.get(command.engine)
        if group is None or group.sender.terms.name != command.group:
            raise self._over(command.engine)
        try:
            group.sender.send_pieces(command.slot, command.pieces, deadline=deadline)
        except TransportError:  # the engine's ranks must not wait for tensors that will not come
            self._end(command.engine, group)
            raise

    def _check(self, command: c.OfferGroup) -> None:
        found = why_not(command.helper, on_gpu=self._slots is not None, environment=os.environ)
        if found is not None:
            problem, hint = found
            raise ConfigError(f"engine {command.engine} cannot join bridge {self._bridge}: {problem}", hint=hint)

    def _over(self, engine: str) -> TransportBroken:
        return TransportBroken(f"the group of bridge {self._bridge} with engine {engine} is over")

    def _end(self, engine: str, group: _Group) -> None:
        """Leave this group, unless it was left already."""
        if self._taken_out(engine, group) is not None:
            self._close(engine, group)

    def _taken_out(self, engine: str, only: _Group | None = None) -> _Group | None:
        """Take the engine's group out of the list, so that one thread alone closes it; `only` this one, if given."""
        with self._taking:
            group = self._groups.get(engine)
            if group is None or (only is not None and group is not only):
                return None
            return self._groups.pop(engine)

    @contextmanager
    def _alone(self, deadline: float) -> Iterator[None]:
        """Hold the lock under which groups are made and left."""
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
        backend = "gloo" if self._slots is None else "nccl"
        terms = GroupOffer(name=name, host=command.host, port=rendezvous.port, world=world, backend=backend)
        make = self._over_gloo if self._slots is None else self._over_nccl
        group = make(command, terms, rendezvous)
        for reader in command.readers:
            group.sender.offer(reader)
        return group

    def _over_gloo(self, command: c.OfferGroup, terms: GroupOffer, rendezvous: Rendezvous) -> _Group:
        gloo = GlooCommunicator(
            generation=0, rank=0, world=terms.world, address=terms.host, one_by_one=self._one_by_one
        )

        def meet(deadline: float) -> None:
            until = min(deadline, time.monotonic() + _JOINING)
            gloo.join(TorchMeeting(rendezvous, terms.name, device="cpu"), terms.name, deadline=until)

        sender = HostGroupSender(gloo, self._arena, terms, **self._books)
        return _Group(command.incarnation, rendezvous, gloo, sender, meet)

    def _over_nccl(self, command: c.OfferGroup, terms: GroupOffer, rendezvous: Rendezvous) -> _Group:
        assert self._slots is not None, "NCCL moves GPU memory"
        vllm = command.helper == "vllm"
        place = VllmMeeting(rendezvous) if vllm else TorchMeeting(rendezvous, terms.name, device="cuda")
        group = NcclGroup(world=terms.world, address=terms.host, greets=vllm)
        sender = DeviceGroupSender(group, self._arena, self._slots, terms, **self._books)
        return _Group(
            command.incarnation, rendezvous, group, sender, lambda deadline: group.meet(place.tell, deadline=deadline)
        )

    def _leave(self, engine: str) -> None:
        group = self._taken_out(engine)
        if group is not None:
            self._close(engine, group)

    @staticmethod
    def _close(engine: str, group: _Group) -> None:
        group.sender.close()
        group.communicator.abort()
        try:
            group.communicator.close(deadline=time.monotonic() + _LEAVING)
        except TransportTimeout as error:  # only the end of this process would help
            logger.error("[engine=%s group=%s] leave.failed %s", engine, group.sender.terms.name, error)  # noqa: TRY400
