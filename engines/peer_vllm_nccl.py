"""vLLM's own way for a trainer on other GPUs: the trainer's API of its `nccl` backend, packed, over HTTP.

Runs in vLLM's environment, started with torchrun, one process on each of the trainer's GPUs. Rank 0 and the server's
workers make one NCCL group before the first push. Each push follows vLLM's examples for HTTP and for FSDP
(rlhf_http_nccl.py, rlhf_nccl_fsdp_ep.py):

1. pause, start_weight_update
2. `NCCLWeightTransferEngine.trainer_send_weights` with `packed=True` and its default buffers, two of 1 GiB, while the
   server is at update_weights. Rank 0 brings whole tensors to it, gathered one after the other with `full_tensor()`,
   which the other ranks join.
3. finish_weight_update, resume

All of this but the loop over tensors is vLLM's code. It is the API of 0.26; later versions have another. Nothing is
compared with the weights that were sent. Weights may change once they have been sent. The server needs the weight
transfer backend "nccl", no other group so far, and VLLM_SERVER_DEV_MODE=1.
"""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor

import requests
import torch.distributed as dist
import vllm
from peer_ranks import options, run, start, synchronize, whole
from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerSendWeightsArgs, NCCLWeightTransferEngine

PAUSE = 60.0  # seconds for the server to stop generating, or to go on
WAIT = 120.0  # seconds for the server to join, or to load everything
_beside = ThreadPoolExecutor(1)  # sends requests to the server, while this thread meets its workers over NCCL


def main() -> None:
    arguments = options(__doc__)
    weights = start(arguments.model)
    first, client = dist.get_rank() == 0, HTTPVLLMWeightSyncClient(arguments.url)
    began = time.perf_counter()
    sending = NCCLTrainerSendWeightsArgs(group=join(client) if first else None, packed=True)
    dist.barrier()
    joining = time.perf_counter() - began
    told = {
        "names": list(weights),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()],
        "shapes": [list(tensor.shape) for tensor in weights.values()],
        "packed": True,
    }

    def push(version: int) -> dict[str, float]:
        times = [time.perf_counter()]
        if first:
            requests.post(f"{arguments.url}/pause", timeout=PAUSE).raise_for_status()
            client.start_weight_update()
        dist.barrier()
        times.append(time.perf_counter())
        if first:
            update = ask(client.update_weights, told)
            NCCLWeightTransferEngine.trainer_send_weights(whole(weights), sending)
        else:
            for _ in whole(weights):
                pass
        synchronize()
        times.append(time.perf_counter())
        if first:
            update.result(WAIT)
        times.append(time.perf_counter())
        if first:
            client.finish_weight_update()
            requests.post(f"{arguments.url}/resume", timeout=PAUSE).raise_for_status()
        times.append(time.perf_counter())
        return {name: times[i + 1] - times[i] for i, name in enumerate(("start", "send", "load", "finish"))}

    buffers = f"{sending.packed_num_buffers} buffers of {sending.packed_buffer_size_bytes >> 20} MiB"
    run(
        arguments,
        weights,
        push,
        software=f"vLLM {vllm.__version__}",
        settings=f"trainer_send_weights over NCCL, packed into {buffers}, full_tensor() of each tensor",
        before={"join": joining},
        held=("start", "send"),
    )


def join(client: HTTPVLLMWeightSyncClient):
    """Make the NCCL group of this rank and all workers of the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answer = requests.get(f"{client.base_url}/get_world_size", timeout=PAUSE)
    answer.raise_for_status()
    world = {"master_address": "127.0.0.1", "master_port": port, "world_size": answer.json()["world_size"] + 1}
    joined = ask(client.init_weight_transfer_engine, {**world, "rank_offset": 1})
    group = NCCLWeightTransferEngine.trainer_init(world)
    joined.result(WAIT)
    return group


def ask(call, body) -> Future:
    """Send a request from another thread. If it fails, end the process: this thread would wait in NCCL for ever."""

    def answered(done: Future) -> None:
        if error := done.exception():
            said = getattr(getattr(error, "response", None), "text", "")
            print(f"the server failed: {error} {said[:2000]}", flush=True)
            os._exit(1)

    asked = _beside.submit(call, body)
    asked.add_done_callback(answered)
    return asked


if __name__ == "__main__":
    main()
