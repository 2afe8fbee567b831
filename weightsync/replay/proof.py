"""Proves a load plan: compares its replay with what the loader does, bit for bit, while the loader still loads.

The moves go into scratch, and the loader loads as always. Once all its tensors have come, a target is compared after
each bucket until it is equal, and for the last time when the push ends: some loaders put a layer together first. A
target that was equal must still be equal at the end.

Scratch begins with filler bytes, so that a missing move shows even if the weights have not changed. Tensors that the
plan says are left alone must not have changed.
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

_NOBODYS = 0xA5  # filler


class Proof:
    """The proof of one push. `targets` holds the model's tensors as its kernels see them."""

    def __init__(self, plan: LoadPlan, moves: Moves, targets: Mapping[str, torch.Tensor], mover: Mover) -> None:
        self._mover = mover
        self._plan, self._moves, self._targets = plan, moves, targets
        self._missing = [0] * len(moves.targets)
        for bucket in moves.buckets:
            for move in (*bucket.moves, *(m for _, some in bucket.cut for m in some)):
                self._missing[move.target] += 1
        self._scratch: dict[int, torch.Tensor] = {}
        self._differ: dict[int, torch.Tensor] = {}
        self._equal: dict[int, int] = {}  # target → checksum of its replay, which it was equal to
        self._before = {name: tensor_checksum(targets[name]) for name in plan.untouched}

    def bucket(self, bucket: int, data: torch.Tensor, whole: Callable[[int], torch.Tensor]) -> None:
        """Replay and compare a bucket that the loader has loaded. `data` is its bytes.

        `whole` returns a tensor that the bucket completes.
        """
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
        """Return the targets that the plan got wrong, and how. If there are none, the plan is proved."""
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
        """Make scratch memory of a target's form, with the plan's fills in it."""
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
