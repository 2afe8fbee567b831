"""Is a load plan what the loader does? Compared bit for bit during a push that the loader still loads.

The moves are carried out into scratch, the loader loads as always, and a target whose tensors have all come is compared
at once where it is equal, and at the end of the push where it is not yet: some loaders put a layer together first.
What was equal must still be so at the end.
Scratch begins with bytes that nobody sends, so a move that is missing shows even where the weights have not changed.
Tensors that the plan says are left alone must be found as they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from weightsync.replay.moves import raw_bytes, strided_view
from weightsync.replay.sums import tensor_checksum

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from weightsync.replay.kernel import Mover
    from weightsync.replay.moves import Moves
    from weightsync.replay.plan import LoadPlan

__all__ = ["Proof"]

_NOBODYS = 0xA5


class Proof:
    """One push. `targets` holds the model's tensors as its kernels see them."""

    def __init__(self, plan: LoadPlan, moves: Moves, targets: Mapping[str, torch.Tensor], mover: Mover) -> None:
        self._mover = mover
        self._plan, self._moves, self._targets = plan, moves, targets
        self._missing = [0] * len(moves.targets)
        for bucket in moves.buckets:
            for move in (*bucket.moves, *(m for _, some in bucket.cut for m in some)):
                self._missing[move.target] += 1
        self._scratch: dict[int, torch.Tensor] = {}
        self._differ: dict[int, torch.Tensor] = {}
        self._equal: dict[int, int] = {}  # target → checksum of what it was equal with
        self._before = {name: tensor_checksum(targets[name]) for name in plan.untouched}

    def bucket(self, bucket: int, data: torch.Tensor, whole: Callable[[int], torch.Tensor]) -> None:
        """The loader has loaded this bucket, whose bytes `data` are; `whole` gives a tensor that it completed."""
        here = self._moves.buckets[bucket]
        parts = [(-1, data, here.moves), *((tensor, raw_bytes(whole(tensor)), moves) for tensor, moves in here.cut)]
        done = []
        for move in (move for _, _, moves in parts for move in moves):
            if move.target not in self._scratch:
                self._scratch[move.target] = self._empty(move.target)
            self._missing[move.target] -= 1
            if not self._missing[move.target]:
                done.append(move.target)
        carry = self._mover.onto(self._scratch)
        for tensor, source, moves in parts:
            carry((bucket, tensor), moves, source, 1)
        self._differ |= {target: self._scratch.pop(target) for target in done}
        for target in [t for t, made in self._differ.items() if self._first_difference(t, made) is None]:
            self._equal[target] = tensor_checksum(self._differ.pop(target))

    def finish(self) -> dict[str, str]:
        """The targets that the plan got wrong, and how. Empty: it is proved."""
        wrong = {}
        for target, made in (*self._differ.items(), *self._scratch.items()):
            at = self._first_difference(target, made)
            if at is not None:
                wrong[self._moves.targets[target]] = f"its replay differs from what the loader made, first in byte {at}"
        for target, equal in self._equal.items():
            name = self._moves.targets[target]
            if tensor_checksum(self._targets[name]) != equal:
                wrong[name] = "it is changed after its tensors were loaded"
        for name, before in self._before.items():
            if tensor_checksum(self._targets[name]) != before:
                why = f"the loader changes {name}, and was not seen to: it may do more that was not"
                wrong |= dict.fromkeys(self._plan.targets, why)
        self._scratch.clear()
        self._differ.clear()
        return wrong

    def _empty(self, target: int) -> torch.Tensor:
        """Memory like a target's, with what it is filled with."""
        name = self._moves.targets[target]
        real = self._targets[name]
        made = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=real.device)
        memory = torch.empty(0, dtype=torch.uint8, device=real.device).set_(made.untyped_storage())
        memory.fill_(_NOBODYS)
        for fill in self._plan.fills:
            if fill.target == name:
                strided_view(made, fill.box).fill_(fill.value)
        return made

    def _first_difference(self, target: int, made: torch.Tensor) -> int | None:
        one, other = raw_bytes(made), raw_bytes(self._targets[self._moves.targets[target]])
        if torch.equal(one, other):
            return None
        return int(torch.nonzero(one != other)[0])
