"""Runs scripts of this folder as child processes of a fleet. Each pushes a model repeatedly and writes its figures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsync.errors import ConfigError

if TYPE_CHECKING:
    from bench.shapes import Model
    from weightsync.fleet import Child, Fleet

__all__ = ["WARM", "alone", "torchrun"]

WARM = 2  # pushes that do not count
_WAIT = 900.0  # seconds for all pushes of one way
_HERE = Path(__file__).parent


def torchrun(
    fleet: Fleet, model: Model, script: str, world: int, out: Path, more: list[str], pushes: int
) -> list[dict[str, Any]]:
    """Run a script in `world` processes, which push a model `pushes` times after two that warm up.

    Returns the figures that each process wrote.
    """
    options, env = _prepare(model, out, more, pushes)
    child = fleet.torchrun(out.name, _HERE / script, world, options, env=env)
    return [_result(fleet, child, out, rank) for rank in range(world)]


def alone(fleet: Fleet, model: Model, script: str, out: Path, more: list[str], pushes: int) -> dict[str, Any]:
    """Do as `torchrun`, for a script that starts its own processes and writes one file for all of them."""
    options, env = _prepare(model, out, more, pushes)
    return _result(fleet, fleet.spawn(out.name, [str(_HERE / script), *options], env=env), out, 0)


def _prepare(model: Model, out: Path, more: list[str], pushes: int) -> tuple[list[str], dict[str, str]]:
    path = out / "shape.json"
    path.write_text(json.dumps({"model": model.name, "config": model.config}))
    paths = os.pathsep.join(filter(None, (str(_HERE.parent), os.environ.get("PYTHONPATH", ""))))
    return ["--shape", str(path), "--out", str(out), "--pushes", str(pushes + WARM), *more], {"PYTHONPATH": paths}


def _result(fleet: Fleet, child: Child, out: Path, rank: int) -> dict[str, Any]:
    if child.wait(_WAIT):
        others = [one.tail(15) for one in fleet.children if one is not child]
        raise ConfigError("\n".join([f"{child.name} failed", child.tail(60), *others]))
    found: dict[str, Any] = json.loads((out / f"rank{rank}.json").read_text())
    return found
