"""The method `weightsync` that our plugin gives every vLLM worker, called through `/collective_rpc`.

    --worker-extension-cls weightsync.adapters.vllm.extension.WeightSyncExtension

The method takes one JSON string and returns plain data, so no server has to allow pickles. vLLM refuses an extension
with attributes that the worker already has, and our plugin may have installed the method before. So the class itself is
empty: importing this module in an engine installs the method.
"""

from __future__ import annotations

import os
from base64 import b64decode, b64encode
from importlib import import_module
from typing import Any

import msgspec

from weightsync.adapters.vllm.profiles import MARK, PROTOCOL
from weightsync.adapters.vllm.reload import WeightReload, worker_index
from weightsync.errors import EngineError, LocalProtocolError

__all__ = ["Request", "WeightSyncExtension", "answer", "install"]

_NAMES_SHOWN = 8


class Request(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One call. Lists for all workers are indexed by replica × world size + rank. All bytes are base64."""

    do: str
    version: int = 0
    manifest: str = ""  # packed; or its digest, for sums and boxes, and if the worker has seen it
    offers: list[list[str]] = []
    bucket: int = 0
    tickets: list[list[str]] = []  # one list for each bucket from `bucket` on
    exposures: str = ""  # packed, or their digest if the worker has seen them
    known: list[str] = []  # digests of places that the daemon knows
    pull: bool = False  # the loaded weights will be compared, so buckets need no check
    anew: bool = False  # the last comparison failed: forget the load plans
    seconds: float = 0.0
    update: str = ""  # random name of the update, in begin and in its load, draw, places and finish
    draft: bool = False


class WeightSyncExtension:
    """The class to name as `--worker-extension-cls`. It is empty: importing its module does the work."""


def install() -> None:
    """Give vLLM's workers the method `weightsync`, and their wrapper a mark that it is there. May be repeated."""
    module = import_module("vllm.v1.worker.worker_base")
    module.WorkerBase.weightsync = answer
    setattr(module.WorkerWrapperBase, MARK, True)


def answer(worker: Any, request: str) -> dict[str, Any]:
    """Carry out `request`, a JSON `Request`, in `worker`. An exception reaches the daemon as an HTTP 500."""
    asked = msgspec.json.decode(request, type=Request)
    state = _state(worker)
    model, model_config = _target(worker, asked.draft)
    index = worker_index(worker.vllm_config.parallel_config)
    match asked.do:
        case "hello":
            return _hello(worker, state)
        case "check":
            fit = state.fit(model, b64decode(asked.manifest))
            return {
                "unknown": fit.unknown[:_NAMES_SHOWN],
                "unknowns": len(fit.unknown),
                "partial": fit.partial[:_NAMES_SHOWN],
                "partials": len(fit.partial),
                "untouched": fit.untouched,
            }
        case "begin":
            offers = [b64decode(offer) for offer in asked.offers[index]]
            manifest = b64decode(asked.manifest)
            state.begin(asked.version, manifest, offers, asked.seconds, pull=asked.pull, update=asked.update)
            if asked.anew:
                state.forget(model)
            state.open(model, model_config)
            state.ready(model)
        case "load":
            state.check_open(asked.update)
            tickets = [b64decode(of_bucket[index]) for of_bucket in asked.tickets]
            state.load(model, asked.bucket, tickets, asked.seconds)
        case "draw":
            state.check_open(asked.update)
            return {"why_not": state.draw(b64decode(asked.exposures), asked.seconds)}
        case "places":
            state.check_open(asked.update)
            return {"shown": b64encode(state.places([b64decode(one) for one in asked.known]).pack()).decode()}
        case "finish":
            state.check_open(asked.update)
            state.close(model, model_config)
            if not asked.draft and hasattr(worker.model_runner, "reset_lora_state"):
                worker.model_runner.reset_lora_state()
        case "sums":
            held = state.held_sums(model, b64decode(asked.manifest))
            return {
                "boxes": b64encode(held.boxes).decode(),
                "sums": b64encode(held.sums).decode(),
                "pulled": held.pulled,
            }
        case "boxes":
            return {"boxes": b64encode(state.held_boxes(model, b64decode(asked.manifest))).decode()}
        case "serve":
            state.finish(asked.version)
            return {"weight_version": state.weight_version, "replay": state.replay_facts(model)}
        case _:
            raise LocalProtocolError(f"a vLLM worker cannot do {asked.do!r}")
    return {"weight_version": state.weight_version}


def _state(worker: Any) -> WeightReload:
    """Return the state of the weight-transfer backend if that is ours, else the worker's own."""
    found = getattr(getattr(worker, "weight_transfer_engine", None), "weightsync", None)
    if found is None:
        found = worker.__dict__.get("_weightsync")
    if found is None:
        found = worker._weightsync = WeightReload(worker.vllm_config, worker.device)
    if not isinstance(found, WeightReload):
        raise LocalProtocolError("this worker's weightsync state is somebody else's")
    found.config = found.config or worker.vllm_config
    return found


def _hello(worker: Any, state: WeightReload) -> dict[str, Any]:
    parallel = worker.vllm_config.parallel_config
    transfer = getattr(worker.vllm_config, "weight_transfer_config", None)
    return {
        "protocol": PROTOCOL,
        "rank": worker_index(parallel),
        "pid": os.getpid(),
        "platform": worker.device.type,
        "replicas": parallel.data_parallel_size,
        "world_size": parallel.world_size,
        "backend": getattr(transfer, "backend", None),
        "connector": getattr(worker.vllm_config, "kv_transfer_config", None) is not None,
        "incarnation": state.incarnation,
        "weight_version": state.weight_version,
    }


def _target(worker: Any, draft: bool) -> tuple[Any, Any]:
    """Return the model that takes the pushed weights, and its configuration."""
    if not draft:
        return worker.model_runner.get_model(), worker.vllm_config.model_config
    find = getattr(worker.model_runner, "get_draft_model", None)
    model = find() if find is not None else getattr(getattr(worker.model_runner, "drafter", None), "model", None)
    speculative = worker.vllm_config.speculative_config
    if model is None or speculative is None:
        raise EngineError("the engine has no draft model", hint='target = "model", or a server with a draft model')
    return model, speculative.draft_model_config


try:
    import_module("vllm.v1.worker.worker_base")
except ImportError:
    pass  # imported outside an engine, where there are no workers
else:
    install()
