"""A trainer whose ranks do as they are told, and stop where they are told: `python trainer.py SOCKET`.

This process loads torch once and forks one rank for each connection to SOCKET, so that a rank costs milliseconds. Rank
and test speak lines of JSON. After its first line, the rank's pid, a rank takes one push after another:

    → {"endpoint", "version", "checkpoint", "rank", "world", …}    the terms; see `_push`
    ← {"at": "read"}          it has reached the gate that the terms ordered, and waits there
    → {}                      go on
    ← {"report": …}, {"error": …} or {"interrupted": true}

A rank holds every tensor of the checkpoint whose index, modulo the world, is its own; where the terms name a "device"
that is a GPU, there, and from push to push at the same place. A gate called "fill" is like "read", but on a GPU it is
the GPU that stands still, for a while: the rank goes on, and what it has asked to be written into a slot is not
written yet.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import socket
import sys
import time
from typing import Any

import torch
from safetensors.torch import load_file

import weightsync.exposing.device
import weightsync.exposing.host
import weightsync.filling.device  # noqa: F401 - with those above: what ranks would each load in their first push
from weightsync.errors import WeightSyncError
from weightsync.plan.layout import Layout
from weightsync.sources.tensors import TensorSource
from weightsync.trainer.place import TrainerPlace
from weightsync.trainer.rank import RankPush

DAWDLES = 2_500_000_000  # cycles of a GPU's clock, a second and a half about


class Line:
    """One end of the conversation with the test. What is said is not buffered: a signal must not have it said twice."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = connection.makefile("r")

    def say(self, words: dict[str, Any]) -> None:
        self._connection.sendall((json.dumps(words) + "\n").encode())

    def hear(self) -> str:
        """The next line; "" once the test has hung up."""
        return self._reader.readline()


class Gate:
    """Blocks the rank at one place of one push."""

    def __init__(self, line: Line, terms: dict[str, Any]) -> None:
        self._line = line
        where, left = terms.get("gate") or ("", 0)
        self._where = str(where)
        self._left = int(left)

    @property
    def reads(self) -> bool:
        """Whether it is one before a read."""
        return self._where in ("read", "fill")

    def passes(self, where: str) -> None:
        if self._comes(where):
            self._line.say({"at": where})
            self._line.hear()

    def fills(self, out: torch.Tensor) -> None:
        """Before a read into `out`, on whose stream what fills the slot comes next."""
        if not out.is_cuda:
            self.passes("fill")
        elif self._comes("fill"):
            torch.cuda._sleep(DAWDLES)
            self._line.say({"at": "fill"})

    def _comes(self, where: str) -> bool:
        self._left -= where == self._where
        return where == self._where and self._left == -1


class GatedLayout(Layout):
    """Stops before it is described to the daemon."""

    gate: Gate

    def pack(self) -> bytes:
        self.gate.passes("pack")
        return super().pack()


class GatedSource(TensorSource):
    """Stops before a read."""

    def __init__(self, weights: dict[str, torch.Tensor], gate: Gate, broken: bool) -> None:
        super().__init__(weights)
        plain = super().layout()
        layout = GatedLayout(*(getattr(plain, field.name) for field in dataclasses.fields(plain)))
        object.__setattr__(layout, "gate", gate)
        self._gated_layout, self._gate, self._broken = layout, gate, broken

    def layout(self) -> Layout:
        return self._gated_layout

    def local(self, shard: int) -> torch.Tensor | None:  # type: ignore[override]
        """On a GPU nothing is read through this source, unless it lies in no tensor: then all is, but one shard that
        says where the rank's weights are.
        """
        tensor = super().local(shard)
        return None if self._gate.reads and shard and tensor.is_cuda else tensor

    def read_into(self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...], out: torch.Tensor) -> None:
        self._gate.passes("read")
        self._gate.fills(out)
        if self._broken:
            raise OSError("the weights cannot be read")
        super().read_into(shard, src_offset, shape, out)


def weights_of(terms: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the rank holds: its share of the checkpoint, with the changes that the terms ask for."""
    rank, world, device = terms["rank"], terms["world"], terms.get("device", "cpu")
    load = load_file if device == "cpu" else kept_on
    everything = load(f"{terms['checkpoint']}/model.safetensors", device) if terms.get("checkpoint") else {}
    mine = {name: w for i, (name, w) in enumerate(sorted(everything.items())) if i % world == rank}
    for name, change in (terms.get("change") or {}).items():
        if change == "shape":
            mine[name] = torch.zeros(7, 3)
        elif change == "dtype":
            mine[name] = everything[name].to(torch.float16)
        elif change == "double":  # held by this rank too, as something else
            mine[name] = torch.zeros(*everything[name].shape, 2)
        elif change == "add":
            mine[name] = torch.zeros(4, 4)
        elif change == "drop":
            mine.pop(name, None)
    return mine


@functools.cache
def kept_on(path: str, device: str) -> dict[str, torch.Tensor]:
    """A checkpoint on a GPU, this process's current one from now on."""
    torch.cuda.set_device(device)
    return load_file(path, device)


def serve(connection: socket.socket) -> None:
    """A rank's whole life."""
    with connection:
        line = Line(connection)
        line.say({"pid": os.getpid()})
        while text := line.hear():
            terms = json.loads(text)
            try:
                line.say(_push(line, terms))
            except KeyboardInterrupt:
                line.say({"interrupted": True})


def _push(line: Line, terms: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    try:
        source = GatedSource(weights_of(terms), Gate(line, terms), bool(terms.get("broken")))
        report = RankPush(
            source,
            place=TrainerPlace(terms.get("group", "trainer"), terms["rank"], terms["world"]),
            version=terms["version"],
            model=terms.get("model", "default"),
            endpoint=terms["endpoint"],
            pause=terms.get("pause", "keep"),
            in_place=terms.get("in_place", False),
            started=started,
            deadline=started + terms.get("timeout", 30.0),
        ).run()
    except WeightSyncError as error:
        record = error.record()
        fields = {name: getattr(record, name) for name in record.__struct_fields__}
        return {"error": fields, "seconds": time.monotonic() - started}
    return {"report": report.as_dict(), "seconds": time.monotonic() - started}


def main(path: str) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the ranks
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path + ".making")
        listening.listen()
        os.rename(path + ".making", path)
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listening.close()
                serve(connection)
                return
            connection.close()


if __name__ == "__main__":
    main(sys.argv[1])
