"""Rank 0 of an NCCL communicator whose other members are an engine's ranks: it sets up as they expect, and sends.

Every tensor is a collective of its own, because engines launch each by itself. NCCL lays out collectives that are
launched together differently, so all members must launch in the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.errors import LocalProtocolError, TransportBroken, TransportTimeout
from weightsync.ipc.cuda import cupy
from weightsync.nccl_bridge.nccl import NcclCommunicator, Tokens
from weightsync.nccl_bridge.terms import nccl, prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["NcclGroup"]

_HINT = (
    "weightsyncd and the engine need the same version of NCCL and the same NCCL_CUMEM_ENABLE (SGLang sets it to 0, "
    "vllm leaves it unset), a network between them, and no rank of the engine on this bridge's GPU"
)


class NcclGroup(NcclCommunicator):
    """A communicator with an engine's ranks. Any thread may call `abort`."""

    def __init__(self, *, world: int, address: str, greets: bool) -> None:
        """`greets`: members do an all-reduce of one number as soon as they have joined, as vLLM's do."""
        super().__init__(generation=0, rank=0, world=world, address=address)
        self._greets = greets
        self._unique_id = b""

    def meet(self, tell: Callable[[bytes], None], *, deadline: float) -> None:
        """Make the unique id and `tell` it to the engine's ranks.

        Returns when all members have joined if they greet; else at once, and they join with their first broadcast.
        """
        what = f"the group of {self.world} with an engine"
        with self._operation(what, deadline):
            prepare(self._address)
            self._unique_id = nccl().unique_id()
            tell(self._unique_id)
            if self._greets:
                self._begin(what, deadline)
                self._tokens = Tokens(1)  # only its memory is used
                nccl().sum_float(self._communicator, self._tokens.address(0), self._stream.ptr)
                self._wait(what, deadline, self._drained)

    def send(self, pieces: Sequence[tuple[int, int]], *, deadline: float) -> None:
        """Broadcast the bytes of each piece (address on this GPU, length), in order. Returns when they may change."""
        what = f"sending {len(pieces)} tensors to the {self.world - 1} ranks of an engine"
        with self._operation(what, deadline):
            if not self._unique_id:
                raise LocalProtocolError(f"{what}: nobody was told how to join")
            if self._communicator is None:
                self._begin(what, deadline)
            for address, nbytes in pieces:
                nccl().broadcast(self._communicator, address, nbytes, self.rank, self._stream.ptr)
                self._wait(what, deadline)
            self._wait(what, deadline, self._drained)

    def _begin(self, what: str, deadline: float) -> None:
        self._stream = cupy().cuda.Stream(non_blocking=True)
        try:
            self._communicator = nccl().begin(self.world, self._unique_id, self.rank)
            self._wait(what, deadline)
        except (TransportBroken, TransportTimeout) as error:
            raise type(error)(f"{error.message} (a group with an engine, NCCL {nccl().version})", hint=_HINT) from error
