"""How many bridges get buckets, by the engines of a push."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from weightsync.adapters.base import EngineInfo
from weightsync.adapters.vllm.path_group import GroupPath
from weightsyncd.context import PushContext
from weightsyncd.planning import Planning


def planning(engines: dict[str, tuple[str, str]], *, rails: int = 4) -> Planning:
    """Of a push to engines by name: where each is, and its transport ("" where nothing is known of it yet)."""
    here = {
        name: SimpleNamespace(
            name=name, info=info(transport) if transport else None, state="lost" if name == "gone" else "serving"
        )
        for name, (node, transport) in engines.items()
        if node == "home"
    }
    services: Any = SimpleNamespace(
        config=SimpleNamespace(node=SimpleNamespace(name="home")),
        executor=SimpleNamespace(engines=here),
        rails=SimpleNamespace(count=lambda _: rails),
    )
    of_nodes = {name: node for name, (node, _) in engines.items()}
    return Planning(services, PushContext(push="p", model="m", version=1), cast("Any", None), of_nodes)


def info(transport: str) -> EngineInfo:
    return EngineInfo(software="", profile="", tp_size=1, version=1, paused=False, torn=False, transport=transport)


@pytest.mark.parametrize(
    ("engines", "owners"),
    [
        ({"a": ("home", "mapped"), "b": ("home", "group")}, 4),
        ({"a": ("home", "mapped"), "b": ("home", GroupPath.transport)}, 1),
        ({"a": ("home", ""), "b": ("away", "")}, 4),
        ({"a": ("home", "mapped"), "gone": ("home", GroupPath.transport)}, 4),
    ],
)
def test_one_bridge_sends_where_an_engine_listens_to_one(engines, owners):
    assert planning(engines)._owners() == owners
