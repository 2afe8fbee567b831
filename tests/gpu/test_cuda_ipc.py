"""CUDA IPC between processes: the conformance suite, and torch's own importer as stock engines use it."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.gpu.far_receiver import FarReceiver
from weightsync.adapters.torch_handles import cuda_args
from weightsync.errors import ConfigError
from weightsync.ipc.arena import Arena
from weightsync.ipc.cuda import DeviceSlots, free_bytes
from weightsync.ipc.ledger import Ledger
from weightsync.pickling import dumps
from weightsync.testing import check_transport, eventually, transport_checks
from weightsync.transports.cuda_ipc import CudaIpcSender, DeviceChecksums
from weightsync.transports.torch_cuda import TorchCudaSender, TorchCudaTicket

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightsync.transports.base import Lease

pytestmark = pytest.mark.timeout(180)


@contextmanager
def gpu_arena(slots: int, slot_bytes: int, device: int = 0) -> Iterator[tuple[Arena, DeviceSlots]]:
    memory = DeviceSlots.allocate(
        slots, slot_bytes, gpu=str(torch.cuda.get_device_properties(device).uuid), device=device
    )
    name = f"test{secrets.token_hex(4)}"
    try:
        with Arena.create(node=name, bridge=0, slots=slots, slot_bytes=slot_bytes, memory=memory.memory) as arena:
            yield arena, memory
    finally:
        memory.close()


def write(address: int, data: bytes, device: int = 0) -> None:
    """Bytes into GPU memory, by cupy: torch would look up where the address belongs."""
    import cupy
    import numpy as np

    with cupy.cuda.Device(device):
        host = np.frombuffer(data, dtype=np.uint8).copy()
        cupy.cuda.runtime.memcpy(address, host.ctypes.data, len(data), cupy.cuda.runtime.memcpyHostToDevice)


class Pair:
    def __init__(self, arena: Arena, slots: DeviceSlots, receivers: list[FarReceiver]) -> None:
        self.sender = CudaIpcSender(arena, slots)
        self.receivers = receivers
        self.readers = [f"engine/{rank}" for rank in range(len(receivers))]
        self._slots = slots

    def fill(self, slot: int, data: bytes) -> None:
        write(self._slots.slot(slot), data)

    def read(self, lease: Lease) -> bytes:
        owner = next(receiver for receiver in self.receivers if lease in receiver.leases)
        return owner.read(lease)


@contextmanager
def pairs(readers: int, slots: int, slot_bytes: int) -> Iterator[Pair]:
    gpus = torch.cuda.device_count()
    with gpu_arena(slots, slot_bytes) as (arena, memory):
        receivers = [FarReceiver(rank, rank % gpus) for rank in range(readers)]
        pair = Pair(arena, memory, receivers)
        try:
            yield pair
        finally:
            pair.sender.close()
            for receiver in receivers:
                receiver.close()


@pytest.mark.parametrize("check", transport_checks())
def test_conformance(check):
    for rank in range(2):  # these stay, and are no leak
        FarReceiver(rank, rank % torch.cuda.device_count())
    check_transport(pairs, only=check)


def test_an_arena_that_does_not_fit_says_so():
    free, total = free_bytes(0)
    with pytest.raises(ConfigError, match=rf"needs {3 * 2 * total} bytes of GPU x, which has \d+ of {total} free"):
        DeviceSlots.allocate(3, 2 * total, gpu="x", device=0)
    assert abs(free_bytes(0)[0] - free) < 2**26


# --- torch's own importer, in processes that know nothing of weightsync ---------------------------------------------


def import_and_hold(pipe, device: int) -> None:
    """What a stock engine does with a handle: open it, sum it, keep it until told."""
    import pickle

    import torch

    torch.cuda.set_device(device)
    while (pickled := pipe.recv()) is not None:
        rebuild = torch.multiprocessing.reductions.rebuild_cuda_tensor
        tensors = [rebuild(*pickle.loads(one)) for one in pickled]
        pipe.send([int(tensor.long().sum()) for tensor in tensors])
        pipe.recv()
        del tensors
        torch.cuda.synchronize()
        pipe.send("released")


@contextmanager
def stock_readers(count: int) -> Iterator[list[Any]]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(count):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=import_and_hold, args=(theirs, rank % torch.cuda.device_count())))
        processes[-1].start()
        pipes.append(ours)
    try:
        yield pipes
    finally:
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join(30)


def pickled(ticket: bytes, rank: int) -> bytes:
    return dumps(cuda_args(TorchCudaTicket.unpack(ticket), rank % torch.cuda.device_count()))


def _only_second_holds(sender: TorchCudaSender, slot: int) -> bool:
    return sender.pending(slot) == ("e/1",)


def test_each_stock_reader_has_an_export_of_its_own():
    ledger = Ledger()
    with gpu_arena(2, 1 << 20) as (arena, memory), stock_readers(2) as readers:
        sender = TorchCudaSender(arena, ledger=ledger, checksums=DeviceChecksums(arena, memory))
        names = ["e/0", "e/1"]
        for name in names:
            sender.offer(name)
        for sequence in range(1, 21):
            slot = sequence % 2
            write(memory.slot(slot), bytes([sequence]) * 4096)
            tickets = sender.export(slot, 4096, sequence, names)
            for rank, name in enumerate(names):
                readers[rank].send([pickled(tickets[name], rank)])
            assert [reader.recv() for reader in readers] == [[4096 * sequence]] * 2, "other bytes arrived"
            assert sender.pending(slot) == ("e/0", "e/1")
            readers[0].send("let go")
            readers[0].recv()
            assert eventually(partial(_only_second_holds, sender, slot))
            readers[1].send("let go")
            readers[1].recv()
            sender.wait_released(slot, deadline=time.monotonic() + 10)
        assert ledger.outstanding == 0
        assert [(a.exports, a.opens, a.closes) for a in ledger.accounts()] == [(20, 20, 20)] * 2
        sender.close()


def test_serialising_once_for_two_readers_is_a_fence_that_lies():
    """One export opened by two: its counter is at 0 when the first lets go, while the second still reads; by torch's
    own exporter the memory is then leaked or freed under a reader, which is what engines with tp > 1 report."""
    with gpu_arena(1, 1 << 20) as (arena, memory), stock_readers(2) as readers:
        sender = TorchCudaSender(arena, checksums=DeviceChecksums(arena, memory))
        sender.offer("e/0")
        ticket = sender.export(0, 4096, 1, ["e/0"])["e/0"]
        for rank, reader in enumerate(readers):
            reader.send([pickled(ticket, rank)])
            reader.recv()
        readers[0].send("let go")
        readers[0].recv()
        assert eventually(lambda: sender.pending(0) == ()), "the other reader still has it open"
        readers[1].send("let go")
        readers[1].recv()
        sender.close()


def test_torch_itself_leaks_what_is_serialised_once_and_opened_twice():
    """The same with torch's exporter: the sender's block is never given back, since its counter is not 0 but -1."""
    from torch.multiprocessing.reductions import reduce_tensor

    def sent_memory(sharing: int) -> int:
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(0)
        with stock_readers(2) as readers:
            for _ in range(5):
                tensor = torch.ones(1 << 22, dtype=torch.uint8, device="cuda:0")
                reduced = [reduce_tensor(tensor)[1] for _ in range(sharing)]
                for rank, reader in enumerate(readers):
                    args = list(reduced[rank % sharing])
                    args[6] = rank % torch.cuda.device_count()
                    reader.send([__import__("pickle").dumps(tuple(args))])
                    reader.recv()
                del tensor
                for reader in readers:
                    reader.send("let go")
                    reader.recv()
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(0) - before

    assert sent_memory(2) == 0, "an export for each reader is given back"
    assert sent_memory(1) > 0, "one export for both is not"


def test_a_process_sees_gpus_as_it_likes():
    """A reader whose only GPU is not the owner's, or whose GPUs are numbered another way, reads all the same."""
    import subprocess
    import sys

    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    script = (
        "import sys, time, torch\n"
        "from weightsync.transports.cuda_ipc import CudaIpcReceiver\n"
        "from weightsync.device.buckets import copied\n"
        "reader = CudaIpcReceiver(0)\n"
        "reader.accept(bytes.fromhex(sys.argv[1]), deadline=time.monotonic() + 60)\n"
        "with reader.receive(bytes.fromhex(sys.argv[2]), deadline=time.monotonic() + 60) as lease:\n"
        "    print(int(copied(lease.address, lease.nbytes, torch.device('cuda', 0)).long().sum()))\n"
    )
    with gpu_arena(1, 1 << 20) as (arena, memory):
        sender = CudaIpcSender(arena, memory)
        write(memory.slot(0), b"\7" * 1000)
        views = [str(len(uuids) - 1), ",".join(map(str, reversed(range(len(uuids))))), f"GPU-{uuids[-1]}"]
        for sequence, view in enumerate(views, start=1):
            offer, ticket = sender.offer(f"e/{sequence}"), sender.export(0, 1000, sequence, [f"e/{sequence}"])
            command = [sys.executable, "-c", script, offer.hex(), ticket[f"e/{sequence}"].hex()]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": view}
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
            assert done.stdout.strip() == "7000", f"CUDA_VISIBLE_DEVICES={view}: {done.stderr[-800:]}"
        assert sender.pending(0) == ()
