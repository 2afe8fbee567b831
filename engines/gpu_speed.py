"""gpu_speed.py: pushes of a big model's shapes into real SGLang and vLLM servers on this machine's GPUs.

    python -m engines.gpu_speed --model DIR --plugins DIR --vllm vllm --sglang "python -m sglang.launch_server" --tp 2

DIR holds a config.json, and tokenizer files if a server wants them. Servers start with dummy weights, and with
`--reference` a reference engine as well. Random weights are pushed, in FSDP2 shards of a rank on each GPU. Each server
takes pushes its stock way (SGLang's tensors, vLLM's `ipc`) and through our plugin. There the first push is recorded,
the second proves the recording, and the third is replayed and compared; from then on weights are pulled straight out of
the slots. Engines' weights are compared with those sent in every push that says how many tensors were checked. Then the
same in place: engines read the trainer's memory, without slots, from the second push of that daemon on. Last come the
ways of `--peers`, which people use instead, each into the servers that it can push into and in their environment.
`--sglang-python` and `--vllm-python` run Python there; what is pushed into the reference engine's loader runs beside
SGLang. Prints a line of JSON for each way, and writes the JSON after each. Ceilings of the same run come last.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.gpu_ceilings import measure
from engines import peers
from engines.gpu_servers import Case, Server
from weightsync.config import EngineConfig
from weightsync.fleet import Engine, Fleet
from weightsync.operator import change_engines, fetch_status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TRAINER = Path(__file__).resolve().parent.parent / "bench" / "gpu_trainer.py"
IN_PLACE = " in place"  # suffix of ways in which engines read the trainer's memory
DELIVERED = " delivered"  # suffix of ways to an engine on another node, whose bridges write into its parameters
_WARM = {
    way + place: 4 for way in ("plugin", "extension", "reference") for place in ("", IN_PLACE, DELIVERED)
}  # pushes that do not count
_WAYS = {
    "sglang": ("tensor", "plugin", f"plugin{IN_PLACE}"),
    "vllm": ("ipc", "extension", f"extension{IN_PLACE}"),
    "reference": ("reference", f"reference{IN_PLACE}"),
}
_BOTH = "engines.vllm_extensions.Extensions"  # weightsync's and checkpoint-engine's


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="folder with config.json")
    p.add_argument("--plugins", type=Path, required=True, help="folder that makes weightsync's plugins known")
    p.add_argument("--vllm", default="")
    p.add_argument("--sglang", default="")
    p.add_argument("--reference", action="store_true", help="push into a reference engine as well")
    p.add_argument("--peers", nargs="*", default=[], choices=list(peers.PEERS), help="what others use, too")
    p.add_argument("--sglang-python", default="", help="runs Python where SGLang can be imported")
    p.add_argument("--vllm-python", default="", help="the same for vLLM")
    p.add_argument("--tp", type=int, default=2)
    p.add_argument("--pushes", type=int, default=8, help="into each server through the plugin")
    p.add_argument("--stock", type=int, default=3, help="into each server its stock way, and any peer's")
    p.add_argument("--slots", type=int, default=3)
    p.add_argument("--slot", default="1GiB")
    p.add_argument("--memory", type=float, default=0.7, help="of a GPU, for SGLang; vLLM takes what it needs")
    p.add_argument("--logs", type=Path, default=Path("/tmp/gpu-speed"))
    p.add_argument("--traces", type=Path, default=None, help="keep traces of the pushes there")
    p.add_argument("--no-ceilings", action="store_true")
    p.add_argument("--json", type=Path, default=None)
    options = p.parse_args()
    for name in options.peers:
        for kind in peers.PEERS[name].kinds:
            if getattr(options, kind) and not python_of(kind, options):
                p.error(f"--peers {name} needs --{'vllm' if kind == 'vllm' else 'sglang'}-python")
    if options.peers and options.tp != torch.cuda.device_count():
        p.error("peers have a rank on each GPU, and each an engine's rank beside it: --tp has to be the number of GPUs")
    options.logs.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "command": f"python -m engines.gpu_speed {shlex.join(sys.argv[1:])}",
        "gpu": torch.cuda.get_device_name(0),
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "slots": f"{options.slots} × {options.slot}",
        "ways": [],
    }

    def keep(way: dict[str, Any] | None = None) -> None:
        found["ways"] += [way] if way else []
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1))

    servers(options, keep)
    if not options.no_ceilings:
        found["ceilings"] = measure()
        keep()
    for way in found["ways"]:
        print(json.dumps({key: value for key, value in way.items() if key != "pushes"}))
    print(json.dumps(found.get("ceilings", {})))
    return 0 if all(way["good"] for way in found["ways"]) else 1


def servers(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    """Start the servers side by side, and push into one after the other.

    Peers come last, because a peer that fails may leave a server broken for all ways after it.
    """
    gpus = ",".join(map(str, range(options.tp)))
    dummy = ("--load-format", "dummy")
    vllm: tuple[str, ...] = ("--weight-transfer-config", json.dumps({"backend": "ipc"}))
    if "checkpoint-engine" in options.peers:
        vllm += ("--worker-extension-cls", _BOTH)
    with ExitStack() as stack:
        started: dict[str, Server | Engine] = {}
        for number, (kind, path, flags) in enumerate((("sglang", "plugin", ()), ("vllm", "extension", vllm))):
            if getattr(options, kind):
                case = Case(kind, path, tp=options.tp)
                real = Server(case, options.model, 22000 + 100 * number, gpus, options, (*dummy, *flags))
                stack.callback(real.stop)
                started[kind] = real
        if options.reference:
            fleet = stack.enter_context(Fleet())
            started["reference"] = fleet.start_engine("e0", options.model, tp=options.tp, device="cuda", flags=dummy)
        if problems := [p for one in started.values() if isinstance(one, Server) and (p := one.wait())]:
            raise SystemExit("\n".join(problems))
        print("servers are ready", flush=True)
        first, software = 1, {}
        for kind, server in started.items():
            for way in _WAYS[kind]:
                pushes = options.pushes if way in _WARM else options.stock
                done = push(kind, server, way, first, pushes, options)
                software[kind] = done["engine"]
                keep(done)
                first += pushes
        for name, peer in peers.PEERS.items():
            for kind in peer.kinds:
                if name in options.peers and kind in started:
                    keep(instead(peer, kind, started[kind], software[kind], first, options))
                    first += options.stock


def python_of(kind: str, options: argparse.Namespace) -> str:
    """Return the command that runs Python where peers push into engines of this kind, or ""."""
    command: str = options.vllm_python if kind == "vllm" else options.sglang_python
    return command


def instead(
    peer: peers.Peer, kind: str, server: Server | Engine, engine: str, first: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Make the pushes of a peer."""
    arguments = ["--model", str(options.model), "--url", server.url, "--pushes", str(options.stock)]
    arguments += ["--first", str(first)]
    more: Any = {"logs": options.logs, "engine": engine, "ranks": torch.cuda.device_count(), "tp": options.tp}
    with Fleet() as fleet:
        return peers.run(fleet, peer, kind, python_of(kind, options), arguments, **more)


def push(
    kind: str,
    server: Server | Engine,
    way: str,
    first: int,
    pushes: int,
    options: argparse.Namespace,
    *,
    ranks: int = 0,
    gpus: Sequence[str] = (),
    far: Sequence[str] = (),
) -> dict[str, Any]:
    """Make the pushes of one way, with their own daemon and trainer ranks, and return a row.

    `ranks` trainer ranks run on the first GPUs, and the daemon on the GPUs with the UUIDs `gpus`; on all by default. If
    `far` has the UUIDs of the server's GPUs, the server has its own daemon there.
    """
    ranks = ranks or torch.cuda.device_count()
    with Fleet() as fleet:
        path = way.removesuffix(IN_PLACE).removesuffix(DELIVERED)
        engine = EngineConfig(name="e0", kind=kind, url=server.url, path="auto" if kind == "reference" else path)
        sections: Any = {
            "arena": {"slots": options.slots, "slot_bytes": options.slot, "device": "cuda", "alignment": 16},
            "timeouts": {"operation": 240.0, "probe": 30.0},
            "log": {"trace_dir": str(options.traces / f"{kind} {way}") if options.traces else ""},
        }
        others = [fleet.start_daemon("far", node={"gpus": far}, **sections)] if far else []
        daemon = fleet.start_daemon("speed", peers=others, node={"gpus": gpus}, **sections)
        change_engines((others or [daemon])[0].endpoint, add=[engine])
        arguments = ["--model", str(options.model), "--daemon", daemon.endpoint, "--out", str(fleet.root)]
        arguments += ["--pushes", str(pushes), "--first", str(first)]
        arguments += ["--in-place"] if way.endswith((IN_PLACE, DELIVERED)) else []
        trainer = fleet.torchrun("trainer", _TRAINER, ranks, arguments)
        status = trainer.wait(400)
        print(f"{kind} {way}\n{trainer.tail(40)}", flush=True)
        if status:
            return {
                "engine": kind,
                "way": way,
                "good": False,
                "log": [trainer.tail(60), daemon.tail(60), server.tail()],
            }
        rows = json.loads((fleet.root / "rank0.json").read_text())["pushes"]
        about = fetch_status(daemon.endpoint).engines[0]
    counted = rows[_WARM.get(way, 1) :] or rows[-1:]
    phases = {name: statistics.median(row["phases"][name] for row in counted) for name in counted[0]["phases"]}
    return {
        "engine": about.software,
        "way": way,
        "tp": options.tp,
        "bytes": rows[-1]["bytes"],
        "tensors": rows[-1]["tensors"],
        "warm": _WARM.get(way, 1),
        "buckets": rows[-1]["buckets"],
        "seconds": statistics.median(row["wall_seconds"] for row in counted),
        "seconds_each": [round(row["wall_seconds"], 4) for row in rows],
        "until_filled": statistics.median(row["until_filled_seconds"] for row in counted),
        "phases": {name: round(seconds, 4) for name, seconds in phases.items()},
        "drawn": [row["engines"][0]["drawn"] for row in rows],
        "checked": [row["engines"][0]["checked"] for row in rows],
        "replay": repr(about.replay),
        "good": all(row["complete"] for row in rows),
        "pushes": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
