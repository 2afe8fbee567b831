"""How many bridges get buckets, by the engines of a push."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from weightsync.adapters.base import EngineInfo
from weightsync.adapters.vllm.path_group import GroupPath
from weightsyncd.push import Push


def push(engines: dict[str, tuple[str, str]], *, rails: int = 4) -> Any:
    """One of engines by name: where each is, and its transport ("" where nothing is known of it yet)."""
    here = {
        name: SimpleNamespace(
            name=name, info=info(transport) if transport else None, state="lost" if name == "gone" else "serving"
        )
        for name, (node, transport) in engines.items()
        if node == "home"
    }
    services = SimpleNamespace(executor=SimpleNamespace(engines=here), rails=SimpleNamespace(count=lambda _: rails))
    of_nodes = {name: node for name, (node, _) in engines.items()}
    session = SimpleNamespace(model="m", version=1)
    return SimpleNamespace(_services=services, _engines=of_nodes, _home="home", _names=("home",), session=session)


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
    assert Push._owners(push(engines)) == owners
