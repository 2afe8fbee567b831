"""The plugin's entry point: vLLM calls `register` in each of its processes (group `vllm.general_plugins`).

    --weight-transfer-config '{"backend": "weightsync"}'

With that flag, vLLM's own weight-update routes take our tickets. Without it, `/collective_rpc` does, by a method that
`register` gives the workers.
"""

from __future__ import annotations

import logging
from importlib import import_module

from weightsync.adapters.vllm.executor_repair import mend_executor

__all__ = ["BACKEND", "register"]

logger = logging.getLogger(__name__)

BACKEND = "weightsync"


def register() -> None:
    """Install our workers' method, the executor's repair and our backend in vLLM. May be called any number of times."""
    import_module("weightsync.adapters.vllm.extension").install()
    mend_executor()
    try:
        factory = import_module("vllm.distributed.weight_transfer.factory").WeightTransferEngineFactory
    except ImportError as error:
        logger.warning("this vllm has no weight transfer backends, use its /collective_rpc: %s", error)
        return
    if BACKEND not in factory._registry:  # plugins are loaded in every process, some twice
        factory.register_engine(BACKEND, "weightsync.adapters.vllm.backend", "WeightSyncEngine")
