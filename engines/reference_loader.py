"""The reference engine's parameters of one rank, loaded as engines load: a copy into a slice for each tensor.

A process of its own, because checkpoint-engine sends CUDA IPC handles, which a process cannot open that made them.
"""

from __future__ import annotations

import multiprocessing
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
import zmq
from checkpoint_engine.worker import update_weights_from_ipc

from weightsync.adapters.reference.config import read_config
from weightsync.adapters.reference.parallel import place_of
from weightsync.adapters.reference.sharding import dtype_of, rank_layout

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["ReferenceLoader"]


class ReferenceLoader:
    """The end of a trainer's rank."""

    def __init__(self, model: str, tp_size: int, tp_rank: int, *, wait: float) -> None:
        self._wait = wait
        spawning = multiprocessing.get_context("spawn")
        self._pipe, there = spawning.Pipe()
        spawning.Process(target=_serve, args=(there, model, tp_size, tp_rank), daemon=True).start()
        there.close()
        self._answer()

    def load(self, sockets: list[str]) -> None:
        """Load one update, from this rank's of all ranks' sockets. Returns when all of it is loaded."""
        self._pipe.send(sockets)
        self._answer()

    def _answer(self) -> None:
        if not self._pipe.poll(self._wait):
            raise TimeoutError(f"no answer in {self._wait:g} s")
        self._pipe.recv()


def _serve(pipe: Connection, model: str, tp_size: int, tp_rank: int) -> None:
    torch.cuda.set_device(tp_rank)
    config = read_config(model)
    layout = rank_layout(config, tp_size, tp_rank)
    params = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype_of(config, name)), device="cuda")
        for name, shape in layout.params.items()
    }

    def load(tensors: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            for box in layout.slices.get(name, ()):
                held: Any = tensor[tuple(slice(at, at + size) for at, size in zip(box.offset, box.shape, strict=True))]
                place_of(box, params).copy_(held)

    context = zmq.Context()
    pipe.send(None)
    with suppress(EOFError):  # the trainer's rank has ended
        while True:
            sockets = pipe.recv()
            update_weights_from_ipc(context, sockets[tp_rank], tp_rank, run=load)
            pipe.send(None)
