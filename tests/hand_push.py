"""Pushes made by hand, without trainer, daemon or session: a plan, an arena and a sender in the test's own process."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np

from weightsync.adapters import adapter
from weightsync.fingerprint import fingerprint
from weightsync.ipc.arena import Arena
from weightsync.plan.buckets import plan_push
from weightsync.plan.manifest import Layout, Shard
from weightsync.transports.shm import ShmSender

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

    from weightsync.adapters import EngineSpec
    from weightsync.adapters.base import EngineAdapter, PauseMode
    from weightsync.plan.boxes import Words
    from weightsync.plan.manifest import Manifest

__all__ = ["HandPush", "Tensors", "as_bytes", "connected", "fill_slot", "manifest_of", "sent", "soon"]

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]  # name → dtype, shape, bytes


def soon(seconds: float = 30.0) -> float:
    """Return a deadline this many seconds from now."""
    return time.monotonic() + seconds


@asynccontextmanager
async def connected(spec: EngineSpec) -> AsyncIterator[EngineAdapter]:
    """Make the adapter of an engine, and close it at the end of the block."""
    hands = adapter(spec)
    try:
        yield hands
    finally:
        await hands.close()


def as_bytes(named: Iterable[tuple[str, object]]) -> Tensors:
    """Return torch tensors as plain bytes."""
    import torch

    out: Tensors = {}
    for name, tensor in named:
        assert isinstance(tensor, torch.Tensor)
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        out[name] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)
    return out


def manifest_of(tensors: Tensors, *, slot_bytes: int, aliases: Iterable[tuple[str, str]] = ()) -> Manifest:
    """Return the manifest for one rank that holds these tensors whole."""
    shards = [Shard(name, dtype, shape, (0,) * len(shape), shape) for name, (dtype, shape, _) in tensors.items()]
    return plan_push([Layout.of(shards, aliases)], slot_bytes=slot_bytes, owners=1).manifest


def fill_slot(
    manifest: Manifest, bucket: int, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], slot: memoryview
) -> None:
    """Write a bucket's pieces where the manifest says."""
    table = manifest.tensors
    for piece in manifest.bucket_pieces(bucket):
        tensor = int(manifest.piece_tensor[piece])
        itemsize = int(table.itemsizes[tensor])
        first, count = int(manifest.piece_start[piece]) * itemsize, int(manifest.piece_nbytes[piece])
        at = int(manifest.piece_offset[piece])
        slot[at : at + count] = tensors[table.names[tensor]][2][first : first + count]


class HandPush:
    """Sends tensors to engines over shared memory, one bucket at a time. A context manager."""

    def __init__(self, *, slot_bytes: int = 1 << 20, slots: int = 2, node: str = "hand") -> None:
        self.arena = Arena.create(node=node, bridge=0, slots=slots, slot_bytes=slot_bytes)
        self.sender = ShmSender(self.arena)
        self._sequence = 0

    def __enter__(self) -> HandPush:
        return self

    def __exit__(self, *_: object) -> None:
        self.sender.close()
        self.arena.close()
        self.arena.unlink()

    def manifest(self, tensors: Tensors, aliases: Iterable[tuple[str, str]] = ()) -> Manifest:
        return manifest_of(tensors, slot_bytes=self.arena.slot_bytes, aliases=aliases)

    def offers(self, engine: str, tp: int) -> list[list[bytes]]:
        return [[self.sender.offer(f"{engine}/{rank}")] for rank in range(tp)]

    def tickets(self, manifest: Manifest, bucket: int, tensors: Tensors, engine: str, tp: int) -> list[bytes]:
        """Fill a slot with the bucket and export it to every rank of the engine."""
        slot = bucket % self.arena.slots
        self.sender.wait_released(slot, deadline=soon())
        fill_slot(manifest, bucket, tensors, self.arena.slot(slot))
        self._sequence += 1
        readers = [f"{engine}/{rank}" for rank in range(tp)]
        exported = self.sender.export(slot, int(manifest.bucket_nbytes[bucket]), self._sequence, readers)
        return [exported[reader] for reader in readers]

    async def push(
        self,
        adapter: EngineAdapter,
        version: int,
        tensors: Tensors,
        *,
        aliases: Iterable[tuple[str, str]] = (),
        pause: PauseMode = "keep",
    ) -> int | None:
        """Make a whole push to one engine. Returns how many tensors `verify` compared."""
        info = await adapter.probe(deadline=soon())
        manifest = self.manifest(tensors, aliases)
        await adapter.accept(manifest, deadline=soon())
        await adapter.pause(pause, deadline=soon())
        await adapter.begin(version, manifest, self.offers("engine", info.tp_size), deadline=soon())
        for bucket in range(manifest.buckets):
            tickets = self.tickets(manifest, bucket, tensors, "engine", info.tp_size)
            await adapter.load(bucket, tickets, deadline=soon())
        await adapter.finish(version, deadline=soon())
        compared = await adapter.verify(manifest, sent(manifest, tensors), deadline=soon())
        await adapter.resume(deadline=soon())
        return compared


def sent(manifest: Manifest, tensors: Tensors) -> Words:
    """Return the fingerprint of each of the manifest's tensors, computed over the whole tensor."""
    table = manifest.tensors
    sums = [
        fingerprint(
            np.frombuffer(tensors[name][2], dtype=np.uint8),
            itemsize=itemsize,
            global_shape=shape,
            offset=(0,) * len(shape),
            shape=shape,
        )
        for name, shape, itemsize in zip(table.names, table.shapes, table.itemsizes.tolist(), strict=True)
    ]
    return np.array(sums, dtype=np.uint64)
