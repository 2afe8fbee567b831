"""Peers: tools that people use instead of weightsync, as further ways of `engines.gpu_speed` and `gpu_apart`.

Each peer is a script that torchrun starts in the engine's own environment, one rank on each of the trainer's GPUs, with
the same shards of the same model (`engines/peer_ranks.py`). It drives the framework's or the engine's own code, and
reports version and settings.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsync.fleet import Child, FleetError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightsync.fleet import Fleet

_HERE = Path(__file__).resolve().parent
WAIT = 200.0  # seconds for all of a peer: imports, shards, pushes and, for checkpoint-engine, 61 GB to the host
WARM = 1  # pushes of a peer before those that count


@dataclass(frozen=True)
class Peer:
    """One script."""

    name: str
    kinds: tuple[str, ...]  # of the servers it pushes into
    script: str


# into servers on the trainer's GPUs. Of one kind the riskier come later: if a trainer dies, checkpoint-engine's worker
# waits for it for ever
PEERS = {
    peer.name: peer
    for peer in (
        Peer("slime", ("sglang",), "peer_slime.py"),
        Peer("vllm-ipc", ("vllm",), "peer_vllm_ipc.py"),
        Peer("checkpoint-engine", ("sglang", "vllm", "reference"), "peer_checkpoint_engine.py"),
    )
}
# into servers on GPUs of their own: NCCL has one rank on a GPU
APART = Peer("vllm-nccl", ("vllm",), "peer_vllm_nccl.py")


def run(
    fleet: Fleet,
    peer: Peer,
    kind: str,
    python: str,
    arguments: Sequence[str],
    *,
    logs: Path,
    engine: str,
    ranks: int,
    tp: int,
) -> dict[str, Any]:
    """Make all pushes of one peer into an engine of this kind, and return a row like those of `gpu_speed.push`.

    A row that is not good says why.
    """
    arguments = [*arguments, "--kind", kind]
    out = fleet.root / peer.name
    out.mkdir()
    command = [*shlex.split(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    log = logs / f"{peer.name}-{kind}.log"
    with log.open("wb") as to:
        process = subprocess.Popen(
            [*command, str(_HERE / peer.script), *arguments, "--out", str(out)],
            stdin=subprocess.DEVNULL,
            stdout=to,
            stderr=subprocess.STDOUT,
            env={**fleet.env, **environment(os.environ)},
            start_new_session=True,
        )
    child = Child(peer.name, process, log)
    fleet.children.append(child)
    try:
        status = child.wait(WAIT)
    except FleetError:
        status = -1
        fleet.end(child)
    print(f"{kind} {peer.name}\n{child.tail(100 if status else 40)}", flush=True)
    files = [out / f"rank{rank}.json" for rank in range(ranks)]
    if status or not all(file.exists() for file in files):
        return {"engine": engine, "way": peer.name, "peer": True, "good": False, "log": [child.tail(100)]}
    return row(peer, [json.loads(file.read_text()) for file in files], engine=engine, tp=tp)


def environment(around: Mapping[str, str]) -> dict[str, str]:
    """Return the variables by which a peer finds `bench` and weightsync.

    A wrapper that sets PYTHONPATH itself adds EXTRA_PYTHONPATH to it.
    """
    root = str(_HERE.parent)
    return {"EXTRA_PYTHONPATH": root, "PYTHONPATH": ":".join(filter(None, (root, around.get("PYTHONPATH"))))}


def row(peer: Peer, ranks: Sequence[Mapping[str, Any]], *, engine: str, tp: int) -> dict[str, Any]:
    """Make one row of the figures that all ranks have written."""
    first = ranks[0]
    pushes = first["pushes"]
    counted = pushes[WARM:] or pushes[-1:]
    phases = {name: statistics.median(push["phases"][name] for push in counted) for name in counted[0]["phases"]}
    before = {name: max(rank["before"][name] for rank in ranks) for name in first["before"]}
    return {
        "engine": engine,
        "way": peer.name,
        "peer": True,
        "software": first["software"],
        "settings": first["settings"],
        "tp": tp,
        "bytes": pushes[-1]["bytes"],
        "tensors": pushes[-1]["tensors"],
        "warm": WARM,
        "seconds": statistics.median(push["wall_seconds"] for push in counted),
        "seconds_each": [round(push["wall_seconds"], 4) for push in pushes],
        "until_filled": statistics.median(push["until_filled_seconds"] for push in counted),
        "before": {name: round(seconds, 4) for name, seconds in before.items()},
        "phases": {name: round(seconds, 4) for name, seconds in phases.items()},
        "checked": [0] * len(pushes),
        "good": all(push["complete"] for push in pushes),
        "pushes": pushes,
    }
