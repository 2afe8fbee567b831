"""Real FSDP2 ranks on gloo: what they say they hold, put together, is the model bit for bit."""

from __future__ import annotations

import pytest

from tests.marks import slow
from tests.unit.sources_kit import put_together, run_ranks

CASES = {"trained", "state_dict", "tied", "bfloat16", "unsharded", "narrow", "mapping"}
CASES |= {"evaluated", "evaluated-again", "evaluated-lora"}
MORE = {3: {"submesh"}, 4: {"hybrid", "grid", "nested", "tensor_parallel", "gaps"}}


@pytest.mark.timeout(150)
@pytest.mark.parametrize("world", [3, slow(4)])
def test_what_ranks_hold_makes_up_the_model(tmp_path, world):
    run_ranks("fsdp2_ranks.py", str(tmp_path), torchrun=world)
    cases = {path.name.split(".")[0] for path in tmp_path.glob("*.layout")}
    assert cases == CASES | MORE[world]
    for case in sorted(cases):
        plan, layouts = put_together(tmp_path, case, world)
        table = plan.manifest.tensors
        if case == "tied":
            assert table.aliases == (("head.weight", "embed.weight"),)
        else:
            assert not table.aliases
        if case == "trained":
            assert all(len(fill) for fill in plan.fills)
        if case == "unsharded":  # no rank has all of it any more
            assert all(layout.nbytes < layouts[0].tensors.sizes.sum() for layout in layouts)
        if case == "submesh":
            assert layouts[1].shard(0).shape == (0, 0)
        if case == "hybrid":
            assert sum(len(fill) for fill in plan.fills) < sum(len(layout) for layout in layouts)
        if case == "tensor_parallel":
            up = [
                layout.shard(i)
                for layout in layouts
                for i in range(len(layout))
                if "0.up.weight" in layout.shard(i).name
            ]
            assert sorted(shard.offset[0] for shard in up) == [0, 4, 8, 12]
        if case == "gaps":  # four runs of two rows on each rank
            assert [len(layout) for layout in layouts] == [4, 4, 4, 4]
            assert layouts[0].shard(1).offset == (4, 0)
