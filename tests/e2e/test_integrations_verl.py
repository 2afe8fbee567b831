"""verl's own manager drives the checkpoint engine; a daemon and reference engines take the push."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl", reason="verl is not installed (it needs ray, transformers, tensordict; over 700 MB)")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore"),  # verl's own and ray's
]


class Actors:
    """What verl's manager asks of its actor worker group, of one worker that is a real Ray actor."""

    world_size = 1

    def __init__(self, worker) -> None:
        self.worker = worker

    def execute_checkpoint_engine(self, method, **lists):
        return [self.worker.execute.remote(method[0], {name: values[0] for name, values in lists.items()})]

    def update_weights(self, global_steps=None, mode="auto"):
        assert mode == "weightsync"
        return [self.worker.update_weights.remote(global_steps)]


class Worker:
    """`ActorRolloutRefWorker` of verl/workers/engine_workers.py, as far as checkpoint engines go."""

    def __init__(self, checkpoint: str, options: dict[str, Any]) -> None:
        from safetensors.torch import load_file
        from verl.checkpoint_engine.base import CheckpointEngineRegistry
        from verl.utils.import_utils import import_external_libs

        import_external_libs("weightsync.integrations.verl")
        self.weights = load_file(f"{checkpoint}/model.safetensors")
        self.engine = CheckpointEngineRegistry.new("weightsync", is_master=True, bucket_size=1 << 20, **options)

    def execute(self, method: str, arguments: dict[str, Any]):
        return getattr(self.engine, method)(**arguments)

    async def update_weights(self, global_steps: int):
        return await self.engine.send_weights(iter(self.weights.items()), global_steps=global_steps)


class Adapter:
    """verl's server adapter on a rollout worker, as far as it goes with weights that are there already."""

    replica_rank, is_leader_rank = 0, True

    async def update_weights(self, weights, global_steps=None, wire_format="named_tensors"):
        assert (list(weights), wire_format) == ([], "delta_flush")


class Replica:
    """A rollout replica: a real worker of verl's, and what its manager asks of its servers, in order."""

    def __init__(self, worker) -> None:
        self.workers = [worker]
        self.asked: list[str] = []

    def __getattr__(self, name: str):
        async def ask(**_):
            self.asked.append(name)

        return ask


def test_verls_manager_pushes(node, unused_port):
    import ray
    from verl.checkpoint_engine.base import CheckpointEngineManager, CheckpointEngineWorker
    from verl.workers.config import CheckpointEngineConfig

    options = {"daemon": node.daemon.endpoint, "timeout": 60}
    config = CheckpointEngineConfig(
        backend="weightsync",
        custom_backend_module="weightsync.integrations.verl",
        engine_kwargs={"weightsync": options},
    )
    env = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False,
        runtime_env={"env_vars": env}, _temp_dir=str(node.fleet.root / "ray"),
    )  # fmt: skip
    try:
        worker = ray.remote(num_cpus=1)(Worker).remote(node.checkpoint("B"), config.engine_kwargs["weightsync"])
        place = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port)}
        rollout = SimpleNamespace(checkpoint_engine=config, name="vllm")
        there = ray.remote(num_cpus=1, runtime_env={"env_vars": env | place})(CheckpointEngineWorker)
        replica = Replica(there.remote(rollout, None, Adapter()))
        manager = CheckpointEngineManager(config=config, actor_wg=Actors(worker), replicas=[replica])
        versions = []
        for step in (1, 2, 2):  # a step may come twice: after a restart, and where verl validates
            metrics = manager.update_weights(step)
            versions.append(int(metrics["weightsync/version"]))
            node.assert_holds(node.weights("B"), versions[-1])
        assert versions == sorted(set(versions))
        assert replica.asked[:4] == ["abort_all_requests", "release_kv_cache", "resume_kv_cache", "resume_generation"]
    finally:
        ray.shutdown()


def test_actor_ranks_share_what_they_push(node, tmp_path):
    script = Path(__file__).with_name("integrations_verl_ranks.py")
    trainer = node.fleet.torchrun("verl", script, 2, [node.checkpoint("A"), node.daemon.endpoint, str(tmp_path)])
    assert trainer.wait(100) == 0, trainer.tail(60)
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    node.assert_holds(node.weights("A"), int(told[0]["weightsync/version"]))
