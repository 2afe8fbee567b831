"""Pushes between GPUs of one host: FSDP2 shards into reference engines on them, beside the ceilings of the wires.

    python -m bench.bench_gpu --shape qwen3-30b-a3b --engines tp --json out.json
    python -m bench.bench_gpu --shape qwen3-30b-a3b --engines apart   # half of the GPUs to the other half
    python -m bench.bench_gpu --shape qwen3-30b-a3b --engines away   # the same, as two nodes
    python -m bench.bench_gpu --shape qwen3-30b-a3b --layers 12 --retain   # a copy of each push is kept in host memory

Weights are random. Shapes and names are a real model's (`python -m bench models`; the reference engine serves Qwen3's).
Every push is verified: each engine's tensors are fingerprinted in its memory and compared with the trainer's. Seconds
are medians over the pushes, after two that warm up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import shapes
from bench.gpu_broadcast import broadcasts
from bench.gpu_ceilings import measure, measure_to_host
from bench.harness import report
from weightsync.adapters.reference.config import read_config
from weightsync.fleet import Fleet
from weightsync.operator import fetch_status
from weightsync.testing import eventually

HALVES = ("apart", "away")  # engines on one half of the GPUs, the trainer on the other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--shape", choices=shapes.names(), default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=None, help="of the model's, so many; all by default")
    parser.add_argument("--ranks", type=int, default=0, help="trainer ranks, one a GPU; all of the trainer's node")
    parser.add_argument(
        "--engines",
        choices=("tp", "replicas", *HALVES),
        default="tp",
        help="one of tp N, N of tp 1, or one of tp N/2 on GPUs of its own: apart, of the trainer's node; "
        "away, of another, joined by NCCL",
    )
    parser.add_argument("--pushes", type=int, default=10, help="measured pushes, after 2 that warm up")
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="weights are read where the trainer has them, and no slots; away: delivered",
    )
    parser.add_argument("--retain", action="store_true", help='node.retain = "host"; takes twice the model on the host')
    parser.add_argument("--slots", type=int, default=3)
    parser.add_argument("--slot", default="1GiB", help="arena.slot_bytes")
    parser.add_argument("--trace-dir", type=Path, help="keep traces of the pushes there, for ui.perfetto.dev")
    parser.add_argument("--no-ceilings", action="store_true")
    arguments = parser.parse_args()
    gpus = torch.cuda.device_count()
    arguments.ranks = arguments.ranks or (gpus // 2 if arguments.engines in HALVES else gpus)
    figures, plain = push(arguments)
    ceilings = plain | ({} if arguments.no_ceilings else measure())
    if arguments.retain:
        ceilings["copy of one GPU to locked host memory"] = measure_to_host()
    figures["ceilings"] = ceilings
    if arguments.engines in HALVES:
        gpus //= 2
    into_each = figures["bytes"] / (1 if arguments.engines == "replicas" else gpus)
    rate = into_each / figures["seconds"] / 1e9
    delivered = arguments.in_place and arguments.engines == "away"
    rows = [
        ["model", f"{arguments.shape}, {figures['bytes'] / 1e9:.1f} GB, {figures['tensors']} tensors"],
        ["GPUs, trainer ranks, engines", f"{gpus}, {arguments.ranks}, {arguments.engines}"],
        ["arenas", f"{arguments.slots} slots of {arguments.slot} on each GPU"],
        ["read where the trainer has it", "yes" if figures["drawn"] else "no"],
        ["push, median", f"{figures['seconds']:.4f} s"],
        *(
            [
                ["  the first two, which lock memory", " and ".join(f"{s:.2f} s" for s in figures["first_seconds"])],
                ["  bytes kept / seconds of a push", f"{figures['bytes'] / figures['seconds'] / 1e9:.1f} GB/s"],
            ]
            if arguments.retain
            else []
        ),
        ["  weights read until (trainer free)", f"{figures['until_filled']:.4f} s"],
        *([f"  {name}", f"{seconds * 1e3:.1f} ms"] for name, seconds in figures["phases"].items()),
        ["fill, into each GPU", f"{figures['bytes'] / gpus / figures['phases']['fill'] / 1e9:.0f} GB/s"],
        *(
            [["on the wire, into each GPU", f"{into_each / figures['phases']['wire'] / 1e9:.0f} GB/s"]]
            if delivered
            else [["load, into each GPU", f"{into_each / figures['phases']['load'] / 1e9:.0f} GB/s"]]
        ),
        ["whole push, into each GPU", f"{rate:.0f} GB/s"],
        *([name, f"{value:.0f} GB/s"] for name, value in ceilings.items()),
        *([f"whole push / {name}", f"{rate / value:.2f}"] for name, value in plain.items()),
        # a bridge that delivers has memory of others mapped, which would count as its own
        *([] if delivered else [["GPU memory of a bridge beside its slots", f"{figures['bridge_extra_mib']} MiB"]]),
    ]
    figures["gpu"] = {"name": torch.cuda.get_device_name(0), "count": gpus, "torch": torch.__version__}
    report("pushes between GPUs", ("what", "figure"), rows, figures, arguments.json)


def push(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    """Run the pushes. Returns the ranks' figures together, and those of plain broadcasts between the halves, if any."""
    gpus = torch.cuda.device_count()
    away, halves = arguments.engines == "away", arguments.engines in HALVES
    with Fleet() as fleet:
        (fleet.root / "model").mkdir()
        shapes.load(arguments.shape).with_layers(arguments.layers).write(fleet.root / "model")
        read_config(fleet.root / "model")  # or say what the reference engine does not serve
        flags = ["--load-format", "dummy"]
        if halves:
            there = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus // 2, gpus)))}
            model = fleet.root / "model"
            engines = [fleet.start_engine("e0", model, tp=gpus // 2, device="cuda", flags=flags, wait=False, env=there)]
        elif arguments.engines == "tp":
            engines = [fleet.start_engine("e0", fleet.root / "model", tp=gpus, device="cuda", flags=flags, wait=False)]
        else:
            engines = [
                fleet.start_engine(
                    f"e{i}",
                    fleet.root / "model",
                    device="cuda",
                    flags=flags,
                    wait=False,
                    env={"CUDA_VISIBLE_DEVICES": str(i)},
                )
                for i in range(gpus)
            ]
        for engine in engines:
            fleet.wait_engine(engine)
        sections: Any = {
            "arena": {"slots": arguments.slots, "slot_bytes": arguments.slot, "device": "cuda"},
            "timeouts": {"operation": 120.0},
            "log": {"trace_dir": str(arguments.trace_dir or "")},
        }
        retain = {"retain": "host" if arguments.retain else "none"}
        if away:
            uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(gpus)]
            home, far = ({"gpus": part} for part in (uuids[: gpus // 2], uuids[gpus // 2 :]))
            peer = fleet.start_daemon("away", engines, node=far, **sections)
            daemon = fleet.start_daemon("bench", peers=[peer], node=home | retain, **sections)
        else:
            daemon = fleet.start_daemon("bench", engines, node=retain, **sections)

        def keeps() -> bool:  # a node without engines starts its keeper in the first push
            return all(keeper.pid is not None for keeper in fetch_status(daemon.endpoint).keepers)

        if not eventually(keeps, seconds=60):
            raise SystemExit(daemon.tail(60))
        script = Path(__file__).with_name("gpu_trainer.py")
        options = ["--model", str(fleet.root / "model"), "--daemon", daemon.endpoint, "--out", str(fleet.root)]
        options += ["--pushes", str(arguments.pushes + 2), *(["--in-place"] if arguments.in_place else [])]
        trainer = fleet.torchrun("trainer", script, arguments.ranks, options)
        status = trainer.wait(500)
        print(trainer.tail(60), file=sys.stderr)
        if status:
            raise SystemExit("\n".join([trainer.tail(100), daemon.tail(40), *(e.tail(20) for e in engines)]))
        ranks = [json.loads((fleet.root / f"rank{r}.json").read_text()) for r in range(arguments.ranks)]
        found = fetch_status(daemon.endpoint)
        bridges, kept = found.bridges, found.kept.get("default")
        users = _users()
        plain: dict[str, float] = {}
        if halves:
            for engine in engines:  # the model has room on a GPU once more
                fleet.end(engine)
            plain = broadcasts(fleet, fleet.root / "model", bridges[0].slot_bytes, gpus)
        used = [users.get(bridge.pid or 0, 0) - bridge.slots * bridge.slot_bytes / 2**20 for bridge in bridges]
    first = ranks[0]["pushes"][2:]
    if arguments.in_place and not all(engine["drawn"] for row in first for engine in row["engines"]):
        raise SystemExit(f"an engine read slots after all: {daemon.tail(20)}")
    if arguments.retain and kept != ranks[0]["pushes"][-1]["version"]:
        raise SystemExit(f"the last push was not kept, but {kept}")
    if not all(row["complete"] for row in first):
        raise SystemExit(f"a push was not complete: {first[-1]['engines']}")

    def median(rows: list[float]) -> float:
        return statistics.median(rows)

    figures = {
        "bytes": first[0]["bytes"],
        "tensors": first[0]["tensors"],
        "buckets": first[0]["buckets"],
        "drawn": all(engine["drawn"] for row in first for engine in row["engines"]),
        "seconds": median([row["wall_seconds"] for row in first]),
        "first_seconds": [row["wall_seconds"] for row in ranks[0]["pushes"][:2]],
        "retain": arguments.retain,
        "seconds_all": [row["wall_seconds"] for row in first],
        "until_filled": median(
            [max(r["pushes"][i + 2]["until_filled_seconds"] for r in ranks) for i in range(len(first))]
        ),
        "blocked": max(r["blocked_median"] for r in ranks),
        "phases": {name: median([row["phases"][name] for row in first]) for name in first[0]["phases"]},
        "bridge_extra_mib": round(max(used)) if used else 0,
    }
    return figures, plain


def _users() -> dict[int, float]:
    """Return the MiB of GPU memory that each process uses."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    pairs = (line.split(",") for line in listed.splitlines() if line.strip())
    return {int(pid): float(used) for pid, used in pairs if used.strip().isdigit()}


if __name__ == "__main__":
    main()
