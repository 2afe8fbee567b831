"""For tests of what trainer ranks hold: a model, what a rank writes down of its weights, and putting that together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from tests.plan_kit import filled, read_back
from weightsync.plan.buckets import Plan, plan_push
from weightsync.plan.manifest import Layout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightsync.sources import Source

ROOT = Path(__file__).parents[2]


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)
        self.scale = nn.Parameter(torch.rand(1))  # one element: only one rank holds it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = x + self.scale * self.down(self.up(x).relu())
        return changed


class Model(nn.Module):
    def __init__(self, width: int = 6, inner: int = 10, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.layers = nn.ModuleList(Block(width, inner) for _ in range(2))
        self.head = nn.Linear(width, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(x)
        return logits


def raw(tensor: torch.Tensor) -> np.ndarray:
    """The elements of a tensor as unsigned integers."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(f"u{tensor.itemsize}").reshape(tuple(tensor.shape))


def record(directory: Path, case: str, rank: int, source: Source) -> None:
    """Write a rank's layout and shards."""
    layout = source.layout()
    arrays: dict[str, Any] = {}
    for i in range(len(layout)):
        shard = layout.shard(i)
        out = torch.zeros(shard.shape, dtype=getattr(torch, shard.dtype))
        none = (0,) * out.dim()
        source.read_into(i, none, shard.shape, out)
        data = source.box_bytes(i, none, shard.shape)
        assert data is None or data.tobytes() == raw(out).tobytes(), shard
        arrays[f"shard{i}"] = raw(out)
    (directory / f"{case}.{rank}.layout").write_bytes(layout.pack())
    np.savez(directory / f"{case}.{rank}.npz", **arrays)


def record_whole(directory: Path, case: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write what all ranks' shards must make up."""
    whole: dict[str, Any] = {name: raw(tensor) for name, tensor in tensors.items()}
    np.savez(directory / f"{case}.whole.npz", **whole)


def put_together(directory: Path, case: str, world: int) -> tuple[Plan, list[Layout]]:
    """Plan the case, fill buckets from what its ranks wrote, compare with the whole tensors."""
    layouts = [Layout.unpack((directory / f"{case}.{rank}.layout").read_bytes()) for rank in range(world)]
    shards = []
    for rank, layout in enumerate(layouts):
        with np.load(directory / f"{case}.{rank}.npz") as arrays:
            shards.append([arrays[f"shard{i}"] for i in range(len(layout))])
    plan = plan_push(layouts, slot_bytes=512, owners=world, alignment=16)
    back = read_back(plan.manifest, filled(plan, layouts, shards))
    aliases = dict(plan.manifest.tensors.aliases)
    with np.load(directory / f"{case}.whole.npz") as whole:
        assert {*back, *aliases} == {*whole.files, *aliases}, case
        for name in whole.files:
            np.testing.assert_array_equal(back[aliases.get(name, name)], whole[name], err_msg=f"{case}: {name}")
    return plan, layouts


def run_ranks(script: str, *arguments: str, torchrun: int = 0) -> None:
    """Run a script of this folder, by `torchrun` on so many ranks, or by itself. It has to end well."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"] if torchrun else []
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests/unit" / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=140,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'daemon'}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
