"""The exchange of a bucket that ranks of several nodes have written.

Each node's bridge begins with a part of the bucket, and ends with all of it.

In host memory the members of a communicator broadcast their parts in turn, in one order. A part that is one run of
bytes goes straight from slot to slot; other parts are gathered first. Behind each part travel the exchange's token and
the part's checksum, which receivers compare.

On GPUs all runs of all parts are launched together, straight from slot to slot. There the bucket's readers compare the
bytes with those that the trainer's ranks wrote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from weightsync.errors import LocalProtocolError, TransportBroken
from weightsync.ipc.descriptors import ALGORITHM, checksum
from weightsync.transports.nccl import Piece

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from weightsync.ipc.arena import Arena
    from weightsync.ipc.cuda import DeviceSlots
    from weightsync.plan.shares import MemberPart
    from weightsync.transports.broadcast import Member
    from weightsync.transports.gloo import HostMember
    from weightsync.transports.nccl import DeviceMember

__all__ = ["DeviceExchange", "Exchange", "HostExchange", "runs_of"]


def runs_of(part: MemberPart, room: int) -> list[tuple[int, int]]:
    """Return first byte and length of each run of a part.

    Raises `LocalProtocolError` unless the runs ascend, do not overlap, and lie within `room` bytes.
    """
    if len(part.runs) % 16 or not part.runs:
        raise LocalProtocolError(f"the part of rank {part.root} is no list of runs")
    runs = np.frombuffer(part.runs, dtype="<i8").reshape(-1, 2)
    begin, count = runs[:, 0], runs[:, 1]
    inside = (begin >= 0).all() and (count > 0).all() and (count <= room).all() and (begin <= room - count).all()
    if not inside or (begin[1:] < (begin + count)[:-1]).any():
        raise LocalProtocolError(f"the part of rank {part.root} does not lie in a slot of {room} bytes, run after run")
    return [(first, length) for first, length in runs.tolist()]


class Exchange(Protocol):
    """One member's side of exchanges. Like all operations of a communicator, they run one at a time."""

    def run(self, slot: int, token: int, parts: Sequence[MemberPart], *, deadline: float) -> None:
        """Return when this member has the bytes of all `parts` in `slot`. All members give the same parts.

        Raises `LocalProtocolError` before anything is sent; `TransportBroken` if a part differs from what its root
        sent, or belongs to another exchange; and the communicator's errors.
        """


class HostExchange:
    """Exchange between slots in host memory."""

    def __init__(self, communicator: HostMember, arena: Arena, check: Callable[[], object]) -> None:
        """`check` is called between blocks of a checksum, and raises to give up."""
        self._communicator = communicator
        self._arena = arena
        self._check = check
        self._staging: npt.NDArray[np.uint8] = np.empty(0, dtype=np.uint8)  # reused: parts are alike in size

    def run(self, slot: int, token: int, parts: Sequence[MemberPart], *, deadline: float) -> None:
        """As `Exchange.run`."""
        mine = self._communicator.rank
        all_runs = _all_runs(self._communicator, parts, self._arena.slot_bytes)
        whole = np.frombuffer(self._arena.slot(slot), dtype=np.uint8)
        for part, runs in zip(parts, all_runs, strict=True):
            payload = whole[runs[0][0] : sum(runs[0])] if len(runs) == 1 else self._staged(sum(n for _, n in runs))
            if part.root == mine and len(runs) > 1:
                at = 0
                for first, length in runs:
                    payload[at : at + length] = whole[first : first + length]
                    at += length
            self._send(payload, token, part.root, deadline)
            if part.root != mine and len(runs) > 1:
                at = 0
                for first, length in runs:
                    whole[first : first + length] = payload[at : at + length]
                    at += length

    def _send(self, payload: npt.NDArray[np.uint8], token: int, root: int, deadline: float) -> None:
        memory = payload.data
        seal = np.empty(2, dtype=np.uint64)
        if root == self._communicator.rank:
            seal[:] = token, checksum(memory, self._check)
        self._communicator.broadcast(memory, root, deadline=deadline)
        self._communicator.broadcast(seal.view(np.uint8).data, root, deadline=deadline)
        if root == self._communicator.rank:
            return
        if int(seal[0]) != token:
            raise TransportBroken(f"the part of rank {root} is of another exchange: members take them in other orders")
        sent, found = int(seal[1]), checksum(memory, self._check)
        if found != sent:
            what = f"the part of rank {root} differs from what it sent"
            raise TransportBroken(f"{what}: {ALGORITHM} is {found:016x}, not {sent:016x}")

    def _staged(self, nbytes: int) -> npt.NDArray[np.uint8]:
        if len(self._staging) < nbytes:
            self._staging = np.empty(nbytes, dtype=np.uint8)
        return self._staging[:nbytes]


class DeviceExchange:
    """Exchange between slots on GPUs."""

    def __init__(self, communicator: DeviceMember, slots: DeviceSlots, slot_bytes: int) -> None:
        self._communicator = communicator
        self._slots = slots
        self._slot_bytes = slot_bytes

    def run(self, slot: int, token: int, parts: Sequence[MemberPart], *, deadline: float) -> None:
        """As `Exchange.run`."""
        start = self._slots.slot(slot)
        all_runs = _all_runs(self._communicator, parts, self._slot_bytes)
        pieces = [
            Piece(part.root, start + first, length)
            for part, runs in zip(parts, all_runs, strict=True)
            for first, length in runs
        ]
        self._communicator.broadcast(pieces, token, deadline=deadline)


def _all_runs(communicator: Member, parts: Sequence[MemberPart], room: int) -> list[list[tuple[int, int]]]:
    world = communicator.world
    if strangers := [part.root for part in parts if part.root >= world]:
        raise LocalProtocolError(f"there is no rank {strangers[0]} in a communicator of {world}")
    return [runs_of(part, room) for part in parts]
