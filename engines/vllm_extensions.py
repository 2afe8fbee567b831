"""What vLLM's workers are extended with, to take weightsync's pushes and checkpoint-engine's in one run."""

from checkpoint_engine.worker import VllmColocateWorkerExtension

from weightsync.adapters.vllm.extension import WeightSyncExtension

__all__ = ["Extensions"]


class Extensions(WeightSyncExtension, VllmColocateWorkerExtension):
    pass
