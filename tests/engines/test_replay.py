"""The engine's loader recorded, proved and replayed, inside real vLLM and SGLang workers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.engines.yard import Need

if TYPE_CHECKING:
    from tests.engines.kit import RealEngine

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

SGLANG = Need("sglang", "plugin")
VLLM = Need("vllm", "plugin")


def facts(engine: RealEngine) -> Any:
    """What rank 0 says of its replay."""
    if engine.kind == "vllm":
        body = {"method": "weightsync", "args": ['{"do": "hello"}']}
        return engine.post("/collective_rpc", body)["results"][0]["replay"]
    return engine.get("/server_info")["internal_states"][0]["weightsync"]["replay"]


def forget(node: Any) -> None:
    """Make the next push the first of its layout: the server may have had others before."""
    node.push({name: w for name, w in node.weights("base").items() if "norm" in name})


@pytest.mark.parametrize("node", [pytest.param(SGLANG, id="sglang"), pytest.param(VLLM, id="vllm")], indirect=True)
def test_there_and_back(node):
    forget(node)
    for tag in ("pert", "base", "pert", "base"):
        node.push(tag)
        print(json.dumps(facts(node.engine)))
        node.check(tag)
