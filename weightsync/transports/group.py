"""group: a slot of this bridge is sent, tensor by tensor, to the ranks of one engine that does not run our plugin.

Engines have a protocol of their own to take weights from a process group: they join the group that they are told of,
then receive broadcasts from rank 0 into tensors of the shapes that they are told. Here rank 0 is the bridge. There is a
group for each bridge and engine. An offer says how to join it; a ticket names the group that a bucket comes through.
The received bytes are not checked, since no engine can.

Source: `init_weights_update_group` and `update_weights_from_distributed` of SGLang 0.5.17 and 0.5.23; the `nccl`
backend of vLLM 0.26 and 0.32.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import msgspec
import numpy as np
from msgspec import Meta

from weightsync.errors import LocalProtocolError
from weightsync.ipc.descriptors import Natural, seal, unseal
from weightsync.transports.broadcast import BroadcastSender, Member

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightsync.ipc.arena import Arena
    from weightsync.ipc.cuda import DeviceSlots
    from weightsync.ipc.ledger import Ledger
    from weightsync.transports.exports import Checksum, Checksums
    from weightsync.transports.gloo import HostMember

__all__ = [
    "HELPERS",
    "ONE_SENDER",
    "DeviceGroupMember",
    "DeviceGroupSender",
    "GroupOffer",
    "GroupSender",
    "GroupTicket",
    "Helper",
    "HostGroupSender",
    "why_not",
]

Helper = Literal["torch", "vllm"]
"""The code that the engine's ranks join with: torch's process groups, or vLLM's communicators without torch."""

HELPERS: dict[str, Helper] = {"group": "torch", "group-vllm": "vllm"}
"""Transport of an engine that joins groups → the code that its ranks join with."""

ONE_SENDER = ("group-vllm",)
"""Transports of engines that can be in only one group at a time, and so take all buckets from one bridge."""

_CUMEM = "NCCL_CUMEM_ENABLE"
Text = Annotated[str, Meta(min_length=1, max_length=256)]


def why_not(helper: Helper, *, on_gpu: bool, environment: Mapping[str, str]) -> tuple[str, str] | None:
    """Return why an engine cannot join a group with a bridge whose slots lie `on_gpu`, and a remedy; None if it can.

    `environment` is the bridge's, and so weightsyncd's.
    """
    if helper == "vllm" and not on_gpu:
        return (
            "vllm joins groups over NCCL alone, and the node's slots lie in host memory",
            'arena.device = "cuda" on this node, or a weightsyncd on the engine\'s own',
        )
    if helper == "torch" and on_gpu and _CUMEM not in environment:
        return (
            f"members of a group have to be alike in {_CUMEM}, which SGLang sets to 0 in its workers where it was not "
            "started with another, and which weightsyncd was started without",
            f"start weightsyncd with {_CUMEM}=0, or with what the engine has, on every node: they compare it",
        )
    return None


class GroupOffer(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine joins: its rank n is rank n + 1 of the group."""

    name: Text
    host: Text
    port: Annotated[int, Meta(ge=1, le=65535)]
    world: Annotated[int, Meta(ge=2, le=4096)]
    backend: Text

    def pack(self) -> bytes:
        """Return the bytes of the offer."""
        return seal(b"J", self)

    @classmethod
    def unpack(cls, data: bytes) -> GroupOffer:
        """Return the offer in these bytes. Raises `CodecError`."""
        return unseal(data, b"J", cls)


class GroupTicket(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of a ticket."""

    group: Text
    sequence: Natural

    def pack(self) -> bytes:
        """Return the bytes of the ticket."""
        return seal(b"Q", self)

    @classmethod
    def unpack(cls, data: bytes) -> GroupTicket:
        """Return the ticket in these bytes. Raises `CodecError`."""
        return unseal(data, b"Q", cls)


class DeviceGroupMember(Member, Protocol):
    """Rank 0 of a group that moves GPU memory (`weightsync.nccl_bridge.nccl_group.NcclGroup`)."""

    def send(self, pieces: Sequence[tuple[int, int]], *, deadline: float) -> None:
        """Broadcast the bytes of each piece (address, length) to the other members, in order and one by one."""


class GroupSender(BroadcastSender):
    """Rank 0 of the group that `terms` describe. Its readers are the engine's ranks, pending until a slot is sent."""

    def __init__(
        self, communicator: Member, arena: Arena, terms: GroupOffer, *, ledger: Ledger, checksums: Checksums
    ) -> None:
        super().__init__(communicator, arena, checksums, ledger=ledger)
        self.terms = terms
        self._pieces: list[tuple[int, int]] = []

    def offer(self, reader: str) -> bytes:
        super().offer(reader)
        return self.terms.pack()

    def send_pieces(self, slot: int, pieces: bytes, *, deadline: float) -> None:
        """Send the tensors at `pieces` of the slot, in order. Otherwise as `send`; call it one at a time.

        `pieces` are little-endian i64 pairs: first byte, length.
        """
        pairs = np.frombuffer(pieces, dtype="<i8").reshape(-1, 2)
        if (pairs < 0).any() or (pairs.sum(axis=1) > self._arena.slot_bytes).any():
            raise LocalProtocolError(f"pieces do not lie in a slot of {self._arena.slot_bytes} bytes")
        self._pieces = [(first, length) for first, length in pairs.tolist()]
        self.send(slot, deadline=deadline)

    def revoke(self, slot: int, reader: str) -> None:
        """Stop waiting for `reader`, and end the group if the reader was pending.

        A rank that has not received all of a bucket would take the next one for the rest of it.
        """
        if reader in self.pending(slot):
            super().revoke(slot, reader)
            self._communicator.abort()

    def _broadcast(self, slot: int, nbytes: int, sequence: int, deadline: float) -> None:
        self._send(slot, self._pieces, deadline)

    @abstractmethod
    def _send(self, slot: int, pieces: Sequence[tuple[int, int]], deadline: float) -> None:
        """Broadcast these pieces of the slot, one by one."""

    def _ticket(self, sequence: int, nbytes: int, value: Checksum, reader: str) -> bytes:
        return GroupTicket(group=self.terms.name, sequence=sequence).pack()


class HostGroupSender(GroupSender):
    """A group over gloo, from slots in host memory."""

    def __init__(
        self, communicator: HostMember, arena: Arena, terms: GroupOffer, *, ledger: Ledger, checksums: Checksums
    ) -> None:
        super().__init__(communicator, arena, terms, ledger=ledger, checksums=checksums)
        self._gloo = communicator

    def _send(self, slot: int, pieces: Sequence[tuple[int, int]], deadline: float) -> None:
        memory = self._arena.slot(slot)
        for first, length in pieces:
            self._gloo.broadcast(memory[first : first + length], self._gloo.rank, deadline=deadline)


class DeviceGroupSender(GroupSender):
    """A group over NCCL, from slots on a GPU."""

    def __init__(
        self,
        communicator: DeviceGroupMember,
        arena: Arena,
        slots: DeviceSlots,
        terms: GroupOffer,
        *,
        ledger: Ledger,
        checksums: Checksums,
    ) -> None:
        super().__init__(communicator, arena, terms, ledger=ledger, checksums=checksums)
        self._nccl, self._slots = communicator, slots

    def _send(self, slot: int, pieces: Sequence[tuple[int, int]], deadline: float) -> None:
        start = self._slots.slot(slot)
        self._nccl.send([(start + first, length) for first, length in pieces], deadline=deadline)
