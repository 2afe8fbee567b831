"""What one would write by hand: torch.distributed over gloo broadcasts every tensor to the engines, which load it.

Started with torchrun. The first --ranks processes are the trainer's: they put each tensor together (`full_tensor`)
where it is sharded, and rank 0 sends it, name after name in an order that all know. The others are engines' ranks, of
--tp each: they receive the tensor into new memory and copy what is theirs into their parameters, in the layout of the
reference engine. With --check, the trainer's ranks fingerprint what they hold and engines what lies in their parameters
in the end, and all of an engine's ranks must together have what was sent: what a push of weightsync checks too. Nothing
is paused, and one process that dies takes all with it. Writes rankN.json.
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
    """Raise unless every engine's boxes, each counted once, add up to what the trainer's ranks hold."""
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
    """The fingerprint of a box that lies in `tensor`."""
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
    """An engine's rank: parameters fused, stacked and split as the reference engine has them."""

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
        """Copy what is this rank's of a whole tensor into the parameters."""
        for one in self.slices.get(name, ()):
            self._place(one).copy_(tensor[tuple(map(slice, one.offset, _ends(one.offset, one.shape)))])

    def whole_places(self) -> dict[str, torch.Tensor]:
        """The tensors that lie whole in one parameter: the views of it that they are."""
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
