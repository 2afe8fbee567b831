"""verl: a checkpoint engine called "weightsync".

    actor_rollout_ref.rollout.checkpoint_engine.backend=weightsync
    actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=weightsync.integrations.verl
    +actor_rollout_ref.rollout.checkpoint_engine.engine_kwargs.weightsync.model=default   # options of push_weights

verl imports this module on every worker and in its manager (`import_external_libs`), which registers the class. Read
and tested with verl 0.9.1: `verl/checkpoint_engine/base.py`, `verl/workers/engine_workers.py` (actor side).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from weightsync.config import EngineConfig
from weightsync.integrations.outcome import noted
from weightsync.integrations.shares import rank_and_world, share
from weightsync.integrations.versions import Versions
from weightsync.trainer.client import push_weights_async

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from weightsync.report import PushReport

__all__ = ["PushEngine", "Pusher", "engines_of"]


class Pusher:
    """Pushes the tensors that verl gives every actor rank, on all of those ranks together.

    verl gathers every tensor on every actor rank, one after the other. Each rank keeps an equal share of the bytes
    and drops the rest. So besides its own shards a rank holds the model's size divided by the number of ranks, and all
    ranks write at once.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        """options: those of `push_weights`."""
        self._options = dict(options)
        self._versions = Versions(self._options)
        self._pushes = 0

    async def push(self, weights: Iterable[tuple[str, Any]], step: int | None) -> PushReport:
        """Push as version `step`, or a higher one if need be. Raises what `push_weights` raises."""
        version = self._versions.of(self._pushes if step is None else step)
        self._pushes += 1
        mine = dict(share(weights, *rank_and_world()))
        # Started in this thread, whose GPU is this rank's; awaited in another, so that the actor goes on answering.
        handle = push_weights_async(mine, version=version, **self._options)
        return noted(await asyncio.to_thread(handle.result))


@CheckpointEngineRegistry.register("weightsync")
class PushEngine(CheckpointEngine):  # type: ignore[misc]  # verl has no types
    """A checkpoint engine that pushes the weights to the engines of the node's weightsyncd and of its peers."""

    # Weights never pass through verl's rollout workers. Of verl's two formats only this one allows an empty stream: the
    # workers' adapters then set the server's step, and leave its weights alone.
    wire_format: ClassVar[str] = "delta_flush"

    def __init__(self, bucket_size: int, is_master: bool = False, **options: Any) -> None:
        """bucket_size, is_master: verl's own, not used here (buckets are as large as the daemon's slots).
        options: those of `push_weights`.
        """
        self._pusher = Pusher(options)

    def prepare(self) -> dict[str, Any]:
        """Do nothing: no memory is allocated, and other workers need no information."""
        return {}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Return no arguments for `init_process_group`: no group joins actors and rollout workers."""
        return {}, {}

    def init_process_group(self, **kwargs: Any) -> None:
        """Do nothing: there is no group."""

    def finalize(self) -> None:
        """Do nothing: nothing is held between pushes."""

    async def send_weights(
        self, weights: Iterable[tuple[str, Any]], global_steps: int | None = None
    ) -> dict[str, float] | None:
        """Push as version `global_steps`, or a higher one if need be; every actor rank calls it. Returns metrics.

        Raises what `push_weights` raises.
        """
        report = await self._pusher.push(weights, global_steps)
        return {"weightsync/version": float(report.version), "weightsync/seconds": report.seconds}

    def receive_weights(self, global_steps: int | None = None) -> Iterator[Any]:
        """Yield nothing on rollout workers: their servers take the push from weightsync."""
        return iter(())


def engines_of(replicas: Sequence[Any], kind: str, *, model: str = "default") -> list[EngineConfig]:
    """Return verl's rollout replicas (`RolloutReplica`) as engines, for `weightsync.operator.change_engines(add=…)`.

    verl chooses its servers' ports when it starts them, so no node config can name them. kind: "vllm" or "sglang".
    """
    return [
        EngineConfig(name=f"verl-{r.replica_rank}", kind=kind, url=f"http://{r.server_address}", model=model)
        for r in replicas
    ]
