"""Check that an engine's memory holds what the trainer sent, by arithmetic over fingerprints.

The trainer's ranks fingerprint the parts they send; parts add up to whole tensors. The engine's ranks fingerprint the
boxes they hold; boxes that tile a tensor add up to the same number exactly when every byte is in its place. Ranks that
hold the same box (replicated norms, shared KV heads) must agree, and count once.

The boxes of a rank depend only on the manifest, so they are reported, checked and sorted once. After that, each push
brings eight bytes for each box, and costs the daemon a few passes over an array.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from weightsync.errors import EngineError
from weightsync.plan.boxes import Ints, measure

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from weightsync.plan.boxes import Words
    from weightsync.plan.residents import ResidentBoxes
    from weightsync.plan.table import TensorTable

__all__ = ["Verifier"]


class Verifier:
    """Compares what one engine's ranks hold of a manifest's tensors with what was sent, for any number of pushes."""

    def __init__(self, ranks: Sequence[ResidentBoxes], tensors: TensorTable, *, parts: bool = False) -> None:
        """`ranks` is in the order of tp_rank. Tensors that no rank holds are not compared.

        Raises `EngineError` naming the first tensor that the boxes shown do not tile. With `parts`, such a tensor is
        left out instead, and so is a tensor of which a rank has more than it shows (`unseen`).
        """
        self._tensors = tensors
        self._counts = [len(rank) for rank in ranks]
        unseen = sorted({tensor for rank in ranks for tensor in rank.unseen})
        tensor = np.concatenate([np.empty(0, np.int32), *(rank.tensor for rank in ranks)])
        none = np.empty((0, tensors.width), np.int64)
        offset = np.concatenate([none, *(rank.offset for rank in ranks)])
        shape = np.concatenate([none, *(rank.shape for rank in ranks)])
        self._tensor, self._offset, self._shape = tensor, offset, shape
        # Rows sorted by tensor, then by box; rows of equal boxes stay in the order of ranks.
        order = np.lexsort([*shape.T, *offset.T, tensor])
        begins = np.ones(len(order), dtype=np.bool_)
        rows = np.column_stack([tensor, offset, shape])[order]
        begins[1:] = (rows[1:] != rows[:-1]).any(axis=1)
        box = np.cumsum(begins) - 1
        self._boxes = order[begins]  # one row for each distinct box
        self._copies = order[~begins]  # the other rows: replicas …
        self._originals = self._boxes[box[~begins]]  # … and for each of these the row that it replicates
        self._shown, self._first = np.unique(tensor[self._boxes], return_index=True)  # tensors, and their first boxes
        wrong, held = self._untiled()
        if parts:
            left_out = np.concatenate([self._shown[wrong], np.array(unseen, dtype=np.int32)])
            self._boxes = self._boxes[~np.isin(tensor[self._boxes], left_out)]
            self._shown, self._first = np.unique(tensor[self._boxes], return_index=True)
        elif wrong.any():
            self._tell_untiled(int(np.argmax(wrong)), held)

    def compare(self, fingerprints: Sequence[bytes], expected: Words) -> int:
        """Compare all tensors, and return how many there were.

        `fingerprints[tp_rank]` are little-endian uint64, one for each of the rank's boxes; `expected[i]` is the
        fingerprint of tensor i of the manifest. Raises `EngineError` naming the first tensor whose replicas differ, or
        that differs from what was sent.
        """
        values = self._values(fingerprints)
        differ = values[self._copies] != values[self._originals]
        if differ.any():
            self._tell_replicas(np.flatnonzero(differ))
        if not len(self._shown):
            return 0
        got, want = np.add.reduceat(values[self._boxes], self._first), expected[self._shown]
        wrong = got != want
        if wrong.any():
            at = int(np.argmax(wrong))
            raise EngineError(
                f"{self._name(self._shown[at])} in the engine differs from what the trainer sent "
                f"(fingerprint {int(got[at]):016x}, not {int(want[at]):016x})",
                phase="verify",
            )
        return len(self._shown)

    def _values(self, fingerprints: Sequence[bytes]) -> Words:
        if len(fingerprints) != len(self._counts):
            raise EngineError(f"{len(fingerprints)} of the engine's {len(self._counts)} ranks answered", phase="verify")
        for rank, (data, count) in enumerate(zip(fingerprints, self._counts, strict=True)):
            if len(data) != 8 * count:
                raise EngineError(
                    f"tp rank {rank} holds {count} boxes and sent {len(data)} bytes of fingerprints, not {8 * count}",
                    phase="verify",
                )
        return np.frombuffer(b"".join(fingerprints), dtype="<u8")

    def _untiled(self) -> tuple[npt.NDArray[np.bool_], Ints]:
        """Say for each tensor shown whether its boxes fail to tile it, and how many elements its boxes have in all."""
        if not len(self._shown):
            return np.empty(0, dtype=np.bool_), np.empty(0, dtype=np.int64)
        tensor, offset, shape = (column[self._boxes] for column in (self._tensor, self._offset, self._shape))
        dims = self._tensors.dims
        held = np.add.reduceat(shape.prod(axis=1, dtype=np.int64), self._first)
        whole = self._tensors.numels[self._shown]
        weight = np.add.reduceat(measure(offset, shape, dims[tensor]), self._first)
        tiled = weight == measure(np.zeros_like(dims), dims, dims)[self._shown]
        return (held != whole) | ~tiled, held

    def _tell_untiled(self, at: int, held: Ints) -> None:
        name, whole = self._name(self._shown[at]), self._tensors.numels[self._shown[at]]
        if held[at] == whole:
            raise EngineError(f"boxes that the engine's ranks hold of {name} overlap", phase="verify")
        raise EngineError(f"the engine's ranks hold {held[at]} of the {whole} elements of {name}", phase="verify")

    def _tell_replicas(self, differ: Ints) -> None:
        """Raise the `EngineError` for the first of these copies, which are in the order of tensors and boxes."""
        copy, original = int(self._copies[differ[0]]), int(self._originals[differ[0]])
        first, second = np.searchsorted(np.cumsum(self._counts), [original, copy], side="right").tolist()
        ndim = int(self._tensors.ndims[self._tensor[copy]])
        who = f"tp ranks {first} and {second} hold" if first != second else f"tp rank {first} holds twice, with"
        raise EngineError(
            f"{who} different bytes of {self._name(self._tensor[copy])}, "
            f"box {self._shape[copy, :ndim].tolist()} at {self._offset[copy, :ndim].tolist()}",
            phase="verify",
        )

    def _name(self, tensor: np.int32) -> str:
        return repr(self._tensors.names[int(tensor)])
