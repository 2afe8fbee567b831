"""Is what lies in an engine what the trainer sent? Pure arithmetic over fingerprints.

The trainer's ranks fingerprint the parts they send; parts add up to whole tensors. The engine's ranks fingerprint the
boxes they hold; boxes that tile a tensor add up to the same number exactly when every byte is in its place. Ranks that
hold the same box (replicated norms, shared KV heads) must agree, and count once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightsync.errors import EngineError
from weightsync.fingerprint import combine

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from weightsync.adapters.base import Resident
    from weightsync.plan.manifest import Manifest

__all__ = ["compare"]


def compare(residents: Sequence[Resident], manifest: Manifest, expected: npt.NDArray[np.uint64]) -> int:
    """How many tensors were compared, all of them equal. `expected[i]` is the fingerprint of `manifest.tensors` i.

    Raises `EngineError` naming the first tensor that differs, whose replicas differ, or of which elements are missing.
    Tensors of the manifest that the engine does not show at all are not counted.
    """
    index = manifest.tensors.index
    shown: dict[int, dict[tuple[tuple[int, ...], tuple[int, ...]], Resident]] = {}
    for resident in residents:
        tensor = index.get(resident.name)
        if tensor is None:
            continue
        box = shown.setdefault(tensor, {})
        first = box.setdefault((resident.offset, resident.shape), resident)
        if first.fingerprint != resident.fingerprint:
            raise EngineError(
                f"tp ranks {first.tp_rank} and {resident.tp_rank} hold different bytes of {resident.name!r}, "
                f"box {list(resident.shape)} at {list(resident.offset)}",
                phase="verify",
            )
    for tensor, boxes in sorted(shown.items()):
        name = manifest.tensors.names[tensor]
        held = sum(math.prod(shape) for _, shape in boxes)
        whole = manifest.tensors.numel(tensor)
        if held != whole:
            raise EngineError(f"its ranks hold {held} of the {whole} elements of {name!r}", phase="verify")
        got, want = combine(r.fingerprint for r in boxes.values()), int(expected[tensor])
        if got != want:
            raise EngineError(
                f"{name!r} in the engine differs from what the trainer sent (fingerprint {got:016x}, not {want:016x})",
                phase="verify",
            )
    return len(shown)
