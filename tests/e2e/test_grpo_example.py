"""`docs/examples/grpo_tiny.py` learns, and its gap shows when the engine holds older weights than the trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
ROUNDING = 1e-4  # nats between two implementations in fp32; one optimiser step makes a hundred times that


def run_example(out: Path, *arguments: str, seconds: float) -> dict[str, Any]:
    """Run it, and return what it wrote."""
    done = subprocess.run(
        [sys.executable, ROOT / "docs/examples/grpo_tiny.py", "--out", out, *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "daemon")])},
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    (path,) = out.glob("*.json")
    run: dict[str, Any] = json.loads(path.read_text())
    return run


def check_gap(run: dict[str, Any], push_every: int) -> None:
    """Right after a push engine and trainer differ by rounding, and before the next by more."""
    for row in run["steps"]:
        if (row["step"] - 1) % push_every == 0:
            assert row["gap_max"] < ROUNDING, row
        else:
            assert row["gap_max"] > 10 * ROUNDING, row


def test_it_learns_from_the_reference_engine(tmp_path):
    run = run_example(tmp_path, "--engine", "reference", "--steps", "9", "--push-every", "3", seconds=280)
    check_gap(run, push_every=3)
    rewards = [row["reward"] for row in run["steps"]]
    assert sum(rewards[-3:]) > 1.5 * sum(rewards[:3]), rewards
    assert "digits" in (tmp_path / "grpo_tiny.svg").read_text()
