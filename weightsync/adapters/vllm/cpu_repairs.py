"""Repair two silent corruptions in vLLM's CPU platform, wherever our own code reloads.

Seen in 0.32.0, with vLLM's own reload too; both generate fluent nonsense and raise nothing. Mixtures of experts: expert
weights are packed for the CPU kernel after the first load only, so after a reload the kernel reads plain weights as
packed ones. Tied embeddings: `lm_head` keeps the packed form of the embedding that was loaded first.
"""

from __future__ import annotations

from functools import wraps
from importlib import import_module
from typing import Any

__all__ = ["mend", "mended_experts"]

_MARK = "_weightsync_mended"
_EXPERTS = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"


def mend() -> None:
    """Apply the repairs that fit this vLLM, once in this process. For CPU workers only."""
    _mend_experts()
    _mend_tied_head()


def mended_experts() -> bool:
    """Whether the repair of mixtures of experts is in place in this process."""
    method = getattr(_imported(_EXPERTS), "UnquantizedFusedMoEMethod", None)
    return hasattr(getattr(method, "_setup_kernel", None), _MARK)


def _imported(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        return None


def _mend_experts() -> None:
    method = getattr(_imported(_EXPERTS), "UnquantizedFusedMoEMethod", None)
    setup: Any = getattr(method, "_setup_kernel", None)
    if method is None or setup is None or hasattr(setup, _MARK):
        return

    @wraps(setup)
    def setup_kernel(self: Any, layer: Any, w13: Any, w2: Any) -> None:
        again = self.moe_kernel is not None
        setup(self, layer, w13, w2)
        if again and w13.device.type == "cpu":
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    setattr(setup_kernel, _MARK, True)
    method._setup_kernel = setup_kernel


def _mend_tied_head() -> None:
    reload = _imported("vllm.model_executor.model_loader.reload")
    layers = _imported("vllm.model_executor.layers.utils")
    embeddings = _imported("vllm.model_executor.layers.vocab_parallel_embedding")
    finalize: Any = getattr(reload, "finalize_layerwise_reload", None)
    if finalize is None or layers is None or embeddings is None or hasattr(finalize, _MARK):
        return

    @wraps(finalize)
    def finalize_layerwise_reload(model: Any, *args: Any, **kwargs: Any) -> None:
        finalize(model, *args, **kwargs)
        for module in model.modules():
            if isinstance(module, embeddings.VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                layers.dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    setattr(finalize_layerwise_reload, _MARK, True)
    reload.finalize_layerwise_reload = finalize_layerwise_reload
