"""A `CudaIpcReceiver` in a process of its own, as another engine's worker has one, driven through a pipe.

The processes stay for the next receiver: each takes seconds to start.
"""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

from weightsync.errors import TransportClosed, WeightSyncError
from weightsync.transports.base import BucketReceiver, Lease
from weightsync.transports.cuda_ipc import CudaIpcReceiver

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

SECONDS = 60.0
_PIPES: dict[int, Any] = {}


def serve(pipe: Connection, device: int) -> None:
    """The far side. Ends with its pipe."""
    import numpy as np
    import torch

    from weightsync.device.buckets import copied

    torch.cuda.set_device(device)
    receiver = CudaIpcReceiver(device)
    leases: dict[int, tuple[Lease, int]] = {}
    while True:
        try:
            name, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            if name == "start":
                receiver, leases = CudaIpcReceiver(device), {}
                pipe.send(None)
            elif name == "receive":
                ticket, deadline, verify = arguments
                lease = receiver.receive(ticket, deadline=deadline, verify=verify)
                leases[len(leases)] = lease, lease.address
                pipe.send((len(leases) - 1, lease.sequence, lease.nbytes))
            elif name == "read":
                lease, address = leases[arguments[0]]
                data = copied(address, lease.nbytes, torch.device("cuda", device))
                pipe.send(np.asarray(data.cpu()).tobytes())
            elif name == "release":
                leases[arguments[0]][0].release()
                pipe.send(None)
            elif name == "accept":
                receiver.accept(arguments[0], deadline=arguments[1])
                pipe.send(None)
            else:
                pipe.send(getattr(receiver, name)())
        except WeightSyncError as error:
            pipe.send(error.record())


class FarReceiver(BucketReceiver):
    """The near side: a `BucketReceiver` as far as the checks can tell."""

    def __init__(self, rank: int, device: int) -> None:
        super().__init__()
        if rank not in _PIPES:
            context = multiprocessing.get_context("spawn")
            _PIPES[rank], theirs = context.Pipe()
            context.Process(target=serve, args=(theirs, device), daemon=True).start()
            theirs.close()
        self._pipe = _PIPES[rank]
        self._ask("start")
        self.leases: dict[Lease, int] = {}

    def accept(self, offer: bytes, *, deadline: float) -> None:
        self._ask("accept", offer, deadline)

    def receive(self, ticket: bytes, *, deadline: float, verify: bool = True) -> Lease:
        self._check_open()
        number, sequence, nbytes = self._ask("receive", ticket, deadline, verify)
        lease = Lease(sequence=sequence, nbytes=nbytes, lent=0, on_release=lambda: self._ask("release", number))
        self.leases[lease] = number
        return lease

    def read(self, lease: Lease) -> bytes:
        data: bytes = self._ask("read", self.leases[lease])
        return data

    def close(self) -> None:
        if not self.closed:
            self._ended.set()
            for lease in self.leases:
                lease.release()
            self._ask("close")

    def abort(self) -> None:
        if not self.closed:
            self._ended.set()
            self._ask("abort")

    def _ask(self, *request: Any) -> Any:
        self._pipe.send(request)
        if not self._pipe.poll(SECONDS):
            raise TransportClosed("the far receiver does not answer")
        answer = self._pipe.recv()
        if hasattr(answer, "error"):
            raise answer.error()
        return answer
