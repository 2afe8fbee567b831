"""checkpoint-engine's way into SGLang and vLLM, as in their examples, and into the reference engine's parameters.

Runs in an environment with checkpoint-engine 0.1.2, started with torchrun, one process on each GPU of the engine. Its
ParameterServer holds a checkpoint in pinned host memory: whole tensors, each on one rank. `update` brings them to GPUs
in buckets (of up to 8 GiB, its default, or less if less memory is free) and broadcasts each over NCCL. The engine reads
each bucket there through CUDA IPC, within one request, and learns its contents over ZeroMQ. The requests:

sglang      /update_weights_from_ipc, as in sglang.srt.checkpoint_engine.update
vllm        /collective_rpc for checkpoint-engine's worker extension, as in its examples/update.py
reference   none; each rank has a process with a rank's parameters of the reference engine (`reference_loader.py`)

Shards are gathered, and each rank registers an equal share of the tensors, in their order, as in that example. This
happens once and is reported apart: only `gather_metas` and `update` are timed. But a trainer has to gather and register
again whenever weights have changed (0.1.2 takes new pinned memory each time). As in the examples, generation is not
paused; SGLang's cache is flushed, vLLM's is not. Nothing is compared with the weights that were sent.
"""

from __future__ import annotations

import os
import sys
import time

import checkpoint_engine
import httpx
import torch
import torch.distributed as dist
from checkpoint_engine import ps as parameter_server
from peer_ranks import options, run, start, synchronize
from reference_loader import ReferenceLoader

NAME = "weights"
ANSWER = 200.0  # seconds for the one request that an update is


def main() -> None:
    arguments = options(__doc__)
    weights = start(arguments.model)
    sys.modules["mooncake"] = None  # used between machines: would look for RDMA devices, and there may be none
    parameter_server._get_ip = lambda: "127.0.0.1"  # used between machines: asks a network that may be missing
    server = parameter_server.ParameterServer()
    before = register(server, weights)
    tell = teller(arguments)

    def push(version: int) -> dict[str, float]:
        times = [time.perf_counter()]
        server.gather_metas(NAME)
        times.append(time.perf_counter())
        server.update(NAME, lambda paths: tell(dict(paths), version))
        times.append(time.perf_counter())
        return {"metas": times[1] - times[0], "update": times[2] - times[1]}

    limit = os.environ.get("PS_MAX_BUCKET_SIZE_GB", "8")
    run(
        arguments,
        weights,
        push,
        software=f"checkpoint-engine {checkpoint_engine.__version__}",
        settings=f"ParameterServer.update, broadcasts of up to {limit} GiB, registered once, before all pushes",
        before=before,
        after=(lambda version: check(arguments.url, version)) if arguments.kind == "sglang" else None,
    )


@torch.no_grad()
def register(server, weights) -> dict[str, float]:
    """Gather and register this rank's share of all tensors, in pinned memory. Returns the seconds of each step."""
    each = -(-len(weights) // dist.get_world_size())
    mine = set(list(weights)[dist.get_rank() * each :][:each])
    began = time.perf_counter()
    share = {}
    for name, tensor in weights.items():
        whole = tensor.full_tensor()
        if name in mine:
            share[name] = whole.cpu()
    synchronize()
    gathered = time.perf_counter()
    server.register_checkpoint(NAME, named_tensors=share)
    return {"gather": gathered - began, "register": time.perf_counter() - gathered}


def teller(arguments):
    """Return what has the engine load an update, given each GPU's socket and the version. It returns afterwards."""
    if arguments.kind == "reference":
        loader = ReferenceLoader(arguments.model, dist.get_world_size(), dist.get_rank(), wait=ANSWER)
        return lambda sockets, _version: loader.load(list(sockets.values()))

    def tell(sockets: dict[str, str], version: int) -> None:
        if dist.get_rank():
            return
        if arguments.kind == "vllm":
            request(f"{arguments.url}/collective_rpc", {"method": "update_weights_from_ipc", "args": [sockets]})
        else:
            body = {"zmq_handles": sockets, "flush_cache": True, "weight_version": str(version)}
            request(f"{arguments.url}/update_weights_from_ipc", body)

    return tell


def request(url: str, body: dict[str, object]) -> None:
    try:
        answer = httpx.post(url, json=body, timeout=ANSWER)
        answer.raise_for_status()
        failed = "" if answer.json().get("success", True) else answer.text
    except httpx.HTTPError as error:
        failed = f"{type(error).__name__}: {error}"
    if failed:
        print(f"{url}: {failed}", flush=True)
        os._exit(1)  # the ranks would wait for ever for an engine that does not come


def check(url: str, version: int) -> None:
    """Fail unless the server says that it holds this version."""
    if dist.get_rank() == 0:
        held = httpx.get(f"{url}/model_info", timeout=ANSWER).json()["weight_version"]
        assert held == str(version), f"the server holds {held}, not {version}"


if __name__ == "__main__":
    main()
