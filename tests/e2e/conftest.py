"""One running node for the tests of a module: two engines, a daemon, two checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Iterator  # noqa: TC003 - dataclass fields
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch  # noqa: TC002 - dataclass methods
from safetensors.torch import load_file

from tests.own import named
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.adapters.reference.config import ModelConfig
from weightsync.adapters.reference.oracle import expected_checksums
from weightsync.fleet import Daemon, Engine, Fleet

TINY = ModelConfig(
    vocab_size=259,  # odd, so that tp 2 pads
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def get(url: str) -> httpx.Response:
    """From a process that may have to wait for a core."""
    return httpx.get(url, timeout=30, trust_env=False)


@dataclass
class Node:
    """A daemon with engines on checkpoint A."""

    fleet: Fleet
    daemon: Daemon
    engines: list[Engine]
    config: ModelConfig
    versions: Iterator[int]

    def checkpoint(self, name: str) -> str:
        return str(self.fleet.root / name)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(f"{self.checkpoint(name)}/model.safetensors")

    def info(self, engine: Engine) -> dict[str, Any]:
        shown: dict[str, Any] = get(f"{engine.url}/info").raise_for_status().json()
        return shown

    def assert_holds(self, weights: dict[str, torch.Tensor], version: int) -> None:
        """Every rank of every engine holds exactly these weights and serves this version."""
        for engine in self.engines:
            found = get(f"{engine.url}/checksums").raise_for_status().json()
            assert found == expected_checksums(self.config, weights, engine.tp), engine.name
            info = self.info(engine)
            assert (info["weight_version"], info["paused"], info["torn"]) == (version, False, False)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Fleet() as fleet:
        for seed, name in enumerate("AB"):
            random_checkpoint(TINY, fleet.root / name, seed)
        engines = [fleet.start_engine(f"e{tp}", fleet.root / "A", tp=tp, wait=False) for tp in (1, 2)]
        for engine in engines:
            fleet.wait_engine(engine)
        log = {"trace_dir": str(fleet.root / "traces")}
        daemon = fleet.start_daemon(named("node0"), engines, arena={"slot_bytes": "64KiB", "slots": 2}, log=log)
        yield Node(fleet, daemon, engines, TINY, itertools.count(1))
