"""Many pushes between GPUs: is anything left behind, and does a slow reader ever see its slot filled again?

    python -m bench.gpu_soak --pushes 1000 --races 500 --json out.json

Leak: a 2 GB model to an engine of tp 2. GPU memory of every process, this trainer's allocated and reserved bytes, the
ledger and /dev/shm are compared after the second push and after the last.
Race: one slot on each GPU, readers whose GPUs wait at random before they read, two sets of weights in turn. Readers
copy each bucket whole and compare the checksum of their copy with the trainer's. The engine's tensors are compared
after each push as always. Then the same with readers that release buckets before they have read them, which the
checks must detect.

    python -m bench.gpu_soak --collectives 200 --json out.json

Collectives, and nothing else: a trainer of two ranks, on two nodes of a GPU each, runs all-reduces over NCCL on these
GPUs without a pause while it pushes. No push may hang or miss an engine, and during each the all-reduces have to go on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from bench.bench_push import MODEL as TWO_GB
from bench.harness import report
from weightsync import push_weights
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.adapters.reference.config import ModelConfig, write_config
from weightsync.adapters.reference.sharding import checkpoint_tensors
from weightsync.errors import WeightSyncError
from weightsync.fleet import Daemon, Fleet, FleetError
from weightsync.operator import fetch_status

RANK = Path(__file__).parents[1] / "tests/gpu/fsdp2_push.py"
_PATIENCE = 540.0  # seconds for a trainer to push so often beside its own work
SMALL = ModelConfig(
    vocab_size=32003,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    dtype="bfloat16",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--pushes", type=int, default=1000)
    parser.add_argument("--races", type=int, default=500)
    parser.add_argument("--collectives", type=int, help="so many pushes beside the trainer's own; two GPUs")
    arguments = parser.parse_args()
    if arguments.collectives:
        with Fleet() as fleet:
            beside_collectives(fleet, arguments.collectives, arguments.json)
        return
    with Fleet() as fleet:
        leak = soak(fleet, arguments.pushes)
    with Fleet() as fleet:
        fenced = race(fleet, arguments.races, hasty=False)
    with Fleet() as fleet:
        hasty = race(fleet, 20, hasty=True)
    rows = [
        [f"GPU memory of {leak['processes']} processes, push 2 → {arguments.pushes}", leak["verdict"]],
        ["trainer, allocated and reserved bytes", f"{leak['trainer_before']} → {leak['trainer_after']}"],
        ["exports outstanding", str(leak["outstanding"])],
        ["/dev/shm", "as before" if leak["shm"] else "changed"],
        ["seconds a push", f"{leak['seconds'] / arguments.pushes:.4f}"],
        ["race with the fence, pushes that failed", f"{fenced['failed']} of {fenced['pushes']}"],
        ["race without it", f"{hasty['failed']} of {hasty['pushes']}"],
    ]
    good = leak["equal"] and leak["shm"] and not leak["outstanding"] and not fenced["failed"] and hasty["failed"]
    figures = {"leak": leak, "fenced": fenced, "hasty": hasty, "good": bool(good), "gpu": torch.cuda.get_device_name(0)}
    report("soak on GPUs", ("what", "found"), rows, figures, arguments.json)
    if not good:
        raise SystemExit("not as it should be")


def weights(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Make random weights on this process's GPU."""
    torch.manual_seed(seed)
    return {
        name: torch.empty(shape, dtype=torch.bfloat16, device="cuda").uniform_()
        for name, shape in checkpoint_tensors(config).items()
    }


def start(fleet: Fleet, config: ModelConfig, flags: list[str], **arena: Any) -> Daemon:
    """Start an engine of tp 2 without weights, and its daemon."""
    (fleet.root / "model").mkdir()
    write_config(config, fleet.root / "model")
    options = ["--load-format", "dummy", *flags]
    engine = fleet.start_engine("e0", fleet.root / "model", tp=2, device="cuda", flags=options)
    return fleet.start_daemon("soak", [engine], arena=arena)


def soak(fleet: Fleet, pushes: int) -> dict[str, Any]:
    """Push repeatedly, and compare what every process held after push 2 and after the last."""
    daemon = start(fleet, TWO_GB, [], slots=3, slot_bytes="256MiB")
    sent = weights(TWO_GB, 0)
    before: dict[str, Any] = {}
    began = time.perf_counter()
    for version in range(1, pushes + 1):
        outcome = push_weights(sent, version=version, daemon=daemon.endpoint)
        assert outcome.complete, str(outcome)
        if version == 2:
            before = held()
            began = time.perf_counter()
    seconds = time.perf_counter() - began
    after = held()
    outstanding = sum(bridge.outstanding for bridge in fetch_status(daemon.endpoint).bridges)
    equal = before["processes"] == after["processes"] and before["trainer"] == after["trainer"]
    return {
        "pushes": pushes,
        "bytes": sum(tensor.nbytes for tensor in sent.values()),
        "seconds": seconds,
        "processes": len(after["processes"]),
        "equal": equal,
        "verdict": "equal" if equal else f"{before['processes']} → {after['processes']}",
        "trainer_before": before["trainer"],
        "trainer_after": after["trainer"],
        "mib_by_process": after["processes"],
        "outstanding": outstanding,
        "shm": before["shm"] == after["shm"],
    }


def race(fleet: Fleet, pushes: int, *, hasty: bool) -> dict[str, Any]:
    """Push two sets of weights in turn through one slot a GPU, to slow readers. `hasty` ones release before reading."""
    trial = ["--trial", json.dumps({"slow": 0.004, "hasty": hasty})]
    daemon = start(fleet, SMALL, trial, slots=1, slot_bytes="8MiB")
    sent = [weights(SMALL, seed) for seed in range(2)]
    failed, why, buckets = 0, "", 0
    for version in range(1, pushes + 1):
        try:
            outcome = push_weights(sent[version % 2], version=version, daemon=daemon.endpoint, timeout=60)
        except WeightSyncError as error:
            failed, why = failed + 1, error.message
            continue
        buckets += outcome.buckets
        if not outcome.complete:
            failed += 1
            why = next((str(e.error.message) for e in outcome.engines if e.error is not None), "")
    return {"pushes": pushes, "failed": failed, "buckets": buckets, "last_failure": why}


def beside_collectives(fleet: Fleet, pushes: int, out: Path | None) -> None:
    """Push beside a trainer's own collectives, as the module says, and report."""
    random_checkpoint(SMALL, fleet.root / "model", 0)
    daemons: list[Daemon] = []
    for gpu in (1, 0):  # the daemon of GPU 0 starts last, because its peer has to exist
        uuid = f"GPU-{torch.cuda.get_device_properties(gpu).uuid}"
        env = {"CUDA_VISIBLE_DEVICES": uuid}
        engine = fleet.start_engine(f"e{gpu}", fleet.root / "model", tp=2, device="cuda", env=env)
        node = {"gpus": [uuid]}
        arena = {"slots": 3, "slot_bytes": "8MiB"}
        daemons.insert(0, fleet.start_daemon(f"soak{gpu}", [engine], peers=daemons, node=node, arena=arena))
    where = ",".join(daemon.endpoint for daemon in daemons)
    arguments = [str(fleet.root / "model"), where, "1", str(fleet.root), str(pushes), "busy", "default"]
    began = time.perf_counter()
    trainer = fleet.torchrun("trainer", RANK, 2, arguments)
    why = ""
    try:
        status = trainer.wait(_PATIENCE)
        why = f"the trainer ended with status {status}" if status else ""
    except FleetError:
        why = f"it hangs: not over after {_PATIENCE:g} s"
    seconds = time.perf_counter() - began
    told = [] if why else json.loads((fleet.root / "rank0.json").read_text())
    reduced = [push["collectives"] for push in told]
    figures = {
        "pushes": pushes,
        "complete": sum(push["complete"] for push in told),
        "seconds": seconds,  # with the trainer's start
        "collectives": sum(reduced),
        "fewest_in_a_push": min(reduced, default=0),
        "why": why,
        "log": "\n".join(child.tail(40) for child in (trainer, *daemons)) if why else "",
        "gpu": torch.cuda.get_device_name(0),
    }
    figures["good"] = figures["complete"] == pushes and figures["fewest_in_a_push"] > 0
    rows = [
        ["pushes that reached every engine", f"{figures['complete']} of {pushes}"],
        ["all-reduces of the trainer's own meanwhile", str(figures["collectives"])],
        ["… in the push that had the fewest", str(figures["fewest_in_a_push"])],
        ["what went wrong", why or "nothing"],
    ]
    report("pushes beside a trainer's own NCCL", ("what", "found"), rows, figures, out)
    if not figures["good"]:
        raise SystemExit(f"not as it should be\n{figures['log']}")


def held() -> dict[str, Any]:
    """Return what is held now: MiB on GPUs by process, this trainer's bytes, files in /dev/shm."""
    torch.cuda.synchronize()
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    return {
        "processes": sorted(line.strip() for line in listed.splitlines()),
        "trainer": (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()),
        "shm": sorted(path.name for path in Path("/dev/shm").iterdir()),
    }


if __name__ == "__main__":
    main()
