"""vLLM's own way for a trainer on the same GPUs: the trainer's API of its `ipc` backend, packed, over HTTP.

Runs in vLLM's environment, started with torchrun, one process on each GPU of the engine. Each push follows vLLM's
examples for FSDP and for HTTP (rlhf_ipc_fsdp_ep.py, rlhf_http_ipc.py):

1. pause, start_weight_update
2. `IPCWeightTransferEngine.trainer_send_weights` with `packed=True` and its default buffer of 1 GiB, or as large as the
   largest tensor. Every rank brings whole tensors to it, gathered one after the other with `full_tensor()`.
3. finish_weight_update, resume

All of this but the loop over tensors is vLLM's code. It is the API of 0.26; later versions have another. Nothing is
compared with the weights that were sent. The server needs the weight transfer backend "ipc" and VLLM_SERVER_DEV_MODE=1.
Server and trainer need VLLM_ALLOW_INSECURE_SERIALIZATION=1.
"""

from __future__ import annotations

import time

import requests
import torch.distributed as dist
import vllm
from peer_ranks import options, run, start, whole
from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerSendWeightsArgs, IPCWeightTransferEngine

PAUSE = 60.0  # seconds for the server to stop generating, or to go on


def main() -> None:
    arguments = options(__doc__)
    weights = start(arguments.model)
    first, client = dist.get_rank() == 0, HTTPVLLMWeightSyncClient(arguments.url)
    sending = IPCTrainerSendWeightsArgs(send_mode="http", url=arguments.url, packed=True)
    largest = max(tensor.numel() * tensor.element_size() for tensor in weights.values())
    sending.packed_buffer_size_bytes = max(sending.packed_buffer_size_bytes, largest)
    if first:
        client.init_weight_transfer_engine({})

    def push(version: int) -> dict[str, float]:
        times = [time.perf_counter()]
        if first:
            requests.post(f"{arguments.url}/pause", timeout=PAUSE).raise_for_status()
            client.start_weight_update()
        dist.barrier()
        times.append(time.perf_counter())
        IPCWeightTransferEngine.trainer_send_weights(whole(weights), sending)
        times.append(time.perf_counter())
        if first:
            client.finish_weight_update()
            requests.post(f"{arguments.url}/resume", timeout=PAUSE).raise_for_status()
        times.append(time.perf_counter())
        return {name: times[i + 1] - times[i] for i, name in enumerate(("start", "send", "finish"))}

    buffer = sending.packed_buffer_size_bytes >> 20
    run(
        arguments,
        weights,
        push,
        software=f"vLLM {vllm.__version__}",
        settings=f"trainer_send_weights over HTTP, packed into a buffer of {buffer} MiB, full_tensor() of each tensor",
    )


if __name__ == "__main__":
    main()
