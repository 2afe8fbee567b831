"""SGLang's own way for a trainer on the same machine, as slime uses it (its update_weight_from_tensor.py, 2026-08).

Runs in SGLang's environment, started with torchrun, one process for each tensor-parallel rank of the engine. Each push
pauses and flushes. Then each rank flattens every 512 MB of whole tensors into a new tensor and serialises its handle
with SGLang's serializer. The handles are gathered over gloo, and rank 0 posts them and waits. At the end generation
goes on. SGLang 0.5.21 and later need a session around this, which Miles opens, and so does this script. slime calls the
server through Ray; this script makes the HTTP request that Ray's actor would make. Nothing is compared with the weights
that were sent.

With `--tensors`, whole tensors in this process's memory are pushed. On a CPU they are shared by moving buckets into
files of /dev/shm, a copy that CUDA IPC would not make. With `--model`, FSDP2 shards are pushed. They are gathered over
NCCL tensor by tensor, all of a bucket at once, as slime's FSDP trainer does (update_weight_utils.py). On GPUs the
handles are CUDA IPC handles, and after each bucket the allocator's cache is emptied.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

if not torch.cuda.is_available():
    import serve_sglang  # noqa: F401 - lets SGLang be imported on any CPU

from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
from sglang.version import __version__

BUCKET = 512 * 1024**2  # bytes: slime's update_weight_buffer_size
SESSIONS = (0, 5, 21)  # the first SGLang with /begin_weight_update


def main() -> None:
    if "--model" in sys.argv:
        from_shards()
    else:
        from_memory()


def from_memory() -> None:
    """Push whole tensors of this process, on a CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=Path, required=True, help="JSON: [name, shape, dtype] of each")
    parser.add_argument("--url", required=True)
    parser.add_argument("--pushes", type=int, required=True)
    parser.add_argument("--first", type=int, default=1, help="version")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")
    dist.init_process_group("gloo")
    weights = {
        name: torch.randn(shape).to(getattr(torch, dtype))
        for name, shape, dtype in json.loads(arguments.tensors.read_text())
    }
    second = list(weights.values())[1]
    rows = []
    for version in range(arguments.first, arguments.first + arguments.pushes):
        second.view(torch.uint8).add_(1)
        dist.barrier()
        start = time.perf_counter()
        update(arguments.url, weights, version, dist.group.WORLD)
        rows.append({"wall": time.perf_counter() - start})
    check(arguments.url, version)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"pushes": rows, "peak_bytes": peak}
    (arguments.out / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def from_shards() -> None:
    """Push the shards of all ranks."""
    from peer_ranks import options, run, start

    arguments = options(__doc__)
    weights = start(arguments.model)
    if torch.cuda.is_available():
        monkey_patch_torch_reductions()  # a handle then names its GPU, so that the server finds it
    else:
        torch.multiprocessing.set_sharing_strategy("file_system")
    group = dist.new_group(backend="gloo")

    run(
        arguments,
        weights,
        lambda version: update(arguments.url, weights, version, group),
        software=f"SGLang {__version__}",
        settings="/update_weights_from_tensor as slime drives it, flattened buckets of 512 MB",
        after=lambda version: check(arguments.url, version),
    )


def update(url: str, weights: dict[str, torch.Tensor], version: int, group: Any) -> dict[str, float]:
    """Make one push. Returns the seconds until handles were gathered, and until the server had answered."""
    first = dist.get_rank() == 0
    session = tuple(int(part) for part in re.findall(r"\d+", __version__)[:3]) >= SESSIONS
    phases = {"gather": 0.0, "load": 0.0}
    if first:
        post(url, "pause_generation", {})
        post(url, "flush_cache", {})
        if session:
            post(url, "begin_weight_update", {})
    dist.barrier(group)
    for bucket in buckets(list(weights.items())):
        start = time.perf_counter()
        flat = FlattenedTensorBucket(named_tensors=whole(bucket))
        data = {"flattened_tensor": flat.get_flattened_tensor(), "metadata": flat.get_metadata()}
        mine = MultiprocessingSerializer.serialize(data, output_str=True)
        every: list[Any] | None = [None] * dist.get_world_size(group) if first else None
        dist.gather_object(mine, every, dst=0, group=group)
        gathered = time.perf_counter()
        if first:
            body = {"serialized_named_tensors": every, "load_format": "flattened_bucket", "flush_cache": False}
            post(url, "update_weights_from_tensor", body | {"weight_version": str(version)})
        dist.barrier(group)
        del flat, data
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()
        phases["gather"] += gathered - start
        phases["load"] += time.perf_counter() - gathered
    if first:
        if session:
            post(url, "end_weight_update", {})
        post(url, "continue_generation", {})
    dist.barrier(group)
    return phases


def check(url: str, version: int) -> None:
    """Fail unless the server says that it holds this version."""
    if dist.get_rank() == 0:
        held = post(url, "model_info", None)["weight_version"]
        assert held == str(version), f"the server holds {held}, not {version}"


@torch.no_grad()
def whole(bucket: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """Return the bucket's tensors, whole. Shards are gathered from all ranks, all tensors at once."""
    asked = [
        (name, t.redistribute(placements=[Replicate()] * t.device_mesh.ndim, async_op=True).to_local())
        if isinstance(t, DTensor)
        else (name, t)
        for name, t in bucket
    ]
    return [(name, t.wait() if hasattr(t, "wait") else t) for name, t in asked]


def buckets(weights: list[tuple[str, torch.Tensor]]) -> list[list[tuple[str, torch.Tensor]]]:
    """Group neighbours into buckets of up to 512 MB. A larger tensor is a bucket by itself."""
    found: list[list[tuple[str, torch.Tensor]]] = [[]]
    held = 0
    for name, tensor in weights:
        nbytes = tensor.numel() * tensor.element_size()
        if found[-1] and held + nbytes > BUCKET:
            found.append([])
            held = 0
        found[-1].append((name, tensor))
        held += nbytes
    return found


def post(url: str, route: str, body: Any) -> Any:
    """Send a POST, or a GET if there is no body. Returns the answer; raises if it says that the request failed."""
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
