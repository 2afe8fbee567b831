"""A bucket that ranks of several nodes have written: each node's bridge has a part of it, and afterwards all of it.

The members of a communicator broadcast their parts in turn, in one order. A part that is one run of bytes goes straight
from slot to slot; others are gathered first. What says that it arrived travels behind it: which exchange it is of, and
its checksum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from weightsync.errors import LocalProtocolError, TransportBroken
from weightsync.ipc.descriptors import ALGORITHM, checksum

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from weightsync.plan.shares import MemberPart
    from weightsync.transports.gloo import Communicator

__all__ = ["Exchange", "runs_of"]


def runs_of(part: MemberPart, room: int) -> list[tuple[int, int]]:
    """First byte and length of each run. Raises `LocalProtocolError` where they do not lie in `room` bytes, ascending
    and apart.
    """
    if len(part.runs) % 16 or not part.runs:
        raise LocalProtocolError(f"the part of rank {part.root} is no list of runs")
    runs = np.frombuffer(part.runs, dtype="<i8").reshape(-1, 2)
    begin, count = runs[:, 0], runs[:, 1]
    inside = (begin >= 0).all() and (count > 0).all() and (count <= room).all() and (begin <= room - count).all()
    if not inside or (begin[1:] < (begin + count)[:-1]).any():
        raise LocalProtocolError(f"the part of rank {part.root} does not lie in a slot of {room} bytes, run after run")
    return [(first, length) for first, length in runs.tolist()]


class Exchange:
    """This member's side of it. One at a time, as with any operation of a communicator."""

    def __init__(self, communicator: Communicator, check: Callable[[], object]) -> None:
        """`check` raises when there is no point in going on; it is called between blocks of a checksum."""
        self._communicator = communicator
        self._check = check
        self._staging: npt.NDArray[np.uint8] = np.empty(0, dtype=np.uint8)  # kept: parts are alike in size

    def run(self, slot: memoryview, token: int, parts: Sequence[MemberPart], *, deadline: float) -> None:
        """Every member has the bytes of all `parts` in `slot` when its call returns; all give the same parts.

        Raises `LocalProtocolError` before anything is sent; `TransportBroken` where a part differs from what its root
        sent; what the communicator raises.
        """
        mine, world = self._communicator.rank, self._communicator.world
        if strangers := [part.root for part in parts if part.root >= world]:
            raise LocalProtocolError(f"there is no rank {strangers[0]} in a communicator of {world}")
        all_runs = [runs_of(part, len(slot)) for part in parts]
        whole = np.frombuffer(slot, dtype=np.uint8)
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
