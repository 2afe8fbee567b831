"""The way that one would write by hand: torch.distributed broadcasts every tensor over gloo, and the engines load it.

Started with torchrun. The first --ranks processes are the trainer's. They gather each sharded tensor (`full_tensor`),
and rank 0 sends all tensors in an order that every process knows. The others are engines' ranks, --tp for each engine.
They receive a tensor into new memory and copy their slices into parameters, in the layout of the reference engine.

With --check, trainer ranks fingerprint their weights, and engines their parameters after loading. The fingerprints of
an engine's ranks must add up to the trainer's, as in a push of weightsync. Nothing is paused, and if one process dies,
all do. Writes rankN.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from bench import shapes
from bench.harness import peak_bytes
from bench.weights import change, shards, whole
from weightsync.adapters.reference.config import read_config
from weightsync.adapters.reference.sharding import Slice, rank_layout
from weightsync.fingerprint import combine, fingerprint

if TYPE_CHECKING:
    from bench.shapes import Model

Box = tuple[str, tuple[int, ...], tuple[int, ...]]  # tensor, offset, shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--config", required=True, help="folder of config.json")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--pushes", type=int, required=True)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world, ranks = dist.get_rank(), dist.get_world_size(), arguments.ranks
    mesh = DeviceMesh("cpu", torch.arange(ranks)) if ranks > 1 else None  # all processes make it together
    group = dist.new_group([0, *range(ranks, world)])
    model = shapes.load(arguments.shape)
    if rank < ranks:
        side: Trainer | Engine = Trainer(model, mesh, group)
    else:
        side = Engine(model, arguments.config, arguments.tp, (rank - ranks) % arguments.tp, group)
    rows = []
    for _ in range(arguments.pushes):
        side.prepare()
        dist.barrier()
        start = time.perf_counter()
        side.transfer()
        transferred = time.perf_counter() - start
        sums: dict[Box, int] = side.sums() if arguments.check else {}
        told: list[Any] = [None] * world
        if arguments.check:
            dist.all_gather_object(told, sums)
            compare(told, ranks, arguments.tp)
        dist.barrier()
        rows.append({"transfer": transferred, "wall": time.perf_counter() - start})
    (arguments.out / f"rank{rank}.json").write_text(json.dumps({"pushes": rows, "peak_bytes": peak_bytes()}))
    dist.barrier()
    dist.destroy_process_group()


def compare(told: list[dict[Box, int]], ranks: int, tp: int) -> None:
    """Raise unless every engine's boxes, each counted once, add up to the boxes of the trainer's ranks."""
    parts: dict[str, list[int]] = {}
    for one in told[:ranks]:
        for (name, _, _), value in one.items():
            parts.setdefault(name, []).append(value)
    sent = {name: combine(values) for name, values in parts.items()}
    for first in range(ranks, len(told), tp):
        boxes: dict[Box, int] = {}
        for one in told[first : first + tp]:
            for box, value in one.items():
                if boxes.setdefault(box, value) != value:
                    raise RuntimeError(f"two ranks of one engine differ in {box}")
        held: dict[str, list[int]] = {}
        for (name, _, _), value in boxes.items():
            held.setdefault(name, []).append(value)
        if wrong := [name for name, value in sent.items() if combine(held.get(name, [])) != value]:
            raise RuntimeError(f"{len(wrong)} tensors arrived wrong, {wrong[0]} first")


def summed(tensor: torch.Tensor, box: Box, of: tuple[int, ...]) -> int:
    """Return the fingerprint of a box that lies in `tensor`."""
    _, offset, shape = box
    data = tensor.view(torch.uint8).numpy()
    return fingerprint(data, itemsize=tensor.element_size(), global_shape=of, offset=offset, shape=shape)


class Trainer:
    """A trainer rank."""

    def __init__(self, model: Model, mesh: DeviceMesh | None, group: Any) -> None:
        self.weights = whole(model) if mesh is None else shards(model, mesh)
        self.group, self.sender = group, dist.get_rank() == 0
        self._sums: dict[Box, int] = {}
        self._sent: list[tuple[str, torch.Tensor]] = []

    def prepare(self) -> None:
        change(self.weights)

    def transfer(self) -> None:
        for tensor in self.weights.values():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.sender:
                dist.broadcast(full, 0, group=self.group)

    def sums(self) -> dict[Box, int]:
        found: dict[Box, int] = {}
        for name, tensor in self.weights.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            rows = -(-tensor.shape[0] // (tensor.device_mesh.size() if isinstance(tensor, DTensor) else 1))
            shape = tuple(tensor.shape)
            box = (name, (min(shape[0], rows * dist.get_rank()), *(0 for _ in shape[1:])), tuple(local.shape))
            found[box] = summed(local, box, shape)
        return found


class Engine:
    """An engine's rank, with parameters fused, stacked and split as in the reference engine."""

    def __init__(self, model: Model, config: str, tp: int, tp_rank: int, group: Any) -> None:
        layout = rank_layout(read_config(config), tp, tp_rank)
        dtype = {name: getattr(torch, tensor.dtype) for name, tensor in model.tensors.items()}
        of = {one.param: dtype[name] for name, boxes in layout.slices.items() for one in boxes}
        self.params = {name: torch.zeros(shape, dtype=of[name]) for name, shape in layout.params.items()}
        self.slices, self.model, self.dtype, self.group = layout.slices, model, dtype, group

    def prepare(self) -> None:
        pass

    def transfer(self) -> None:
        for name, (shape, _) in self.model.tensors.items():
            received = torch.empty(shape, dtype=self.dtype[name])
            dist.broadcast(received, 0, group=self.group)
            self.load(name, received)

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Copy this rank's slices of a whole tensor into the parameters."""
        for one in self.slices.get(name, ()):
            self._place(one).copy_(tensor[tuple(map(slice, one.offset, _ends(one.offset, one.shape)))])

    def whole_places(self) -> dict[str, torch.Tensor]:
        """Return a view of a parameter for each tensor that lies whole in it."""
        alone = {name: boxes[0] for name, boxes in self.slices.items() if len(boxes) == 1}
        of = {name: tuple(tensor.shape) for name, tensor in self.model.tensors.items()}
        return {name: self._place(one) for name, one in alone.items() if tuple(one.shape) == of[name]}

    def sums(self) -> dict[Box, int]:
        found: dict[Box, int] = {}
        for name, boxes in self.slices.items():
            for one in boxes:
                box = (name, one.offset, one.shape)
                found[box] = summed(self._place(one), box, self.model.tensors[name].shape)
        return found

    def _place(self, one: Slice) -> torch.Tensor:
        param = self.params[one.param]
        if len(one.at) > len(one.shape):  # an expert of a stack
            param = param[one.at[0]]
        at = one.at[len(one.at) - len(one.shape) :]
        return param[tuple(map(slice, at, _ends(at, one.shape)))]


def _ends(offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(o + s for o, s in zip(offset, shape, strict=True))


if __name__ == "__main__":
    main()
