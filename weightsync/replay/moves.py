"""Lays a load plan over the buckets of a manifest, and carries it out in place of a loader.

Which bytes of a bucket go where is worked out once, before the first byte comes. Neighbouring runs become one move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from weightsync.replay.strided import Box, merge_dims

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from weightsync.plan.manifest import Manifest
    from weightsync.replay.plan import Copy, LoadPlan

__all__ = ["BucketMoves", "Move", "Moves", "apply", "lay_out", "raw_bytes", "strided_view"]


@dataclass(frozen=True, slots=True)
class Move:
    """A copy into a target: of one box of a bucket, or of a tensor that was put together out of several buckets."""

    target: int
    source_box: Box  # in the bucket or the tensor, as bytes
    source_dtype: torch.dtype
    target_box: Box  # from where the target begins
    dtype: torch.dtype

    @property
    def flat(self) -> bool:
        """Whether it is one run of the same bytes on both sides."""
        size = self.dtype.itemsize
        one_run = self.source_box.strides == self.target_box.strides == (size,) or not self.source_box.sizes
        return one_run and self.source_dtype == self.dtype


@dataclass(frozen=True)
class BucketMoves:
    """The moves that can be made, and the tensors that are whole, once a bucket has come."""

    moves: tuple[Move, ...]  # out of the bucket
    cut: tuple[tuple[int, tuple[Move, ...]], ...]  # cut tensors that it completes, and the moves out of each
    replayed: frozenset[int]  # tensors of the manifest that it completes and that need no loader
    left: bool  # whether it has bytes of tensors that need the loader


@dataclass(frozen=True)
class Moves:
    """A plan laid over one manifest. Moves name a target by its index in `targets`."""

    targets: tuple[str, ...]
    buckets: tuple[BucketMoves, ...]

    @property
    def whole(self) -> bool:
        """Whether no bucket has anything for a loader."""
        return not any(bucket.left for bucket in self.buckets)

    @property
    def count(self) -> int:
        """How many moves there are, neighbours joined."""
        return sum(len(b.moves) + sum(len(moves) for _, moves in b.cut) for b in self.buckets)


def lay_out(plan: LoadPlan, manifest: Manifest) -> Moves:
    """Lay `plan` over the buckets of `manifest`."""
    index = {name: i for i, name in enumerate(plan.targets)}
    by_source: dict[str, list[Copy]] = {}
    for copy in plan.copies:
        by_source.setdefault(copy.source, []).append(copy)
    names = manifest.tensors.names
    sizes = manifest.tensors.sizes.tolist()
    tensors, offsets = manifest.piece_tensor.tolist(), manifest.piece_offset.tolist()
    nbytes = manifest.piece_nbytes.tolist()
    missing = list(sizes)
    buckets = []
    for bucket in range(manifest.buckets):
        moves: list[Move] = []
        cut: list[tuple[int, tuple[Move, ...]]] = []
        replayed: set[int] = set()
        left = False
        for piece in manifest.bucket_pieces(bucket):
            tensor = tensors[piece]
            missing[tensor] -= nbytes[piece]
            copies = by_source.get(names[tensor])
            if copies is None:
                left = True
                continue
            if missing[tensor]:
                continue
            replayed.add(tensor)
            if nbytes[piece] == sizes[tensor]:
                moves += [_move(copy, index[copy.target], offsets[piece]) for copy in copies]
            else:
                cut.append((tensor, _joined([_move(copy, index[copy.target], 0) for copy in copies])))
        buckets.append(BucketMoves(_joined(moves), tuple(cut), frozenset(replayed), left))
    return Moves(plan.targets, tuple(buckets))


def apply(moves: Iterable[Move], data: torch.Tensor, targets: Mapping[int, torch.Tensor]) -> None:
    """Carry out moves out of `data`, uint8 [n], contiguous. `targets` are keyed by their index in `Moves.targets`."""
    typed: dict[torch.dtype, torch.Tensor] = {}
    for move in moves:
        source = typed.get(move.source_dtype)
        if source is None:
            size = move.source_dtype.itemsize
            source = typed[move.source_dtype] = data[: data.numel() // size * size].view(move.source_dtype)
        strided_view(targets[move.target], move.target_box).copy_(strided_view(source, move.source_box))


def strided_view(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """Return a view of a box of a tensor's memory. The box's offset counts from where the tensor begins."""
    size = tensor.element_size()
    first = tensor.storage_offset() + box.offset // size
    return torch.as_strided(tensor, box.sizes, [stride // size for stride in box.strides], first)


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements in row-major order, uint8 [nbytes]. Copies only a strided tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _move(copy: Copy, target: int, by: int) -> Move:
    source, onto = copy.source_box, copy.target_box
    if copy.source_dtype == copy.dtype:
        source, onto = merge_dims(source, onto)
    return Move(target, source.shifted(by), copy.source_dtype, onto, copy.dtype)


def _joined(moves: Iterable[Move]) -> tuple[Move, ...]:
    """Join runs that follow one another on both sides. No two of the moves write the same byte."""
    found: list[Move] = []
    for move in sorted(moves, key=lambda m: (m.target, m.target_box.offset)):
        last = found[-1] if found else None
        if last is not None and last.flat and move.flat and _follows(last, move):
            size = move.dtype.itemsize
            count = _length(last) + _length(move)
            found[-1] = Move(
                move.target,
                Box(last.source_box.offset, (count,), (size,)),
                move.source_dtype,
                Box(last.target_box.offset, (count,), (size,)),
                move.dtype,
            )
        else:
            found.append(move)
    return tuple(found)


def _length(move: Move) -> int:
    return move.source_box.sizes[0] if move.source_box.sizes else 1


def _follows(last: Move, move: Move) -> bool:
    nbytes = _length(last) * last.dtype.itemsize
    return (
        (last.target, last.dtype) == (move.target, move.dtype)
        and last.source_box.offset + nbytes == move.source_box.offset
        and last.target_box.offset + nbytes == move.target_box.offset
    )
