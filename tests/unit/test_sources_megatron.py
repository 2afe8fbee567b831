"""Real megatron-core ranks on gloo: what they say they hold, put together, is the checkpoint bit for bit."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.marks import slow
from tests.unit.sources_kit import put_together, run_ranks

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("world", "cases"), [(1, 1), slow(2, 19), (4, 7)])
def test_what_ranks_hold_makes_up_the_checkpoint(tmp_path, world, cases):
    run_ranks("megatron_ranks.py", str(tmp_path), torchrun=world)
    names = sorted({path.name.split(".")[0] for path in tmp_path.glob("*.layout")})
    assert len(names) == cases
    for case in names:
        plan, layouts = put_together(tmp_path, case, world)
        tied = (("lm_head.weight", "model.embed_tokens.weight"),) if "tied" in case else ()
        assert plan.manifest.tensors.aliases == tied
        if case in ("dp2", "cp2"):  # replicas share the work
            assert all(len(fill) for fill in plan.fills)
        if case == "tp4-padding-alone":
            rows = [layout.shard(0).shape[0] for layout in layouts]
            assert rows == [16, 16, 1, 0]


@pytest.mark.skipif(find_spec("mbridge") is None, reason="mbridge is not installed")
@pytest.mark.timeout(180)
def test_what_mbridge_loads_is_declared_and_what_no_rule_knows_is_exported(tmp_path):
    run_ranks("megatron_bridge_ranks.py", str(tmp_path), torchrun=2)
    cases = sorted({path.name.split(".")[0] for path in tmp_path.glob("*.layout")})
    assert len(cases) == 10
    for case in cases:
        put_together(tmp_path, case, 2)
