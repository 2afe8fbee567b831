"""gpu_groups.py: push into real, stock vLLM and SGLang servers on other GPUs, through groups over NCCL.

    python -m engines.gpu_groups --models DIR --vllm vllm --sglang "python -m sglang.launch_server" --json groups.json

DIR holds the checkpoints dense-base and dense-new. Nothing of weightsync is in the servers, and no memory is shared
with them: the trainer and a weightsyncd are on the first half of the GPUs, the servers on the others.
For each engine a server is started on NEW and asked for greedy tokens and logprobs. Another is started on BASE, pushed
to NEW, asked the same, pushed back, and pushed to --soak times. Then the bridges are killed, once between two pushes
and once within one; after each, the server is pushed to again and asked. Prints its findings, exits 1 unless all agree.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from engines.gpu_servers import Case, Server, compare, gpu_memory
from weightsync import push_weights, push_weights_async
from weightsync.errors import WeightSyncError
from weightsync.operator import fetch_status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightsync.trainer.client import PushHandle

_WARM = 5  # pushes after which no memory is allocated for the first time


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", type=Path, required=True)
    p.add_argument("--vllm", default="")
    p.add_argument("--sglang", default="")
    p.add_argument("--logs", type=Path, default=Path("/tmp/gpu-groups"))
    p.add_argument("--memory", type=float, default=0.15)
    p.add_argument("--soak", type=int, default=50)
    p.add_argument("--json", type=Path, default=None)
    options = p.parse_args()
    options.logs.mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.device_count()
    homes = list(range(max(1, gpus // 2)))
    away = list(range(len(homes), gpus))
    cases = [Case(kind, "group", tp=len(away)) for kind in ("vllm", "sglang") if getattr(options, kind)]
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        pairs = []
        for number, case in enumerate(cases):
            visible, pair = ",".join(map(str, away)), []
            for turn, tag in enumerate(("base", "new")):
                port = 22000 + 100 * number + 50 * turn
                pair.append(Server(case, options.models / f"dense-{tag}", port, visible, options))
                stack.callback(pair[-1].stop)
            pairs.append(pair)
        for case, (server, oracle) in zip(cases, pairs, strict=True):
            found[case.name] = prove(case, server, oracle, homes, options)
    found |= {"command": sys.argv, "gpu": torch.cuda.get_device_name(0), "gpus": gpus, "torch": torch.__version__}
    print(json.dumps(found, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if all(found[case.name].get("good") for case in cases) else 1


def prove(case: Case, server: Server, oracle: Server, homes: list[int], options: argparse.Namespace) -> dict[str, Any]:
    for one in (server, oracle):
        if problem := one.wait():
            return {"problem": problem}
    wanted, base = oracle.generate(), server.generate()
    oracle.stop()
    weights = {tag: on_gpus(load_file(options.models / f"dense-{tag}" / "model.safetensors"), homes) for tag in TAGS}
    versions = iter(range(1, 10**6))
    with daemon(case, server, homes, options) as endpoint:

        def push(tag: str) -> Any:
            report = push_weights(weights[tag], version=next(versions), daemon=endpoint, timeout=120.0)
            if not report.complete:
                raise SystemExit(f"{case.name}: {[str(e.error) for e in report.engines]}\n{tail(options, case)}")
            return report

        about = fetch_status(endpoint)
        first = push("new")
        equal, worst = compare(server.generate(), wanted)
        push("base")
        back = compare(server.generate(), base)[0]
        seconds, memory = [], gpu_memory()
        for turn in range(options.soak):
            seconds.append(push("new" if turn % 2 else "base").seconds)
            if turn + 1 == _WARM:
                memory = gpu_memory()
        now = gpu_memory()
        kill_bridges(endpoint)
        again = push("new")
        after = compare(server.generate(), wanted)[0]
        handle = push_weights_async(weights["base"], version=next(versions), daemon=endpoint, timeout=120.0)
        wait_loading(handle, endpoint)
        kill_bridges(endpoint)
        within = outcome(handle)
        try:  # an engine may not recover from this by itself, and then the error has to say so
            once_more = f"complete in {push('new').seconds:.3f} s"
            after_within = compare(server.generate(), wanted)[0]
        except WeightSyncError as error:
            once_more, after_within = str(error), "restart it" in str(error)
    grown = {pid: now.get(pid, 0) - mib for pid, mib in memory.items() if now.get(pid, 0) > mib}
    return {
        "software": about.engines[0].software,
        "profile": about.engines[0].profile,
        "bridges": len(about.bridges),
        "moved": not compare(base, wanted)[0],
        "tokens_equal": equal,
        "worst_logprob": worst,
        "back_equal": back,
        "first_seconds": first.seconds,
        "seconds_median": statistics.median(seconds) if seconds else None,
        "pushes": len(seconds),
        "mib_grown": grown,
        "after_the_bridge_was_killed": {"tokens_equal": after, "seconds": again.seconds},
        "killed_in_a_push": {"that_push": within, "next_push": once_more, "as_said": after_within},
        "good": equal and back and after and after_within and not grown and not compare(base, wanted)[0],
    }


TAGS = ("base", "new")


def kill_bridges(endpoint: str) -> None:
    for bridge in fetch_status(endpoint).bridges:
        os.kill(bridge.pid or 0, signal.SIGKILL)


def wait_loading(handle: PushHandle, endpoint: str) -> None:
    """Return once an engine has loaded a bucket and not all, or the push is over already."""
    while not handle.done():
        push = fetch_status(endpoint).push
        if push is not None and any(engine.loaded for engine in push.engines):
            return


def outcome(handle: PushHandle) -> str:
    """How the push ended, in words."""
    try:
        report = handle.result()
    except WeightSyncError as error:
        return f"{type(error).__name__}: {error.message}"
    return "complete" if report.complete else str([str(engine.error) for engine in report.engines])


def on_gpus(tensors: dict[str, torch.Tensor], homes: list[int]) -> dict[str, torch.Tensor]:
    """Put the tensors on the trainer's first GPU: buckets go to the slots of all of its node's GPUs in any case."""
    return {name: tensor.to(f"cuda:{homes[0]}") for name, tensor in tensors.items()}


@contextmanager
def daemon(case: Case, server: Server, homes: list[int], options: argparse.Namespace) -> Iterator[str]:
    """Run a weightsyncd on the GPUs `homes`, which knows the server; yields its endpoint."""
    endpoint = f"ipc://{options.logs}/{case.kind}.sock"
    uuids = ", ".join(f'"{torch.cuda.get_device_properties(home).uuid}"' for home in homes)
    lines = ["[node]", f'name = "groups-{case.kind}"', f'listen = "{endpoint}"', f"gpus = [{uuids}]"]
    lines += ["[arena]", 'device = "cuda"', 'slot_bytes = "4MiB"', "[timeouts]", "operation = 30"]
    lines += [
        "[[engines]]",
        f'name = "{case.kind}"',
        f'kind = "{case.kind}"',
        'path = "group"',
        f'url = "{server.url}"',
    ]
    config = options.logs / f"{case.kind}.toml"
    config.write_text("\n".join(lines) + "\n")
    with (options.logs / f"{case.kind}-daemon.log").open("wb") as out:
        command = [sys.executable, "-m", "weightsyncd", "--node-config", str(config)]
        alike = {"NCCL_CUMEM_ENABLE": "0"} if case.kind == "sglang" else {}  # as SGLang sets it in its workers
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | alike)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if all(engine.state not in ("unknown", "lost") for engine in fetch_status(endpoint).engines):
                    break
            except WeightSyncError:
                pass
            if process.poll() is not None:
                raise SystemExit(f"weightsyncd ended\n{tail(options, case)}")
            time.sleep(0.2)
        yield endpoint
    finally:
        process.terminate()
        process.wait(30)


def tail(options: argparse.Namespace, case: Case) -> str:
    return "\n".join((options.logs / f"{case.kind}-daemon.log").read_text().splitlines()[-25:])


if __name__ == "__main__":
    sys.exit(main())
