"""gpu_mixed.py: one push into vLLM on one node, and SGLang and a reference server on another, joined by NCCL.

    python -m engines.gpu_mixed --models DIR --plugins DIR --vllm vllm --sglang "python -m sglang.launch_server"

DIR holds the checkpoints dense-base and dense-new. The nodes are two daemons with a GPU each. Servers are started on
base; other servers, on new, generate the expected tokens. After a push of new, all servers must generate these, and
after a push of base their first tokens again. Then both are pushed in turn, --soak times in all: does an engine or a
bridge leave anything on a GPU? (The trainer, this process, may take a block of 2 MiB more when two of its copies
overlap; the table shows it.) --in-place: weights lie on the first GPU, and the engine there reads them in place, from
other memory in every push. Prints a table, exits 1 unless all agree.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from engines.gpu_servers import Case, Server, compare, gpu_memory
from weightsync.adapters.reference.config import read_config
from weightsync.adapters.reference.oracle import expected_checksums
from weightsync.errors import WeightSyncError
from weightsync.fleet import Fleet
from weightsync.operator import fetch_status
from weightsync.sources.checkpoint import CheckpointSource
from weightsync.trainer.client import push_source

_WARM = 20  # pushes after which no memory is allocated for the first time
VLLM, SGLANG = Case("vllm", "plugin"), Case("sglang", "plugin")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", type=Path, required=True)
    p.add_argument("--plugins", type=Path, required=True, help="folder that makes weightsync's plugins known")
    p.add_argument("--vllm", required=True)
    p.add_argument("--sglang", required=True)
    p.add_argument("--logs", type=Path, default=Path("/tmp/gpu-mixed"))
    p.add_argument("--memory", type=float, default=0.15)
    p.add_argument("--soak", type=int, default=200)
    p.add_argument("--in-place", action="store_true")
    p.add_argument("--json", type=Path, default=None)
    options = p.parse_args()
    options.logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        fleet = stack.enter_context(Fleet())
        found = run(fleet, stack, options)
    found |= {"command": sys.argv, "gpu": torch.cuda.get_device_name(0), "torch": torch.__version__}
    for name, value in found.items():
        print(f"{name:28} {value}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if found["good"] else 1


def run(fleet: Fleet, stack: ExitStack, options: argparse.Namespace) -> dict[str, Any]:
    servers, oracles = [], []
    for number, case in enumerate((VLLM, SGLANG)):
        for tag, several in (("base", servers), ("new", oracles)):
            port = 23000 + 100 * number + (50 if tag == "new" else 0)
            several.append(Server(case, options.models / f"dense-{tag}", port, str(number), options))
            stack.callback(several[-1].stop)
    reference = fleet.start_engine(
        "reference", options.models / "dense-base", device="cuda", env={"CUDA_VISIBLE_DEVICES": "1"}
    )
    if problems := [problem for server in (*servers, *oracles) if (problem := server.wait())]:
        raise SystemExit("\n".join(problems))
    wanted = [oracle.generate() for oracle in oracles]
    for oracle in oracles:
        oracle.stop()
    base = [server.generate() for server in servers]
    home = daemons(fleet, stack, options, servers, reference.url)

    versions = iter(range(1, 10**6))
    sources: dict[str, Any] = {
        tag: stack.enter_context(CheckpointSource(options.models / f"dense-{tag}")) for tag in ("base", "new")
    }
    if options.in_place:
        sources = {tag: {n: w.cuda() for n, w in weights(options, tag).items()} for tag in sources}
    drawn: list[list[str]] = []  # for each push, the engines that drew

    def push(tag: str) -> Any:
        report = push_source(
            sources[tag], version=next(versions), daemon=home, timeout=120.0, in_place=options.in_place
        )
        if not report.complete:
            raise SystemExit(f"a push was not complete: {report}")
        drawn.append([engine.engine for engine in report.engines if engine.drawn])
        return report

    def holds(tag: str) -> bool:
        with urllib.request.urlopen(f"{reference.url}/checksums", timeout=30) as answer:
            sums = json.load(answer)
        return bool(sums == expected_checksums(read_config(options.models / f"dense-{tag}"), weights(options, tag), 1))

    first = push("new")
    after = [compare(server.generate(), want) for server, want in zip(servers, wanted, strict=True)]
    found: dict[str, Any] = {
        "versions": sorted({str(engine.version) for engine in first.engines}),
        "engines": {engine.engine: engine.outcome for engine in first.engines},
        "moved": [not compare(b, w)[0] for b, w in zip(base, wanted, strict=True)],
        "tokens_equal": [equal for equal, _ in after],
        "worst_logprob": [worst for _, worst in after],
        "reference_equal": holds("new"),
    }
    push("base")
    found["back_equal"] = [compare(server.generate(), b)[0] for server, b in zip(servers, base, strict=True)]
    seconds = []
    memory = {2: gpu_memory()}
    for turn in range(options.soak):
        seconds.append(push("new" if turn % 2 else "base").seconds)
        if turn + 3 == _WARM:
            memory[_WARM] = gpu_memory()
    now = gpu_memory()
    found |= {
        "pushes": len(seconds) + 2,
        "read_in_place": {name: sum(name in names for names in drawn) for name in ("vllm", "sglang", "reference")},
        "seconds_median": sorted(seconds)[len(seconds) // 2] if seconds else None,
        "processes_on_gpus": {named(pid): mib for pid, mib in now.items()},
        "mib_grown": {
            f"since push {count}": {
                named(pid): now.get(pid, 0) - mib for pid, mib in before.items() if now.get(pid) != mib
            }
            for count, before in memory.items()
        },
        "reference_equal_at_last": holds("new" if options.soak and options.soak % 2 == 0 else "base"),
    }
    equal = (found["tokens_equal"], found["back_equal"], found["moved"])
    found["good"] = (
        all(all(one) for one in equal)
        and found["reference_equal"]
        and found["reference_equal_at_last"]
        and (not options.in_place or found["read_in_place"]["vllm"] > options.soak - 4)
        and not {name for name in found["mib_grown"][f"since push {_WARM}"] if not name.startswith(f"{os.getpid()} ")}
        and len(found["versions"]) == 1
    )
    return found


def named(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return f"{pid} (has ended)"
    return f"{pid} {words.strip()[-60:]}"


def weights(options: argparse.Namespace, tag: str) -> Any:
    from safetensors.torch import load_file

    return load_file(options.models / f"dense-{tag}" / "model.safetensors")


def daemons(fleet: Fleet, stack: ExitStack, options: argparse.Namespace, servers: list[Server], reference: str) -> str:
    """Start both nodes. Returns the endpoint of the node that has the other as its peer."""
    vllm, sglang = servers
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(2)]
    engines = [
        [("vllm", "vllm", "plugin", vllm.url)],
        [("sglang", "sglang", "plugin", sglang.url), ("reference", "reference", "auto", reference)],
    ]
    endpoints = [f"ipc://{fleet.root}/mixed{number}.sock" for number in range(2)]
    for number in (1, 0):
        lines = ["[node]", f'name = "mixed{number}"', f'listen = "{endpoints[number]}"', f'gpus = ["{uuids[number]}"]']
        lines += ["[arena]", 'device = "cuda"', 'slot_bytes = "4MiB"', "alignment = 8"]
        lines += ["[timeouts]", "operation = 60"]
        if number == 0:
            lines += ["[cluster.peers]", f'mixed1 = "{endpoints[1]}"']
        for name, kind, path, url in engines[number]:
            lines += ["[[engines]]", f'name = "{name}"', f'kind = "{kind}"', f'path = "{path}"', f'url = "{url}"']
        config = options.logs / f"mixed{number}.toml"
        config.write_text("\n".join(lines) + "\n")
        out = stack.enter_context((options.logs / f"mixed{number}.log").open("wb"))
        command = [sys.executable, "-m", "weightsyncd", "--node-config", str(config)]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            status = fetch_status(endpoints[0])
        except WeightSyncError:
            time.sleep(0.3)
            continue
        if status.peers == {"mixed1": "connected"} and all(engine.state != "unknown" for engine in status.engines):
            return endpoints[0]
        time.sleep(0.3)
    raise SystemExit(f"the nodes did not join in 60 s, see {options.logs}")


if __name__ == "__main__":
    sys.exit(main())
