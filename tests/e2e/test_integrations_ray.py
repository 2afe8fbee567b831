"""Trainer ranks that are Ray actors push their shards."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray is not installed (240 MB; pip install ray)")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore"),  # Ray's own, about files and processes it leaves to its daemons
]


class Rank:
    """One trainer rank: no torchrun, no MASTER_PORT, only an address to meet at."""

    def __init__(self, rank: int, world: int, meet: str, checkpoint: str) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.fsdp import fully_shard

        from weightsync.adapters.reference.model import load_checkpoint

        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
        self.model = load_checkpoint(checkpoint)
        for layer in self.model.model.layers:
            fully_shard(layer)
        fully_shard(self.model)

    def push(self, version: int) -> dict[str, Any]:
        from weightsync import push_weights

        return push_weights(self.model, version=version, timeout=60).as_dict()


def test_ray_actors_push_their_shards(node, monkeypatch):
    import ray

    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meet = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    first, second = next(node.versions), next(node.versions)
    env = {"WEIGHTSYNC_DAEMON": node.daemon.endpoint, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False,
        runtime_env={"env_vars": env}, _temp_dir=str(node.fleet.root / "ray"),
    )  # fmt: skip
    try:
        actor = ray.remote(num_cpus=1)(Rank)
        ranks = [actor.remote(rank, 2, meet, node.checkpoint("B")) for rank in range(2)]
        for version in (first, second):
            told = ray.get([rank.push.remote(version) for rank in ranks], timeout=120)
            assert [report["complete"] for report in told] == [True, True]
            node.assert_holds(node.weights("B"), version)
        for rank in ranks:
            ray.kill(rank)
    finally:
        ray.shutdown()
