"""torchstore: the trainer puts its state dict into a store, and engines get it from there. All are monarch actors.

The script is the controller of the job, as monarch requires. It spawns the store's volume, the trainer and each rank of
each engine as separate processes. An engine's rank gets whole tensors, in the layout of the reference engine; a tensor
that lies whole in a parameter is read straight into it. Nothing is checked during the measurement. After the last push,
the engines' weights are compared as in peer_broadcast. Writes rank0.json.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import inspect
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torchstore
from monarch.actor import Actor, current_rank, endpoint
from torchstore.controller import Controller
from torchstore.transport.buffers import rdma_available
from torchstore.utils import spawn_actors

from bench import peer_broadcast, shapes
from bench.harness import peak_bytes
from bench.weights import change, whole

if TYPE_CHECKING:
    from collections.abc import Callable

_KEY = "weights"  # the same for every push: the store replaces the last one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--config", required=True, help="folder of config.json")
    parser.add_argument("--engines", type=int, required=True)
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--pushes", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    make_async()
    asyncio.run(push(arguments))


def make_async() -> None:
    """Make the plain methods of torchstore 0.1.2's controller async.

    Torchmonarch after 0.1 refuses actors that have plain and async methods. The methods do the same as before. Every
    process that names the controller needs this.
    """
    for name in dir(Controller):
        method = getattr(getattr(Controller, name), "_method", None)  # the function that an endpoint wraps
        if method is not None and not inspect.iscoroutinefunction(method):
            setattr(Controller, name, endpoint(_awaited(method)))


def _awaited(method: Callable[..., Any]) -> Any:
    @functools.wraps(method)
    async def call(*args: Any, **more: Any) -> Any:
        return method(*args, **more)

    return call


async def push(arguments: argparse.Namespace) -> None:
    """Make all pushes, and write the figures."""
    await torchstore.initialize()
    trainer = await spawn_actors(1, Trainer, "trainer", shape=arguments.shape)
    engines = await spawn_actors(
        arguments.engines * arguments.tp,
        Engine,
        "engines",
        shape=arguments.shape,
        config=arguments.config,
        tp=arguments.tp,
    )
    await engines.ready.call()
    rows = []
    for _ in range(arguments.pushes):
        await trainer.prepare.call_one()
        start = time.perf_counter()
        put = await trainer.put.call_one()
        got = [seconds for _, seconds in await engines.get.call()]
        rows.append({"wall": time.perf_counter() - start, "put": put, "get": max(got)})
    sent, held = await trainer.told.call_one(), [told for _, told in await engines.told.call()]
    peer_broadcast.compare([one["sums"] for one in (sent, *held)], 1, arguments.tp)
    known = {one["pid"] for one in (sent, *held)}
    others = [child.pid for child in psutil.Process().children(recursive=True) if child.pid not in known]
    found = {
        "pushes": rows,
        "software": f"torchstore {version('torchstore')} on torchmonarch {version('torchmonarch')}, all methods of its "
        f"controller async; one volume, {'RDMA' if rdma_available() else 'no RDMA: by messages of actors'}",
        "peak": {
            "trainer rank": sent["peak"],
            "store": max(map(peak_bytes, others), default=0),
            "engine rank": max(one["peak"] for one in held),
        },
    }
    (arguments.out / "rank0.json").write_text(json.dumps(found))
    await torchstore.shutdown()


class Trainer(Actor):
    """The trainer's only rank."""

    def __init__(self, shape: str) -> None:
        make_async()
        torch.set_num_threads(1)
        self.weights = whole(shapes.load(shape))

    @endpoint
    async def prepare(self) -> None:
        change(self.weights)

    @endpoint
    async def put(self) -> float:
        start = time.perf_counter()
        await torchstore.put_state_dict(self.weights, _KEY)
        return time.perf_counter() - start

    @endpoint
    async def told(self) -> dict[str, Any]:
        peak, sums = peak_bytes(), {}
        for name, tensor in self.weights.items():
            box = (name, (0,) * tensor.dim(), tuple(tensor.shape))
            sums[box] = peer_broadcast.summed(tensor, box, tuple(tensor.shape))
        return {"pid": os.getpid(), "peak": peak, "sums": sums}


class Engine(Actor):
    """An engine's rank."""

    def __init__(self, shape: str, config: str, tp: int) -> None:
        make_async()
        torch.set_num_threads(1)
        self.side = peer_broadcast.Engine(shapes.load(shape), config, tp, current_rank().rank % tp, None)
        self.places = self.side.whole_places()

    @endpoint
    async def ready(self) -> None:
        """Answer once the actor has its parameters."""

    @endpoint
    async def get(self) -> float:
        start = time.perf_counter()
        got = await torchstore.get_state_dict(_KEY, self.places, strict=False)
        for name in got.keys() - self.places.keys():
            self.side.load(name, got[name])
        return time.perf_counter() - start

    @endpoint
    async def told(self) -> dict[str, Any]:
        peak = peak_bytes()
        return {"pid": os.getpid(), "peak": peak, "sums": self.side.sums()}


if __name__ == "__main__":
    from bench import peer_torchstore  # other processes find the actors by this module's name, not by __main__

    peer_torchstore.main()
