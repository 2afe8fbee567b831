"""Ceilings of this host's GPUs: plain copies by our own kernel, one process a GPU, memory mapped by CUDA IPC.

Every figure is GB/s (1e9 bytes) into, or out of, each GPU while all are busy; it is the slowest GPU's median.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["measure", "measure_to_host"]

NBYTES = 2 << 30
RUNS = 7
_ROW = 4096  # bytes: a hidden size of 2048


def measure() -> dict[str, float]:
    """Measure copies on one GPU, and from every GPU reading or writing all GPUs at once, in equal parts."""
    context = multiprocessing.get_context("spawn")
    gpus = torch.cuda.device_count()
    barrier = context.Barrier(gpus)
    pipes, processes = [], []
    for rank in range(gpus):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(rank, gpus, barrier, theirs), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    offers = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send(offers)
    results = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join(30)
    return {name: min(result[name] for result in results) for name in results[0]}


def measure_to_host() -> float:
    """Return the GB/s of one GPU's copy engine into locked host memory, while nothing else uses it."""
    there = torch.empty(NBYTES, dtype=torch.uint8, device="cuda")
    here = torch.empty(NBYTES, dtype=torch.uint8, pin_memory=True)
    seconds = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        here.copy_(there, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return NBYTES / statistics.median(seconds) / 1e9


def worker(rank: int, gpus: int, barrier: Any, pipe: Connection) -> None:
    """Run one GPU's part."""
    from weightsync.device.launch import COPY, SUM, BoxKernel
    from weightsync.device.table import Place, box_items
    from weightsync.ipc.arena import ArenaOffer
    from weightsync.ipc.cuda import DeviceSlots

    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    mine = DeviceSlots.allocate(1, NBYTES, gpu="x", device=rank)
    pipe.send(mine.memory)
    memories = pipe.recv()
    addresses = []
    for other, memory in enumerate(memories):
        offer = ArenaOffer(
            directory="/",
            name=f"weightsync-0-x-0-{'0' * 16}",
            nonce=bytes(16),
            slots=1,
            slot_bytes=NBYTES,
            readers=1,
            memory=memory,
        )
        addresses.append(mine.slot(0) if other == rank else DeviceSlots.open(offer, rank).slot(0))
    local = torch.empty(NBYTES, dtype=torch.uint8, device=device)
    kernel = BoxKernel(device)
    part = NBYTES // gpus
    turns = [(rank + step) % gpus for step in range(gpus)]
    bases = torch.tensor([local.data_ptr(), *addresses], device=device)
    streams = [torch.cuda.Stream(device) for _ in range(gpus)]
    totals = torch.zeros(1, dtype=torch.int64, device=device)

    def flat(src: Place, dst: Place, nbytes: int) -> Any:
        return kernel.table(box_items((nbytes,), 1, src, dst, tensor_shape=(nbytes,), offset=(0,)))

    rows = box_items(
        (NBYTES // _ROW, _ROW), 1, Place(0, 0, (_ROW, 1)), None, tensor_shape=(NBYTES // _ROW, _ROW), offset=(0, 0)
    )
    inside = flat(Place(0, 0, (1,)), Place(1 + rank, 0, (1,)), NBYTES)
    pulls = [flat(Place(1 + p, rank * part, (1,)), Place(0, p * part, (1,)), part) for p in range(gpus)]
    pushes = [flat(Place(0, p * part, (1,)), Place(1 + p, rank * part, (1,)), part) for p in range(gpus)]

    def mixed(bases_of: list[tuple[Place, Place]]) -> Any:
        """Make one launch for all peers, which take turns, so that no link waits for another."""
        every = [box_items((part,), 1, src, dst, tensor_shape=(part,), offset=(0,)) for src, dst in bases_of]
        return kernel.table(np.stack(every, axis=1).reshape(-1))

    reads = mixed([(Place(1 + p, rank * part, (1,)), Place(0, p * part, (1,))) for p in turns])
    writes = mixed([(Place(0, p * part, (1,)), Place(1 + p, rank * part, (1,))) for p in turns])

    def all_of(tables: list[Any], mode: int) -> float:
        def run() -> None:
            for table, stream in zip(tables, streams, strict=False):
                kernel.launch(table, mode, stream=stream, bases=bases, totals=totals, share=len(tables))

        seconds = []
        for _ in range(RUNS + 2):
            torch.cuda.synchronize()
            barrier.wait()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return NBYTES / statistics.median(seconds[2:]) / 1e9

    pipe.send(
        {
            "copy on one GPU": all_of([inside], COPY),
            "copy on one GPU, with checksums": all_of([inside], COPY | SUM),
            "checksums alone": all_of([inside], SUM),
            "checksums alone, in rows of 4 KiB": all_of([kernel.table(rows)], SUM),
            "each GPU reads from all": all_of([reads], COPY),
            "each GPU writes to all": all_of([writes], COPY),
            "each GPU reads from all, a launch each": all_of(pulls, COPY),
            "each GPU writes to all, a launch each": all_of(pushes, COPY),
            "each GPU writes to all, with checksums": all_of([writes], COPY | SUM),
        }
    )
    barrier.wait()
