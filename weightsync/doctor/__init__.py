"""`weightsync doctor`: finds, before any push, what would fail, and the exact flag or variable that mends it.

    node       where slots would lie, and whether GPUs, memory and Python packages allow it
    machine    open files, memory, limits of containers, namespaces, sockets
    packages   cupy, torch and the driver: whether their CUDA versions fit together
    joined     NCCL between nodes with slots on GPUs: whether it is installed, and what must be alike
    process    whether an engine's process shares memory, namespaces and GPUs with this one as a push needs
    environments   packages installed where the engine runs, compared with those here

The engine's own adapter examines its answers over HTTP (`EngineAdapter.examine`). The doctor stands in for weightsyncd:
it has to run where weightsyncd runs, as its user. It changes nothing, and sends nothing but questions.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from weightsync.adapters import adapter
from weightsync.adapters.base import Finding
from weightsync.adapters.http import EngineAnswer, EngineHttp
from weightsync.config import EngineConfig, NodeConfig
from weightsync.doctor.machine import examine_machine
from weightsync.doctor.node import Node, examine_node, room, worst_first
from weightsync.doctor.process import examine_process
from weightsync.endpoints import url_problems
from weightsync.errors import EngineError, EngineLost, WeightSyncError
from weightsync.transports.group import why_not

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightsync.transports.group import Helper

__all__ = ["Node", "brand_of", "examine", "examine_machine", "examine_node", "worst_first"]


async def brand_of(spec: EngineConfig, *, deadline: float) -> str:
    """Return the kind of engine that answers at the URL. Raises `EngineLost`, or `EngineError` if it is unknown."""
    http = EngineHttp(spec)
    try:
        for path, kind, mark in (
            ("/server_info", "sglang", "internal_states"),
            ("/get_server_info", "sglang", "internal_states"),
            ("/version", "vllm", "version"),
            ("/info", "reference", "incarnation"),
        ):
            with suppress(EngineAnswer):
                answer = await http.get(path, deadline=deadline)
                if isinstance(answer, dict) and mark in answer:
                    return kind
    finally:
        await http.close()
    raise EngineError(
        f"what answers at {spec.url} is neither vLLM nor SGLang nor a reference engine",
        engine=spec.name,
        hint="is this the engine's own URL, and not its router's? Else say which it is with --kind",
    )


def examine(spec: EngineConfig, node: Node | None = None, *, timeout: float = 10.0) -> list[Finding]:
    """Return all findings about one engine of a node, the worst first. `spec.kind` may be "auto".

    Without a `node`, the engine is judged for a node with the default config. Its faults are findings, never raised.
    """
    if problems := url_problems(spec.url):
        return [Finding(level="fail", what=f"the engine's url {problem}") for problem in problems]
    found: list[Finding] = []
    if node is None:
        node, _ = examine_node(NodeConfig())
        found.append(room(node.config))
    deadline = time.monotonic() + timeout
    try:
        found += asyncio.run(_ask(spec, deadline))
    except EngineLost as error:
        found.append(Finding(level="fail", what=error.message, fix=error.hint or _start_hint(spec.url)))
    except WeightSyncError as error:
        found.append(Finding(level="fail", what=error.message, fix=error.hint or ""))
    return worst_first([*found, *_group(spec, node, os.environ), *examine_process(spec.url, node)])


def _group(spec: EngineConfig, node: Node, environment: Mapping[str, str]) -> list[Finding]:
    """Return why an engine with the path "group" could not join groups, if so."""
    helper: dict[str, Helper] = {"sglang": "torch", "vllm": "vllm"}
    if spec.path != "group" or spec.kind not in helper:
        return []
    found = why_not(helper[spec.kind], on_gpu=node.on_gpus, environment=environment)
    return [Finding(level="fail", what=found[0], fix=found[1])] if found is not None else []


async def _ask(spec: EngineConfig, deadline: float) -> Sequence[Finding]:
    if spec.kind == "auto":
        spec = msgspec.structs.replace(spec, kind=await brand_of(spec, deadline=deadline))
    hand = adapter(spec)
    try:
        return await hand.examine(deadline=deadline)
    finally:
        await hand.close()


def _start_hint(url: str) -> str:
    return f"start the engine, or correct the URL; `curl {url}/health` should answer"
