"""For tests of trainer ranks: engines of one model with their daemon, and ranks that torchrun starts to push into them.

On GPUs, or all of it on the CPU over gloo, where a machine has none and somebody wants to see the ranks' scripts run.
"""

from __future__ import annotations

import itertools
import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from safetensors.torch import load_file

from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.adapters.reference.oracle import expected_checksums
from weightsync.fleet import Daemon, Engine, Fleet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from weightsync.adapters.reference.config import ModelConfig

__all__ = ["Node", "needs", "serving"]

ROOT = Path(__file__).parents[2]


@dataclass
class Node:
    """A daemon with engines of one model, in directory `served`; beside it are checkpoints A and B."""

    fleet: Fleet
    daemon: Daemon
    engines: list[Engine]
    config: ModelConfig
    device: str  # "cuda" or "cpu"
    versions: Iterator[int]

    def checkpoint(self, name: str) -> str:
        return str(self.fleet.root / name)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(f"{self.checkpoint(name)}/model.safetensors")

    def assert_holds(self, weights: dict[str, torch.Tensor], version: int) -> None:
        """Every rank of every engine holds exactly these weights and serves this version."""
        for engine in self.engines:
            found = httpx.get(f"{engine.url}/checksums", trust_env=False, timeout=30).raise_for_status().json()
            assert found == expected_checksums(self.config, weights, engine.tp), engine.name
            info = httpx.get(f"{engine.url}/info", trust_env=False, timeout=30).raise_for_status().json()
            assert (info["weight_version"], info["paused"], info["torn"]) == (version, False, False)

    def pushed(self, script: str, ranks: int, case: Any, out: Path, *more: str) -> tuple[int, list[dict[str, Any]]]:
        """Have ranks run a script of this folder that pushes checkpoint B twice. The last version, and what every rank
        was told of each push: the same.
        """
        first, last = next(self.versions), next(self.versions)
        arguments = [self.device, self.checkpoint("B"), self.daemon.endpoint, str(first), str(out), json.dumps(case)]
        paths = [str(ROOT), str(ROOT / "daemon"), self.fleet.env.get("PYTHONPATH", "")]
        env = {"PYTHONPATH": ":".join(filter(None, paths))}
        trainer = self.fleet.torchrun(out.name, Path(__file__).with_name(script), ranks, [*arguments, *more], env=env)
        assert trainer.wait(150) == 0, f"{trainer.tail(120)}\n{self.daemon.tail(20)}"
        told = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]
        assert all(one == told[0] for one in told), "every rank gets the same report"
        return last, told[0]


@contextmanager
def serving(
    config: ModelConfig,
    device: str,
    *,
    tps: Sequence[int] = (1, 2),
    prepare: Callable[[Path], tuple[ModelConfig, Path]] | None = None,
) -> Iterator[Node]:
    """Engines of `config` on checkpoint A, or of what `prepare` makes of the directory that A and B are in."""
    with Fleet() as fleet:
        for seed, name in enumerate("AB"):
            random_checkpoint(config, fleet.root / name, seed)
        held, served = prepare(fleet.root) if prepare is not None else (config, fleet.root / "A")
        engines = [fleet.start_engine(f"e{tp}", served, tp=tp, device=device, wait=False) for tp in tps]
        for engine in engines:
            fleet.wait_engine(engine)
        name = fleet.root.name  # unlike any other's: a daemon clears up after its namesake
        daemon = fleet.start_daemon(name, engines, arena={"slot_bytes": "256KiB", "slots": 2})
        yield Node(fleet, daemon, engines, held, device, itertools.count(1))


def needs(ranks: int, gpus: int) -> None:
    """Skip where each rank cannot have a GPU of its own: NCCL takes no two ranks of a communicator on one."""
    if gpus < ranks:
        pytest.skip(f"{ranks} ranks need a GPU each, and here are {gpus}")
