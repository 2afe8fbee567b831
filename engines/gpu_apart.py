"""gpu_apart.py: pushes into real vLLM and SGLang servers on other GPUs, by weightsync and by vLLM's `nccl` trainer API.

    python -m engines.gpu_apart --model DIR --plugins DIR --vllm vllm --vllm-python vllm-python --json apart.json
    python -m engines.gpu_apart … --sglang "python -m sglang.launch_server"          # and into SGLang

DIR holds a config.json and tokenizer files. One half of this machine's GPUs is the trainer's, with a rank and its FSDP2
shards on each (with two GPUs: one rank, whole tensors). Servers run on the other half, each with a TP of all its GPUs.
Several servers are up at the same time, because a server takes one backend, and a stock worker joins only one group in
its life. Servers start with dummy weights. Random weights are pushed, one way after the other:

    plugin            our plugin, by slots on all GPUs: engines read over NVLink what CUDA IPC maps
    plugin in place   the same, out of the trainer's memory
    plugin delivered  as two nodes, a weightsyncd on each half: from the trainer's memory over NCCL into the engine's
    group             a stock server and a weightsyncd on the trainer's GPUs, joined by NCCL
    vllm-nccl         a stock server and vLLM's trainer API (`engines/peer_vllm_nccl.py`), joined by NCCL

The plugin records, proves and replays in its first pushes, which do not count; nor does the first push of any way.
Prints a table. Its last column is the model's bytes a second, divided by the rate of NCCL broadcasts of 1 GiB between a
trainer's GPU and a server's in the same run, all such pairs at once. The JSON is written after each way. If a way
fails, the JSON says why, and the other ways go on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.gpu_broadcast import broadcasts
from bench.harness import size
from bench.loaders import loaders
from bench.table import table
from engines import peers
from engines.gpu_servers import Case, Server
from engines.gpu_speed import DELIVERED, IN_PLACE, push
from weightsync.adapters.reference.config import read_config
from weightsync.adapters.reference.sharding import checkpoint_tensors
from weightsync.errors import WeightSyncError
from weightsync.fleet import Fleet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# kind and path of a server → ways into it
SERVERS = {
    ("vllm", "plugin"): ("plugin", f"plugin{IN_PLACE}", f"plugin{DELIVERED}"),
    ("sglang", "plugin"): ("plugin", f"plugin{IN_PLACE}", f"plugin{DELIVERED}"),
    ("vllm", "group"): ("group",),
    ("vllm", "nccl"): (peers.APART.name,),
}
FLAGS = ("--load-format", "dummy")
BUCKET = 1 << 30  # bytes of one broadcast


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="folder with config.json")
    p.add_argument("--plugins", type=Path, required=True, help="folder that makes weightsync's plugins known")
    p.add_argument("--vllm", default="", help="starts vLLM")
    p.add_argument("--vllm-python", default="", help="runs Python where vLLM can be imported")
    p.add_argument("--sglang", default="", help="starts SGLang")
    every = list(dict.fromkeys(way for ways in SERVERS.values() for way in ways))
    p.add_argument("--ways", nargs="+", choices=every, default=every)
    p.add_argument("--pushes", type=int, default=9, help="through the plugin, four of which warm up")
    p.add_argument("--stock", type=int, default=6, help="into each stock server, one of which warms up")
    p.add_argument("--slots", type=int, default=3)
    p.add_argument("--slot", default="1GiB", help="`group` takes larger ones where a tensor is larger")
    p.add_argument("--memory", type=float, default=0.25, help="of a GPU, that has to be free for each server")
    p.add_argument("--logs", type=Path, default=Path("/tmp/gpu-apart"))
    p.add_argument("--traces", type=Path, default=None, help="keep traces of the pushes there")
    p.add_argument("--json", type=Path, default=None)
    options = p.parse_args()
    gpus = torch.cuda.device_count()
    if gpus < 2 or gpus % 2:
        p.error(f"an even number of GPUs, two at least, is what is halved; here are {gpus}")
    options.tp = gpus // 2  # the trainer's ranks, too
    options.logs.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "command": f"python -m engines.gpu_apart {shlex.join(sys.argv[1:])}",
        "gpu": torch.cuda.get_device_name(0),
        "gpus": gpus,
        "torch": torch.__version__,
        "slots": f"{options.slots} × {options.slot}",
        "ways": [],
    }

    def keep(*ways: dict[str, Any]) -> None:
        found["ways"] += ways
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1))

    push_all(options, keep)
    try:
        with Fleet() as fleet:
            found["broadcasts"] = broadcasts(fleet, options.model, BUCKET, gpus)
    except WeightSyncError as error:
        found["no_broadcasts"] = str(error)
    keep()
    for way in found["ways"]:
        if not way["good"]:
            print(f"{way['way']}: {way.get('log', 'a push was not complete')}", flush=True)
    if any("seconds_each" in way for way in found["ways"]):
        print("\n".join(loaders(found, table)))
    print(found.get("no_broadcasts", ""))
    return 0 if found.get("broadcasts") and all(way["good"] for way in found["ways"]) else 1


def push_all(options: argparse.Namespace, keep: Callable[..., None]) -> None:
    """Start the servers side by side, and push every way, vLLM's own last."""
    wanted = {
        which: [way for way in ways if way in options.ways]
        for which, ways in SERVERS.items()
        if getattr(options, which[0])
    }
    theirs = ",".join(map(str, range(options.tp, 2 * options.tp)))
    with ExitStack() as stack:
        servers: dict[tuple[str, str], Server] = {}
        for number, which in enumerate(which for which, ways in wanted.items() if ways):
            (kind, path), port = which, 22000 + 100 * number
            servers[which] = Server(Case(kind, path, tp=options.tp), options.model, port, theirs, options, FLAGS)
            stack.callback(servers[which].stop)
        up = []
        for which, server in servers.items():
            if problem := server.wait():
                keep(*(failed(which[0], way, problem) for way in wanted[which]))
            else:
                up += [(way, server) for way in wanted[which]]
        print(f"servers are ready for {', '.join(way for way, _ in up) or 'nothing'}", flush=True)
        first, software = 1, {"vllm": "vllm", "sglang": "sglang"}
        for way, server in up:
            kind = server.case.kind
            try:
                done = one(way, server, first, software[kind], options)
            except WeightSyncError as error:  # only this way fails: each has its own daemon and trainer
                done = failed(kind, way, str(error), server.tail())
            keep(done)
            software[kind] = done["engine"] if done["good"] else software[kind]
            first += options.pushes + options.stock


def one(way: str, server: Server, first: int, engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """Make all pushes of one way, and return a row. Versions begin at `first`.

    `engine` names the server in the row of vLLM's own way; for other ways the daemon knows it.
    """
    if way == peers.APART.name:
        arguments = ["--model", str(options.model), "--url", server.url, "--pushes", str(options.stock)]
        arguments += ["--first", str(first)]
        more: Any = {"logs": options.logs, "engine": engine, "ranks": options.tp, "tp": options.tp}
        with Fleet() as fleet:
            return peers.run(fleet, peers.APART, "vllm", options.vllm_python, arguments, **more)
    mine, gpus, far = argparse.Namespace(**vars(options)), [], []
    uuids = [str(torch.cuda.get_device_properties(gpu).uuid) for gpu in range(2 * options.tp)]
    if way == "group":
        config = read_config(options.model)
        mine.slot = whole(options.slot, checkpoint_tensors(config).values(), getattr(torch, config.dtype).itemsize)
        gpus = uuids[: options.tp]
    if way.endswith(DELIVERED):
        gpus, far = uuids[: options.tp], uuids[options.tp :]
    pushes = options.stock if way == "group" else options.pushes
    done = push(server.case.kind, server, way, first, pushes, mine, ranks=options.tp, gpus=gpus, far=far)
    return done | {"slots": f"{mine.slots} × {mine.slot}"}


def whole(slot: str, shapes: Iterable[tuple[int, ...]], itemsize: int) -> str:
    """Return a slot's size that holds the largest tensor, too: a stock server takes whole tensors only."""
    largest = max(map(prod, shapes)) * itemsize
    return slot if size(slot) >= largest else f"{-(-largest // 2**20)}MiB"


def failed(kind: str, way: str, *why: str) -> dict[str, Any]:
    return {"engine": kind, "way": way, "peer": way == peers.APART.name, "good": False, "log": list(why)}


if __name__ == "__main__":
    sys.exit(main())
