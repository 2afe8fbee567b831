"""SGLang's own way for a trainer on the same machine, as slime goes it (its update_weight_from_tensor.py, 2026-08).

Runs in SGLang's environment, started with torchrun, one process for each tensor-parallel rank of the engine. Each push:
pause and flush; then for every 512 MB of whole tensors each rank flattens them into a new tensor, serialises its handle
with SGLang's serializer, the handles are gathered over gloo, and rank 0 posts them and waits; then generation goes on.
0.5.21 and later need a session around it, which Miles opens and so does this. On a CPU a tensor is shared by moving it
into a file of /dev/shm, one copy that CUDA IPC would not make, and emptying the CUDA cache is nothing. slime calls the
server through Ray; here it is the HTTP request that Ray's actor would make. Nothing is compared with what was sent.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import urllib.request
from pathlib import Path
from typing import Any

import serve_sglang  # noqa: F401 - what lets SGLang be imported on any CPU
import torch
import torch.distributed as dist
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

BUCKET = 512 * 1024**2  # bytes: slime's update_weight_buffer_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=Path, required=True, help="JSON: [name, shape, dtype] of each")
    parser.add_argument("--url", required=True)
    parser.add_argument("--pushes", type=int, required=True)
    parser.add_argument("--session", action="store_true", help="the server has /begin_weight_update")
    parser.add_argument("--first", type=int, default=1, help="version")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")
    dist.init_process_group("gloo")
    weights = [
        (name, torch.randn(shape).to(getattr(torch, dtype)))
        for name, shape, dtype in json.loads(arguments.tensors.read_text())
    ]
    rows = []
    for version in range(arguments.first, arguments.first + arguments.pushes):
        weights[1][1].view(torch.uint8).add_(1)
        dist.barrier()
        rows.append(update(arguments.url, weights, version, session=arguments.session))
    if dist.get_rank() == 0:
        held = post(arguments.url, "model_info", None)["weight_version"]
        assert held == str(version), f"the server holds {held}, not {version}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"pushes": rows, "peak_bytes": peak}
    (arguments.out / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def update(url: str, weights: list[tuple[str, torch.Tensor]], version: int, *, session: bool) -> dict[str, float]:
    """One push; seconds that it took, and that the engine was paused."""
    start = time.perf_counter()
    first = dist.get_rank() == 0
    if first:
        post(url, "pause_generation", {})
        post(url, "flush_cache", {})
        if session:
            post(url, "begin_weight_update", {})
    dist.barrier()
    for bucket in buckets(weights):
        flat = FlattenedTensorBucket(named_tensors=bucket)
        data = {"flattened_tensor": flat.get_flattened_tensor(), "metadata": flat.get_metadata()}
        mine = MultiprocessingSerializer.serialize(data, output_str=True)
        every: list[Any] | None = [None] * dist.get_world_size() if first else None
        dist.gather_object(mine, every, dst=0)
        if first:
            body = {"serialized_named_tensors": every, "load_format": "flattened_bucket", "flush_cache": False}
            post(url, "update_weights_from_tensor", body | {"weight_version": str(version)})
        dist.barrier()
        del flat, data
    if first:
        if session:
            post(url, "end_weight_update", {})
        post(url, "continue_generation", {})
    dist.barrier()
    return {"wall": time.perf_counter() - start}


def buckets(weights: list[tuple[str, torch.Tensor]]) -> list[list[tuple[str, torch.Tensor]]]:
    """Neighbours of up to 512 MB together; a tensor that is larger, alone."""
    found: list[list[tuple[str, torch.Tensor]]] = [[]]
    for name, tensor in weights:
        if found[-1] and sum(t.nbytes for _, t in found[-1]) + tensor.nbytes > BUCKET:
            found.append([])
        found[-1].append((name, tensor))
    return found


def post(url: str, route: str, body: Any) -> Any:
    """The answer, which must not say that it failed; a GET where there is no body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/{route}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        text = answer.read()
    if not text.startswith(b"{"):
        return text
    told = json.loads(text)
    if told.get("success") is False:
        raise RuntimeError(f"/{route}: {told}")
    return told


if __name__ == "__main__":
    main()
