"""Runs the GPU kernel on the CPU: `boxes.cu`, compiled by a C++ compiler, one thread at a time."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import weightsync.device

SOURCE = Path(next(iter(weightsync.device.__path__))) / "boxes.cu"
COMPILER = shutil.which("g++") or shutil.which("clang++")
HEAD = """
#define __device__
#define __global__
#define __launch_bounds__(...)
struct Index { unsigned x; };
static Index blockIdx{0}, blockDim{1}, gridDim{1}, threadIdx{0};
"""
TAIL = """
extern "C" void launch(
    const Item* items, u32 count, const u64* bases, u64 slot, u64* totals, u32 mode, u32 threads) {
  blockDim.x = threads;
  for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) boxes(items, count, bases, slot, totals, mode);
}
"""


@cache
def library(directory: Path) -> ctypes.CDLL:
    assert COMPILER is not None
    source, made = directory / "boxes.cc", directory / "boxes.so"
    source.write_text(HEAD + SOURCE.read_text() + TAIL)
    options = ["-O1", "-shared", "-fPIC", "-w", "-fsanitize=undefined", "-fno-sanitize-recover", "-std=c++17"]
    subprocess.run([COMPILER, *options, "-o", str(made), str(source)], check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(made))


def run(
    library: ctypes.CDLL, items: Any, bases: list[int], totals: int, mode: int, slot: int = 0, threads: int = 1
) -> list[int]:
    """Launch one block once, and return the sums. The copies are made in memory."""
    table = np.ascontiguousarray(items)
    addresses = np.array(bases or [0], dtype=np.uint64)
    sums = np.zeros(max(1, totals), dtype=np.uint64)
    library.launch(
        ctypes.c_void_p(table.ctypes.data),
        ctypes.c_uint32(len(table)),
        ctypes.c_void_p(addresses.ctypes.data),
        ctypes.c_uint64(slot),
        ctypes.c_void_p(sums.ctypes.data),
        ctypes.c_uint32(mode),
        ctypes.c_uint32(threads),
    )
    return [int(value) for value in sums]


class EmulatedKernel:
    """Stands for `weightsync.device.launch.BoxKernel`, on memory of this process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def table(self, items: Any) -> Any:
        return items

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
        count = 1 if totals is None else len(totals)
        sums = run(self._library, table, bases.tolist() if bases is not None else [], count, mode, slot)
        if totals is not None:
            totals += torch.from_numpy(np.array(sums, dtype=np.uint64).view(np.int64))
