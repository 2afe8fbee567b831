"""How fast each transport moves a bucket, against the copies of one core: `python -m bench transports --json PATH`.

\b
* `shm`: this process fills a slot from private memory and exports it. Another process receives, verifies and copies it
  into its own private memory. That makes two copies and two checksums, one after the other.
* `gloo`: two bridge processes; export, broadcast over loopback from slot to slot, checksum at the receiver. Its two
  copies are the kernel's, into the socket and out of it.
* `exchange`: each of two bridges has half of the bucket and gives it to the other. `exchange, runs`: the halves are
  many runs of 192 KiB, as from tensors that FSDP has cut between two nodes. Runs are packed before and unpacked after,
  which makes four copies.

Figures are of warm slots. The first pass over a slot, which pays for its page faults, is `first`.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import secrets
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from bench.harness import JsonOption, copy_ceiling, report, suite
from bench.harness import size as bytes_of
from weightsync.ipc.arena import Arena
from weightsync.nccl_bridge import commands as c
from weightsync.plan.shares import MemberPart
from weightsync.transports import receiver
from weightsync.transports.shm import ShmSender
from weightsyncd.bridges import Bridge, BridgeConfig

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

RUN = 192 * 2**10  # bytes: half of an expert's matrix of Qwen3-30B-A3B
WAIT = 120.0  # seconds, for anything


@dataclass(frozen=True)
class Figure:
    """One bucket size over one transport."""

    transport: str
    nbytes: int
    runs: int
    seconds: float  # median, for one bucket from full private memory to full private memory (gloo: slot to slot)
    first: float  # seconds of the first bucket
    gb_per_s: float
    ratio: float  # to the rate at which one core copies
    copies: int  # of each byte; checksums, which read it once more each, are not counted
    ratio_per_copy: float
    phases: dict[str, float]  # median seconds


def measure_shm(nbytes: int, runs: int, ceiling: float) -> Figure:
    """Measure filling, exporting, receiving with verification, and copying out."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(target=_read, args=(theirs, nbytes), daemon=True)
    child.start()
    theirs.close()
    source = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    phases: list[dict[str, float]] = []
    with Arena.create(node="bench", bridge=0, slots=1, slot_bytes=nbytes) as arena:
        sender = ShmSender(arena)
        ours.send_bytes(sender.offer("reader/0"))
        ours.recv()
        for sequence in range(runs + 1):
            start = time.perf_counter()
            np.copyto(np.frombuffer(arena.slot(0), np.uint8), source)
            filled = time.perf_counter()
            ticket = sender.export(0, nbytes, sequence, ["reader/0"])["reader/0"]
            exported = time.perf_counter()
            ours.send_bytes(ticket)
            received, copied = ours.recv()
            sender.wait_released(0, deadline=time.monotonic() + WAIT)
            end = time.perf_counter()
            spent = {"fill": filled - start, "export": exported - filled, "receive": received, "copy out": copied}
            phases.append({**spent, "hand over": end - start - sum(spent.values()), "all": end - start})
        ours.send_bytes(b"")
        child.join(WAIT)
        sender.close()
    ours.close()
    return _figure("shm", nbytes, phases, ceiling, copies=2)


def _read(pipe: Connection, nbytes: int) -> None:
    """Run the reader's process."""
    reader = receiver("shm")
    reader.accept(pipe.recv_bytes(), deadline=time.monotonic() + WAIT)
    target = np.ones(nbytes, np.uint8)
    pipe.send(None)
    while ticket := pipe.recv_bytes():
        start = time.perf_counter()
        with reader.receive(ticket, deadline=time.monotonic() + WAIT) as lease:
            received = time.perf_counter()
            np.copyto(target, np.frombuffer(lease.view, np.uint8))
            copied = time.perf_counter()
        pipe.send((received - start, copied - received))
    reader.close()


async def measure_gloo(sizes: tuple[int, ...], runs: int, ceiling: float) -> tuple[list[Figure], dict[str, int]]:
    """Measure export, send and receive between two bridges, and a bridge's resident memory before and after joining."""
    configs = [
        BridgeConfig(node=f"bench-{rank}", index=0, slots=1, slot_bytes=max(sizes), log_level="warning")
        for rank in range(2)
    ]
    bridges = [Bridge(config) for config in configs]
    figures = []
    try:
        for bridge in bridges:
            await bridge.start(deadline=_soon())
        before = _resident(bridges[0])
        await _join(bridges)
        memory = {"bridge, started": before, "bridge, joined": _resident(bridges[0])}
        assert bridges[0].offer is not None
        with Arena.attach(bridges[0].offer, writable=True) as arena:
            np.frombuffer(arena.slot(0), np.uint8)[:] = np.random.default_rng(0).integers(0, 256, max(sizes), np.uint8)
        sequence = 0
        for nbytes in sizes:
            phases = []
            for _ in range(runs + 1):
                sequence += 1
                phases.append(await _broadcast(bridges, nbytes, sequence))
            figures.append(_figure("gloo", nbytes, phases, ceiling, copies=2))
        for name, run, copies in (("exchange", 0, 2), ("exchange, runs", RUN, 4)):
            for nbytes in sizes:
                phases = [await _exchange(bridges, nbytes, run or nbytes // 2) for _ in range(runs + 1)]
                figures.append(_figure(name, nbytes, phases, ceiling, copies=copies))
    finally:
        for bridge in bridges:
            await bridge.stop(deadline=_soon())
    return figures, memory


async def _join(bridges: list[Bridge]) -> None:
    hosted = await bridges[0].call(c.Host(generation=1, host="127.0.0.1"), deadline=_soon())
    key = secrets.token_hex(8)
    joins = [
        bridge.call(
            c.Join(
                generation=1,
                rank=rank,
                world=len(bridges),
                host="127.0.0.1",
                port=hosted.port,
                address="127.0.0.1",
                key=key,
            ),
            deadline=_soon(),
        )
        for rank, bridge in enumerate(bridges)
    ]
    await asyncio.gather(*joins)


async def _broadcast(bridges: list[Bridge], nbytes: int, sequence: int) -> dict[str, float]:
    root, other = bridges
    start = time.perf_counter()
    exported = await root.call(
        c.Export(slot=0, nbytes=nbytes, sequence=sequence, peers=(other.name,)), deadline=_soon()
    )
    middle = time.perf_counter()
    _, received = await asyncio.gather(
        root.call(c.Send(slot=0, sequence=sequence), deadline=_soon()),
        other.call(c.Receive(ticket=exported.peer_tickets[other.name], slot=0), deadline=_soon()),
    )
    end = time.perf_counter()
    hand_over = end - middle - received.seconds
    return {"export": middle - start, "receive": received.seconds, "hand over": hand_over, "all": end - start}


async def _exchange(bridges: list[Bridge], nbytes: int, run: int) -> dict[str, float]:
    begins = np.arange(0, nbytes, run)
    runs = np.stack([begins, np.minimum(run, nbytes - begins)], axis=1).astype("<i8")
    parts = tuple(MemberPart(root=rank, runs=runs[rank::2].tobytes()) for rank in range(2))
    command = c.Exchange(slot=0, generation=1, token=secrets.randbits(59), parts=parts)
    start = time.perf_counter()
    await asyncio.gather(*(bridge.call(command, deadline=_soon()) for bridge in bridges))
    return {"all": time.perf_counter() - start}


def _figure(transport: str, nbytes: int, phases: list[dict[str, float]], ceiling: float, *, copies: int) -> Figure:
    first, warm = phases[0], phases[1:]
    median = {name: statistics.median(run[name] for run in warm) for name in first}
    seconds = median.pop("all")
    speed = nbytes / seconds
    return Figure(
        transport=transport,
        nbytes=nbytes,
        runs=len(warm),
        seconds=seconds,
        first=first["all"],
        gb_per_s=speed / 1e9,
        ratio=speed / ceiling,
        copies=copies,
        ratio_per_copy=copies * speed / ceiling,
        phases=median,
    )


def _resident(bridge: Bridge) -> int:
    """Return a bridge's resident bytes with libraries, without the shared slots, which belong to the node."""
    status = Path(f"/proc/{bridge.pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return 1024 * (int(fields["VmRSS"].split()[0]) - int(fields["RssShmem"].split()[0]))


def _soon() -> float:
    return time.monotonic() + WAIT


def _row(figure: Figure) -> list[str]:
    phases = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in figure.phases.items())
    return [
        f"{figure.transport} {figure.nbytes // 2**20} MiB",
        f"{1e3 * figure.seconds:.2f}",
        f"{1e3 * figure.first:.2f}",
        f"{figure.gb_per_s:.2f}",
        f"{figure.ratio:.2f}",
        f"{figure.ratio_per_copy:.2f}",
        phases,
    ]


def main(
    runs: Annotated[int, typer.Option(min=1, help="Measured, after one that does not count.")] = 7,
    sizes: Annotated[
        str, typer.Option("--bytes", help="Sizes of a bucket, with commas between them.")
    ] = "1MiB,4MiB,16MiB,64MiB,256MiB,1GiB",
    to: JsonOption = None,
) -> None:
    """Measure, print, write."""
    wanted = tuple(bytes_of(one) for one in sizes.split(","))
    ceiling = copy_ceiling()
    figures = [measure_shm(nbytes, runs, ceiling) for nbytes in wanted]
    over_gloo, memory = asyncio.run(measure_gloo(wanted, runs, ceiling))
    figures += over_gloo
    document: dict[str, Any] = {
        "copy_ceiling_gb_per_s": ceiling / 1e9,
        "transports": [asdict(figure) for figure in figures],
        "memory_bytes": memory,
    }
    rows = [_row(figure) for figure in figures]
    rows += [[name, "", "", "", "", "", f"{nbytes / 2**20:.0f} MiB resident"] for name, nbytes in memory.items()]
    title = f"One bucket from memory to memory; one core copies {ceiling / 1e9:.1f} GB/s"
    columns = ("transport", "ms", "first ms", "GB/s", "of a copy", "per copied byte", "phases, ms")
    report(title, columns, rows, document, to)


app = suite(main)
if __name__ == "__main__":
    app()
