"""Pushes of a model's shapes into a real SGLang server on this machine's processors, beside SGLang's own tensor path.

\b
    python -m bench sglang --shape qwen3-0.6b --layers 8 --json out.json

Ways into one and the same server, in turn:

\b
  plugin   weightsync with its plugin in the server: every bucket is checked where it is read, loads are replayed
  tensor   weightsync through the stock server's /update_weights_from_tensor
  slime    the same route as slime drives it: buckets of 512 MB, handles gathered over gloo (engines/peer_slime.py)

The server starts with dummy weights. Needs `make engines`. On a machine with GPUs, too, it measures the processors.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import psutil
import typer

from bench import shapes
from bench.harness import (
    JsonOption,
    LayersOption,
    PushesOption,
    RoundsOption,
    SlotOption,
    SlotsOption,
    Spread,
    copy_ceiling,
    peak_bytes,
    report,
    suite,
)
from bench.scripts import WARM, torchrun
from bench.ways import COLUMNS, Way, fastest, in_turn, load, rows
from tests.engines.kit import ENGINES, RealEngine, free_port, installed
from weightsync.config import EngineConfig
from weightsync.errors import ConfigError
from weightsync.fleet import Child, Daemon, Fleet
from weightsync.operator import change_engines, fetch_status
from weightsync.testing import eventually

_ROOT = Path(__file__).resolve().parent.parent
_FLAGS = ("--load-format", "dummy", "--context-length", "512", "--max-total-tokens", "1024", "--skip-tokenizer-init")
_COPIES = {"plugin": 2, "tensor": 3, "slime": 3}  # of each byte: into slot and engine; and into a file that torch opens
_SKIP = 60  # ports to skip, because tests on this machine that start engines take the first free ones
_WAIT = 600.0  # seconds for all pushes of one way


class Name(StrEnum):
    """The name of a way."""

    plugin = "plugin"
    tensor = "tensor"
    slime = "slime"


def main(
    shape: Annotated[str, typer.Option(help="A name of `models` that SGLang serves on a CPU.")] = "qwen3-0.6b",
    layers: LayersOption = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks of the server; as many trainer ranks.")] = 1,
    pushes: PushesOption = 7,
    rounds: RoundsOption = 1,
    slot: SlotOption = "512MiB",
    slots: SlotsOption = 2,
    way: Annotated[list[Name] | None, typer.Option(help="Several times.", show_default="all three")] = None,
    to: JsonOption = None,
) -> None:
    """Measure, print, write."""
    version = installed("sglang")
    if not version:
        raise ConfigError(f"SGLang is not in {ENGINES}", hint="make engines")
    model = shapes.load(shape).with_layers(layers)
    ceiling = copy_ceiling()
    with Fleet() as fleet:
        folder = fleet.root / "model"
        folder.mkdir()
        model.write(folder)
        engine = RealEngine(
            "sglang",
            folder,
            fleet.root,
            plugin=True,
            tp=tp,
            dtype=model.config["torch_dtype"],
            flags=_FLAGS,
            port=free_port(_SKIP),
        )
        with engine:
            bench = Bench(fleet, engine, model, tp, pushes, slot, slots, version)
            each = [bench.slime if name is Name.slime else partial(bench.push, name) for name in way or list(Name)]
            ways = in_turn(each, rounds)
    figures = {
        "model": model.name,
        "config": model.source,
        "layers": model.config["num_hidden_layers"],
        "bytes": model.nbytes,
        "tensors": len(model.tensors),
        "ranks": tp,
        "engines": 1,
        "tp": tp,
        "slot": slot,
        "slots": slots,
        "memcpy_bytes_per_second": max(ceiling, copy_ceiling()),
        "ways": [asdict(one) for one in ways],
    }
    title = f"{model.name}, {figures['layers']} layers, {model.nbytes / 1e9:.2f} GB, into SGLang {version} of TP {tp}"
    table = rows(figures["ways"], model.nbytes, figures["memcpy_bytes_per_second"])
    report(title, COLUMNS, table, figures, to, footer=fastest(figures["ways"]))


class Bench:
    """One server, into which each way pushes."""

    def __init__(
        self,
        fleet: Fleet,
        engine: RealEngine,
        model: shapes.Model,
        tp: int,
        pushes: int,
        slot: str,
        slots: int,
        software: str,
    ) -> None:
        self._fleet, self._engine, self._model, self._tp, self._pushes = fleet, engine, model, tp, pushes
        self._arena = {"slot_bytes": slot, "slots": slots}
        self._sglang = software
        self._version = 0

    def push(self, name: Name, turn: int) -> Way:
        """Push with weightsync, by one of its ways."""
        busy = load()
        daemon = self._daemon(name, turn)
        out = self._fleet.root / f"{name}{turn}"
        out.mkdir()
        self._forget_peaks()
        options = ["--daemon", daemon.endpoint, "--first", str(self._next())]
        ranks = torchrun(self._fleet, self._model, "push_trainer.py", self._tp, out, options, self._pushes)
        told = [rank["pushes"][WARM:] for rank in ranks]
        first = told[0]
        if not all(push["complete"] for push in first):
            raise ConfigError(f"a push was not complete: {first[-1]['engines']}\n{daemon.tail(30)}")
        bridges = [peak_bytes(child.pid) for child in psutil.Process(daemon.pid).children()]
        peak = {
            "trainer rank": max(rank["peak_bytes"] for rank in ranks),
            "daemon": peak_bytes(daemon.pid),
            "bridge": max(bridges, default=0),
            "server": self._peak(),
        }
        self._fleet.end(daemon)
        return Way(
            name=f"weightsync, {name}",
            software=f"{first[0]['buckets']} buckets, {self._arena['slots']} slots of {self._arena['slot_bytes']}",
            seconds=Spread.of(max(one["wall"] for one in push) for push in zip(*told, strict=True)),
            blocked=Spread.of(max(one["until_filled"] for one in push) for push in zip(*told, strict=True)),
            paused=Spread.of(push["engines"][0]["seconds"] for push in first),
            checked="as read" if name is Name.plugin else "none",
            peak=peak,
            copied=_COPIES[name] * self._model.nbytes,
            phases={phase: statistics.median(push["phases"][phase] for push in first) for phase in first[0]["phases"]},
            load=(busy,),
        )

    def slime(self, turn: int) -> Way:
        """Push through SGLang's own route, as slime does."""
        busy = load()
        out = self._fleet.root / f"slime{turn}"
        out.mkdir()
        tensors = out / "tensors.json"
        tensors.write_text(json.dumps([[name, *tensor] for name, tensor in self._model.tensors.items()]))
        options = [
            "--tensors",
            str(tensors),
            "--url",
            self._engine.url,
            "--out",
            str(out),
            "--first",
            str(self._next()),
        ]
        options += ["--pushes", str(self._pushes + WARM)]
        self._forget_peaks()
        python = str(ENGINES / "sglang" / "bin/python")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self._tp)]
        log = out / "log"
        with log.open("wb") as to:
            process = subprocess.Popen(
                [python, *launcher, str(_ROOT / "engines/peer_slime.py"), *options],
                stdin=subprocess.DEVNULL,
                stdout=to,
                stderr=subprocess.STDOUT,
                env={**self._fleet.env, "PYTHONPATH": "", "GLOO_SOCKET_IFNAME": "lo"},
                start_new_session=True,
            )
        child = Child("slime", process, log)
        self._fleet.children.append(child)
        if child.wait(_WAIT):
            raise ConfigError(f"peer_slime.py failed\n{child.tail(60)}")
        ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(self._tp)]
        seconds = Spread.of(max(rank["pushes"][i]["wall"] for rank in ranks) for i in range(WARM, self._pushes + WARM))
        return Way(
            name="SGLang's tensor path, as slime",
            software=f"SGLang {self._sglang}, flattened buckets of 512 MB, a session, torch's file_system sharing",
            seconds=seconds,
            blocked=seconds,
            paused=seconds,
            checked="none",
            peak={"trainer rank": max(rank["peak_bytes"] for rank in ranks), "server": self._peak()},
            copied=_COPIES["slime"] * self._model.nbytes,
            load=(busy,),
        )

    def _daemon(self, path: str, turn: int) -> Daemon:
        daemon = self._fleet.start_daemon(f"sglang-{path}{turn}", arena=self._arena, timeouts={"operation": 120.0})
        change_engines(
            daemon.endpoint, add=[EngineConfig(name="engine", kind="sglang", url=self._engine.url, path=path)]
        )

        def seen() -> bool:
            return any(one.state not in ("unknown", "lost") for one in fetch_status(daemon.endpoint).engines)

        if not eventually(seen, seconds=60):
            raise ConfigError(f"the daemon does not see the server\n{daemon.tail(30)}")
        return daemon

    def _next(self) -> int:
        """Return a version above all that earlier ways may have pushed."""
        self._version += 1 + self._pushes + WARM
        return self._version

    def _processes(self) -> list[psutil.Process]:
        assert self._engine.child is not None
        front = psutil.Process(self._engine.child.pid)
        return [front, *front.children(recursive=True)]

    def _forget_peaks(self) -> None:
        """Have the peaks of the server's processes begin anew (clear_refs in proc(5))."""
        for process in self._processes():
            with contextlib.suppress(OSError):
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")

    def _peak(self) -> int:
        return max(peak_bytes(process.pid) for process in self._processes())


app = suite(main)
if __name__ == "__main__":
    app()
