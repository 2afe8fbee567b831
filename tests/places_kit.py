"""Writes a test's tensors into the places that an engine's workers show, as bridges of their node do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from tests.hand_push import Tensors, soon
from weightsync.drawing.host import HostCopies
from weightsync.ipc.regions import RegionMap
from weightsync.plan.boxes import packed_strides
from weightsync.plan.draws import Draw
from weightsync.plan.exposure import Exposure
from weightsync.plan.manifest import Manifest

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["write", "write_elsewhere"]

_ROOT = Path(__file__).resolve().parents[1]


class _Job(msgspec.Struct):
    ranks: list[bytes]
    manifest: bytes
    tensors: Tensors
    gpu: int | None


def write(ranks: Sequence[bytes], manifest: Manifest, tensors: Tensors, gpu: int | None = None) -> None:
    """Fill all places of these ranks, given as packed exposures, with their boxes of whole tensors.

    On a GPU our kernel makes the copies, in host memory numpy does.
    """
    table = manifest.tensors
    shown = [Exposure.unpack(rank, table) for rank in ranks]
    copies, first = [], 0
    for one in shown:
        for part in one.parts(table):
            itemsize, shape = int(table.itemsizes[part.tensor]), table.shapes[part.tensor]
            strides = packed_strides(shape, itemsize)
            begin = sum(at * step for at, step in zip(part.offset, strides, strict=True))
            onto = (first + part.region, part.at, part.strides)
            copies.append(Draw(0, part.tensor, begin, strides, *onto, part.shape, itemsize))
        first += len(one.regions)
    sources = [np.frombuffer(tensors[name][2], dtype=np.uint8) for name in table.names]
    regions = RegionMap(gpu, writable=True)
    with regions.mapped(shown) as begins:
        targets = np.concatenate([*begins, np.zeros(0, dtype=np.int64)]).tolist()
        if gpu is None:
            addresses = np.array([source.ctypes.data for source in sources], dtype=np.int64)
            HostCopies(copies).run(targets, [addresses], deadline=soon())
        else:
            _write_on(gpu, copies, sources, targets)
    regions.release()


def _write_on(gpu: int, copies: list[Draw], sources: list[np.ndarray], targets: list[int]) -> None:
    import torch

    from weightsync.drawing.device import DeviceCopies

    torch.cuda.set_device(gpu)
    held = [torch.from_numpy(source.copy()).cuda() for source in sources]
    addresses = np.array([one.data_ptr() for one in held], dtype=np.int64)
    DeviceCopies.on(gpu, copies).run(targets, [addresses], deadline=soon())


def write_elsewhere(ranks: Sequence[bytes], manifest: Manifest, tensors: Tensors, gpu: int | None = None) -> None:
    """Do the same in another process."""
    job = msgspec.msgpack.encode(_Job(list(ranks), manifest.pack(), tensors, gpu))
    done = subprocess.run(
        [sys.executable, "-m", "tests.places_kit"], input=job, cwd=_ROOT, capture_output=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


if __name__ == "__main__":
    told = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=_Job)
    write(told.ranks, Manifest.unpack(told.manifest), told.tensors, told.gpu)
