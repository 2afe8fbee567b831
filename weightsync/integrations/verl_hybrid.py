"""verl with actor and rollout on the same GPUs ("hybrid"): its server adapters push through weightsyncd.

    actor_rollout_ref.model.external_lib=weightsync.integrations.verl_hybrid

In hybrid mode the checkpoint engine's backend is `naive`, and each actor worker calls `update_weights` of its own
server adapter (`verl/workers/engine_workers.py`). verl imports `external_lib` when it reads the model's config, before
it looks the adapter up by name in `verl.workers.rollout.base._ROLLOUT_REGISTRY`. This module puts its own adapters
there. Options are those of the checkpoint engine: `rollout.checkpoint_engine.engine_kwargs.weightsync`. Read with verl
0.9.1.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from verl.workers.rollout.base import _ROLLOUT_REGISTRY

from weightsync.errors import SourceError
from weightsync.integrations.verl import Pusher

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["PushAdapter"]

_PARENTS = {
    "VllmAdapter": ("vllm", "verl.workers.rollout.vllm_rollout"),
    "SGLangAdapter": ("sglang", "verl.workers.rollout.sglang_rollout.sglang_rollout"),
}


class PushAdapter:
    """A mixin for verl's server adapters: pushes full weights, and leaves everything else to the adapter."""

    config: Any  # verl's RolloutConfig
    _pusher: Pusher | None = None

    async def update_weights(
        self,
        weights: Iterable[tuple[str, Any]],
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Push, then let verl's adapter set the server's step. Every actor rank calls it.

        Raises `SourceError` if verl passes a LoRA adapter instead of the weights; otherwise as `push_weights`.
        """
        parent: Any = super()
        if wire_format == "named_tensors":
            if kwargs.get("peft_config") is not None:
                raise SourceError(
                    "verl hands out a LoRA adapter, not the model's weights",
                    hint="set actor_rollout_ref.model.lora.merge=True",
                )
            if self._pusher is None:
                self._pusher = Pusher(self.config.checkpoint_engine.engine_kwargs.get("weightsync", {}))
            await self._pusher.push(weights, global_steps)
            weights, wire_format = iter(()), "delta_flush"  # an empty stream of this format: weights stay as they are
        await parent.update_weights(weights, wire_format=wire_format, global_steps=global_steps, **kwargs)


def __getattr__(name: str) -> Any:
    """Make an adapter class when it is asked for, because verl's own adapter, its parent, imports its engine."""
    if name not in _PARENTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    parent = import_module(_PARENTS[name][1]).ServerAdapter
    return type(name, (PushAdapter, parent), {"__module__": __name__})


_ROLLOUT_REGISTRY.update({(kind, "async"): f"{__name__}.{name}" for name, (kind, _) in _PARENTS.items()})
