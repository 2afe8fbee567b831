"""`docs/examples/grpo_tiny.py` with the engines that it is for."""

from __future__ import annotations

import pytest

from tests.e2e.test_grpo_example import check_gap, run_example
from tests.engines.kit import ENGINES, installed

pytestmark = [pytest.mark.engines, pytest.mark.engines_slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_what_it_generates_is_what_the_trainer_holds(kind, tmp_path, monkeypatch):
    assert installed(kind), f"{kind} is not in {ENGINES}: run `make engines`"
    monkeypatch.setenv("WEIGHTSYNC_ENGINES", str(ENGINES))
    run = run_example(tmp_path, "--engine", kind, "--steps", "5", "--push-every", "2", seconds=580)
    check_gap(run, push_every=2)
