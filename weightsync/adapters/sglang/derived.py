"""Values that SGLang derives from weights and keeps outside the model's parameters.

Nothing is imported here: a module that the scheduler has not loaded keeps no values.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["forget_embeddings", "why_not_updated"]

_EMBEDDINGS = ("sglang.srt.managers.mm_schedule", "sglang.srt.managers.mm_utils")
"""The module of `embedding_cache` in 0.5.23, and in earlier versions."""

_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater"


def why_not_updated(models: Sequence[Any]) -> str:
    """Return why SGLang refuses to update these models; "" if it does not refuse, or its version does not tell.

    The reason is copies of weights, such as in CUDA graphs, that no loader renews. SGLang asks the same before each of
    its own updates.
    """
    ask = getattr(sys.modules.get(_UPDATER), "_unsupported_derived_weight_cache_error", None)
    if ask is None:
        return ""
    of_models = len(inspect.signature(ask).parameters) > 0  # earlier versions took no model
    reasons = (ask(model) if of_models else ask() for model in models)
    return next((str(reason) for reason in reasons if reason), "")


def forget_embeddings() -> None:
    """Empty this scheduler's cache of image embeddings: it is keyed by image alone, and `/flush_cache` skips it."""
    for module in _EMBEDDINGS:
        clear = getattr(getattr(sys.modules.get(module), "embedding_cache", None), "clear", None)
        if clear is not None:
            clear()
