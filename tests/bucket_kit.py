"""For tests of bucket readers: an arena, its sender, and a plan over some tensors, filled as a trainer would."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from weightsync.ipc.arena import Arena
from weightsync.plan.buckets import plan_push
from weightsync.plan.manifest import Layout, Shard
from weightsync.transports.shm import ShmSender

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["Buckets", "soon"]


def soon() -> float:
    """A deadline that is never reached."""
    return time.monotonic() + 20


class Buckets:
    """The tensors in one slot, a bucket at a time, for the reader "e/0"."""

    def __init__(
        self,
        directory: Path,
        slot_bytes: int,
        tensors: Mapping[str, torch.Tensor],
        aliases: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.tensors = tensors
        self.arena = Arena.create(node="w", bridge=0, slots=2, slot_bytes=slot_bytes, directory=str(directory))
        self.sender = ShmSender(self.arena)
        shards = [
            Shard(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), (0,) * t.dim(), tuple(t.shape))
            for name, t in tensors.items()
        ]
        plan = plan_push([Layout.of(shards, aliases)], slot_bytes=slot_bytes, owners=1, alignment=64)
        self.manifest = plan.manifest
        self.sequence = 0
        self.offer = self.sender.offer("e/0")

    def ticket(self, bucket: int) -> bytes:
        """Fill the slot with a bucket, export it, and return the reader's ticket."""
        slot, self.sequence = self.arena.slot(0), self.sequence + 1
        m = self.manifest
        for piece in m.bucket_pieces(bucket):
            tensor = self.tensors[m.tensors.names[int(m.piece_tensor[piece])]]
            raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            size = tensor.element_size()
            first, nbytes = int(m.piece_start[piece]) * size, int(m.piece_nbytes[piece])
            at = int(m.piece_offset[piece])
            slot[at : at + nbytes] = raw[first : first + nbytes].data
        return self.sender.export(0, int(m.bucket_nbytes[bucket]), self.sequence, ["e/0"])["e/0"]

    def close(self) -> None:
        """Close the sender, and remove the arena."""
        self.sender.close()
        self.arena.close()
        self.arena.unlink()
