"""Whole pushes of a model's shapes through a real weightsyncd into reference engines, on this machine's processors.

\b
    python -m bench push --shape qwen3-8b --layers 2 --ranks 2 --engines 2 --tp 2 --way push --way broadcast

Ways, in turn, with the same tensors, layout and engine ranks:

\b
  push             weightsync, every byte checked in the engines' own memory
  retain           the same, and the node keeps a copy for engines that come late (node.retain = "host")
  broadcast        a torch.distributed broadcast of each tensor over gloo, which the engines load
  broadcast-check  the same, and then the engines' weights are compared as a push compares them
  torchstore       torchstore's put_state_dict and get_state_dict, one trainer rank; left out if it is not installed

Weights are random; names, shapes and types are the model's. A push copies each byte into a slot, and from there into
each engine. "Of memcpy" is the rate of these copies, divided by the rate at which one core copies in the same run.
"""

from __future__ import annotations

import importlib.util
import statistics
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import torch
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
    size,
    suite,
)
from bench.scripts import WARM, alone, torchrun
from bench.ways import COLUMNS, Way, fastest, in_turn, load, rows
from weightsync.adapters.reference.config import ModelConfig, read_config
from weightsync.adapters.reference.sharding import check_tp
from weightsync.errors import ConfigError
from weightsync.fleet import Daemon, Engine, Fleet

if TYPE_CHECKING:
    from pathlib import Path

# Qwen3-0.6B's shapes with 44 layers instead of 28 and an untied head: 2.0 GB in bfloat16
MODEL = ModelConfig(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=44,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    dtype="bfloat16",
)
_TORCHSTORE = ("torchstore", "monarch")  # packages that weightsync does not depend on


class Name(StrEnum):
    """The name of a way."""

    push = "push"
    retain = "retain"
    broadcast = "broadcast"
    broadcast_check = "broadcast-check"
    torchstore = "torchstore"


@dataclass(frozen=True)
class Case:
    """A model, and the trainer and engines that it is pushed between."""

    model: shapes.Model
    ranks: int
    engines: int
    tp: int
    pushes: int
    slot: str
    slots: int

    @property
    def copied(self) -> int:
        """Bytes copied, all copies counted: into a slot, and into every engine."""
        return self.model.nbytes * (1 + self.engines)


def main(
    shape: Annotated[str, typer.Option(help="A name of `models`, or the path of such a file.")] = "qwen3-0.6b",
    layers: LayersOption = None,
    nbytes: Annotated[
        str | None, typer.Option("--bytes", help="Or as many as come to this: 500MB.", show_default=False)
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Trainer ranks: FSDP2 shards if several.")] = 1,
    engines: Annotated[int, typer.Option(min=1, help="Reference engines.")] = 1,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks of each engine.")] = 1,
    pushes: PushesOption = 7,
    rounds: RoundsOption = 1,
    slot: SlotOption = "64MiB",
    slots: SlotsOption = 3,
    way: Annotated[list[Name] | None, typer.Option(help="Several times; see above.", show_default="push")] = None,
    to: JsonOption = None,
) -> None:
    """Measure, print, write."""
    model = shapes.load(shape).with_layers(layers)
    if nbytes is not None:
        model = model.fitting(size(nbytes))
    figures = measure(Case(model, ranks, engines, tp, pushes, slot, slots), way or [Name.push], rounds)
    layout = f"trainer ranks: {ranks}, engines: {engines} of TP {tp}"
    title = f"{model.name}, {figures['layers']} layers, {model.nbytes / 1e9:.2f} GB: {layout}"
    table = rows(figures["ways"], model.nbytes, figures["memcpy_bytes_per_second"])
    report(title, COLUMNS, table, figures, to, footer=fastest(figures["ways"]))


def measure(case: Case, ways: list[Name], rounds: int) -> dict[str, Any]:
    """Run the ways in turn, and measure the copies of one core before and after all of them."""
    ways = possible(case, ways)
    before = copy_ceiling()
    with Fleet() as fleet:
        folder = fleet.root / "model"
        folder.mkdir()
        case.model.write(folder)
        if case.model.config["model_type"] not in ("qwen3", "qwen3_moe"):
            raise ConfigError(
                f"no engine here serves {case.model.name}: the reference engine has Qwen3 and Qwen3-MoE only",
                hint="`plan --shape` takes every model",
            )
        check_tp(read_config(folder), case.tp)
        way = {
            Name.push: _push,
            Name.retain: _push,
            Name.broadcast: _broadcast,
            Name.broadcast_check: _broadcast,
            Name.torchstore: _torchstore,
        }
        found = in_turn([partial(way[name], fleet, case, folder, name) for name in ways], rounds)
    return {
        "model": case.model.name,
        "config": case.model.source,
        "layers": case.model.config["num_hidden_layers"],
        "bytes": case.model.nbytes,
        "tensors": len(case.model.tensors),
        "ranks": case.ranks,
        "engines": case.engines,
        "tp": case.tp,
        "slot": case.slot,
        "slots": case.slots,
        "memcpy_bytes_per_second": max(before, copy_ceiling()),
        "ways": [asdict(one) for one in found],
    }


def possible(case: Case, ways: list[Name]) -> list[Name]:
    """Return the ways that can run here, and say why the others cannot. Raises `ConfigError` if none is left."""
    missing = [package for package in _TORCHSTORE if importlib.util.find_spec(package) is None]
    if Name.torchstore not in ways or not (missing or case.ranks > 1):
        return ways
    why = f"{' and '.join(missing)} not installed" if missing else "it is driven with one trainer rank only"
    left: list[Name] = [name for name in ways if name is not Name.torchstore]
    if not left:
        raise ConfigError(f"torchstore cannot be measured: {why}", hint="docs/benchmarks.md says what it was run with")
    typer.echo(f"torchstore is left out: {why}", err=True)
    return left


def _push(fleet: Fleet, case: Case, folder: Path, name: Name, turn: int) -> Way:
    busy = load()
    engines = [
        fleet.start_engine(f"{name}{turn}-{i}", folder, tp=case.tp, flags=("--load-format", "dummy"), wait=False)
        for i in range(case.engines)
    ]
    for engine in engines:
        fleet.wait_engine(engine)
    retain = "host" if name is Name.retain else "none"
    arena = {"slot_bytes": case.slot, "slots": case.slots}
    daemon = fleet.start_daemon(
        f"{name}{turn}", engines, arena=arena, node={"retain": retain}, timeouts={"operation": 120.0}
    )
    out = _folder(fleet, name, turn)
    ranks = torchrun(fleet, case.model, "push_trainer.py", case.ranks, out, ["--daemon", daemon.endpoint], case.pushes)
    told = [rank["pushes"][WARM:] for rank in ranks]
    if not all(push["complete"] for push in told[0]):
        raise ConfigError(f"a push was not complete: {told[0][-1]['engines']}\n{daemon.tail(30)}")
    peak = {"trainer rank": max(rank["peak_bytes"] for rank in ranks), **_peaks(daemon, engines)}
    for child in (daemon, *engines):
        fleet.end(child)
    first = told[0]
    return Way(
        name="weightsync" if name is Name.push else "weightsync, copy kept",
        software=f"shm, {first[0]['buckets']} buckets, {case.slots} slots of {case.slot}, retain = {retain}",
        seconds=Spread.of(max(one["wall"] for one in push) for push in zip(*told, strict=True)),
        blocked=Spread.of(max(one["until_filled"] for one in push) for push in zip(*told, strict=True)),
        paused=Spread.of(max(engine["seconds"] for engine in push["engines"]) for push in first),
        checked="in engines",
        peak=peak,
        copied=case.copied,
        phases={phase: statistics.median(push["phases"][phase] for push in first) for phase in first[0]["phases"]},
        load=(busy,),
    )


def _broadcast(fleet: Fleet, case: Case, folder: Path, name: Name, turn: int) -> Way:
    busy, check = load(), name is Name.broadcast_check
    options = [
        "--config",
        str(folder),
        "--ranks",
        str(case.ranks),
        "--tp",
        str(case.tp),
        *(["--check"] if check else []),
    ]
    world = case.ranks + case.engines * case.tp
    told = torchrun(fleet, case.model, "peer_broadcast.py", world, _folder(fleet, name, turn), options, case.pushes)
    trainers, engines = told[: case.ranks], told[case.ranks :]

    def longest(ranks: list[Any], key: str) -> Spread:
        last = len(ranks[0]["pushes"])
        return Spread.of(max(rank["pushes"][i][key] for rank in ranks) for i in range(WARM, last))

    seconds = longest(told, "wall" if check else "transfer")
    return Way(
        name="broadcast, checked" if check else "broadcast",
        software=f"torch.distributed.broadcast of torch {torch.__version__} over gloo, a tensor at a time",
        seconds=seconds,
        blocked=longest(trainers, "transfer"),
        paused=longest(engines, "wall" if check else "transfer"),
        checked="in engines" if check else "none",
        peak={
            "trainer rank": max(rank["peak_bytes"] for rank in trainers),
            "engine rank": max(rank["peak_bytes"] for rank in engines),
        },
        load=(busy,),
    )


def _torchstore(fleet: Fleet, case: Case, folder: Path, name: Name, turn: int) -> Way:
    busy, more = load(), ["--config", str(folder), "--engines", str(case.engines), "--tp", str(case.tp)]
    out = _folder(fleet, name, turn)
    told = alone(fleet, case.model, "peer_torchstore.py", out, more, case.pushes)

    def measured(key: str) -> Spread:
        return Spread.of(push[key] for push in told["pushes"][WARM:])

    return Way(
        name="torchstore",
        software=told["software"],
        seconds=measured("wall"),
        blocked=measured("put"),
        paused=measured("get"),
        checked="none",
        peak=told["peak"],
        load=(busy,),
    )


def _folder(fleet: Fleet, name: Name, turn: int) -> Path:
    out = fleet.root / f"{name}{turn}.out"
    out.mkdir()
    return out


def _peaks(daemon: Daemon, engines: list[Engine]) -> dict[str, int]:
    """Return the peak bytes of the daemon, its bridge and keeper, and the engines' ranks."""
    found: dict[str, int] = {"daemon": peak_bytes(daemon.pid)}
    for child in psutil.Process(daemon.pid).children():
        kind = "keeper" if "keeper" in " ".join(child.cmdline()) else "bridge"
        found[kind] = max(found.get(kind, 0), peak_bytes(child.pid))
    workers = [peak_bytes(one.pid) for engine in engines for one in psutil.Process(engine.pid).children()]
    return found | {"engine rank": max(workers, default=0)}


app = suite(main)
if __name__ == "__main__":
    app()
