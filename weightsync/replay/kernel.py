"""Carries out moves: on a CPU by a loop, on a GPU by one launch for each bucket over a table that stays there.

The kernel is that of `weightsync.device`. Moves that it cannot convert, or whose target lies elsewhere, go through
torch one by one, as on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch

from weightsync.device.launch import COPY, BoxKernel
from weightsync.device.table import BYTES, F32_TO_BF16, SLOT, Place, box_items, joined
from weightsync.replay.moves import Move, apply

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightsync.device.table import Items

__all__ = ["Carry", "HostMoves", "KernelMoves", "Launcher", "Mover", "move_items", "mover_for"]

Carry: TypeAlias = Callable[[Hashable, Sequence[Move], torch.Tensor, int], None]
"""`carry(key, moves, data, share)`: carry out `moves` out of `data`; see `moves.apply`. Equal keys mean equal moves.
`share` calls run side by side, each on its own stream.
"""


class Mover(Protocol):
    """Carries out the moves of one plan."""

    def onto(self, targets: Mapping[int, torch.Tensor]) -> Carry:
        """Return a function that carries out one push's moves onto these tensors. Moves name a target by its number.

        The tensors must stay where they are while the function is used.
        """


class HostMoves:
    """Moves in host memory, or wherever torch reaches."""

    def onto(self, targets: Mapping[int, torch.Tensor]) -> Carry:
        """See `Mover`."""
        return lambda _key, moves, data, _share: apply(moves, data, targets)


class Launcher(Protocol):
    """The interface of `weightsync.device.launch.BoxKernel`."""

    def table(self, items: Items) -> Any:
        """Put the items where the kernel reads them."""

    def launch(
        self,
        table: Any,
        mode: int,
        *,
        stream: Any,
        bases: torch.Tensor | None = None,
        slot: int = 0,
        totals: torch.Tensor | None = None,
        share: int = 1,
    ) -> None:
        """Work on the whole table; returns at once."""


class KernelMoves:
    """Moves on the GPU `device`, on its current stream."""

    def __init__(self, kernel: Launcher, device: torch.device) -> None:
        self._kernel, self._device = kernel, device
        self._tables: dict[Hashable, tuple[Any, tuple[Move, ...]]] = {}  # … and the moves that are left for torch
        self._bases: dict[tuple[int, ...], torch.Tensor] = {}  # the latest one, because uploading it waits for the GPU

    def onto(self, targets: Mapping[int, torch.Tensor]) -> Carry:
        """See `Mover`."""
        addresses = tuple(targets[i].data_ptr() if i in targets else 0 for i in range(max(targets, default=-1) + 1))
        bases = self._bases.get(addresses)
        if bases is None:
            bases = torch.tensor(addresses, dtype=torch.int64, device=self._device)
            self._bases = {addresses: bases}

        def carry(key: Hashable, moves: Sequence[Move], data: torch.Tensor, share: int) -> None:
            table, left = self._table(key, moves, targets)
            stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
            self._kernel.launch(table, COPY, stream=stream, bases=bases, slot=data.data_ptr(), share=share)
            apply(left, data, targets)

        return carry

    def _table(
        self, key: Hashable, moves: Sequence[Move], targets: Mapping[int, torch.Tensor]
    ) -> tuple[Any, tuple[Move, ...]]:
        found = self._tables.get(key)
        if found is None:
            here = {i for i, target in targets.items() if target.device == self._device}
            items = [(move, move_items(move) if move.target in here else None) for move in moves]
            table = self._kernel.table(joined([some for _, some in items if some is not None]))
            found = self._tables[key] = table, tuple(move for move, some in items if some is None)
        return found


def mover_for(device: torch.device) -> Mover:
    """Make the mover for weights on `device`. Raises cupy's errors if the kernel cannot be compiled."""
    return KernelMoves(BoxKernel(device), device) if device.type == "cuda" else HostMoves()


def move_items(move: Move) -> Items | None:
    """Return the items of one move from the slot into a target; targets are bases.

    Returns None for a conversion that the kernel cannot make.
    """
    if move.source_dtype == move.dtype:
        op = BYTES
    elif (move.source_dtype, move.dtype) == (torch.float32, torch.bfloat16):
        op = F32_TO_BF16
    else:
        return None
    sizes = move.source_box.sizes or (1,)
    source, target = (box.strides or (0,) for box in (move.source_box, move.target_box))
    return box_items(
        sizes,
        move.dtype.itemsize,
        Place(SLOT, move.source_box.offset, source),
        Place(move.target, move.target_box.offset, target),
        tensor_shape=sizes,
        offset=(0,) * len(sizes),
        op=op,
    )
