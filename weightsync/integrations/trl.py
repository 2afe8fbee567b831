"""TRL, and any trainer of transformers: a callback pushes the weights after each optimiser step.

    trainer = GRPOTrainer(..., callbacks=[PushCallback()])

`WeightTransfer` is for `AsyncGRPOTrainer(weight_transfer=…)`, and `push_to_vllm_server` for trainers with
`use_vllm=True, vllm_mode="server"`. Read and tested with trl 1.16.0 and transformers 5.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from weightsync.integrations.outcome import noted
from weightsync.integrations.versions import Versions
from weightsync.trainer.client import push_weights

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weightsync.report import PushReport

__all__ = ["PushCallback", "WeightTransfer", "push_to_vllm_server"]


class PushCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Pushes the model before the first step, after every `every` optimiser steps, and after the last.

    every: optimiser steps from one push to the next.
    options: those of `push_weights`: `model`, `daemon`, `pause`, `timeout`, `dtype` and the like.

    It runs on every rank, and each rank pushes what it holds; FSDP shards are not gathered. The version is the global
    step, or higher if engines already serve a later version. `report` is the last push's. An error of `push_weights`
    ends the training.
    """

    def __init__(self, *, every: int = 1, **options: Any) -> None:
        if every < 1:
            raise ValueError(f"every = {every} is not a number of steps from 1 up")
        self.report: PushReport | None = None
        self._every, self._options = every, options
        self._versions = Versions(options)
        self._pushed: int | None = None  # the global step

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Give the engines the weights that training starts from, which may be a resumed checkpoint."""
        self._push(state.global_step, objects["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step % self._every == 0:
            self._push(state.global_step, objects["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step != self._pushed:
            self._push(state.global_step, objects["model"])

    def _push(self, step: int, model: Any) -> None:
        self.report = noted(push_weights(model, version=self._versions.of(step), **self._options))
        self._pushed = step


class WeightTransfer:
    """`AsyncGRPOTrainer(weight_transfer=WeightTransfer())`: takes what TRL gathers on rank 0, and pushes it from there.

    TRL gathers every sharded tensor on rank 0, which holds all of them until the push has ended. The methods are those
    of `trl.experimental.async_grpo.async_grpo_trainer.WeightTransferProtocol`.
    """

    def __init__(self, **options: Any) -> None:
        self.report: PushReport | None = None
        self._options = options
        self._versions = Versions(options)
        self._syncs = 0

    def init_weight_transfer(self) -> None:
        """Make a process group of rank 0 alone for the pushes. TRL calls this on rank 0 only."""
        dist: Any = sys.modules.get("torch.distributed")
        if dist is not None and dist.is_available() and dist.is_initialized():
            alone = dist.new_group([dist.get_rank()], use_local_synchronization=True, backend="gloo")
            self._options = {**self._options, "process_group": alone}
            self._versions = Versions(self._options)

    def pause(self) -> None:
        """Do nothing: a push pauses engines itself, and for less time."""

    def send_weights(self, iterator: Iterable[tuple[str, Any]]) -> None:
        """Push the weights. Raises what `push_weights` raises."""
        self._syncs += 1
        self.report = noted(push_weights(iterator, version=self._versions.of(self._syncs), **self._options))

    def resume(self) -> None:
        """Do nothing: the push has resumed the engines that committed."""

    def destroy(self) -> None:
        """Do nothing: nothing is held between pushes."""


def push_to_vllm_server(**options: Any) -> None:
    """Make TRL's trainers with `use_vllm=True, vllm_mode="server"` push instead of syncing.

    Call it before the trainer is made. TRL still generates through its vLLM server, which must be an engine of the
    node's weightsyncd. TRL syncs before it generates, once per step, from all ranks. It has no hook for this, so two
    of its methods are replaced: `VLLMClient.init_communicator`, which would open a NCCL group with the server, and
    `VLLMGeneration.sync_weights`.
    """
    from trl.generation.vllm_client import VLLMClient
    from trl.generation.vllm_generation import VLLMGeneration

    original = VLLMGeneration.sync_weights

    def sync_weights(self: Any) -> None:
        if self.mode != "server":
            original(self)
            return
        if not hasattr(self, "weightsync_versions"):
            self.weightsync_versions = Versions(options)
            self.weightsync_syncs = 0
        self.weightsync_syncs += 1
        version = self.weightsync_versions.of(self.weightsync_syncs)
        self.weightsync_report = noted(push_weights(self.model, version=version, **options))

    def init_communicator(self: Any, device: Any = 0) -> None:
        """Do nothing: weightsync moves the bytes, without a communicator of TRL's."""

    VLLMClient.init_communicator = init_communicator
    VLLMGeneration.sync_weights = sync_weights
