"""Modules that trainers have sharded and wrapped, on four real ranks over gloo: what they say they hold, put together,
is the model bit for bit, under the model's own names.
"""

from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.plan_kit import window
from tests.unit.sources_kit import put_together, run_ranks
from weightsync.sources.flat import _names, boxes_of_stretch

WORLD = 4


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder in which four ranks have written all cases; they are forked from one process, which imports once."""
    out = tmp_path_factory.mktemp("ranks")
    run_ranks("module_ranks.py", str(out))
    return out


@pytest.mark.timeout(150)
def test_what_ranks_hold_makes_up_the_model(written):
    cases = sorted({path.name.split(".")[0] for path in written.glob("*.layout")})
    assert len(cases) == 2 * 14 + 15
    for case in cases:
        plan, layouts = put_together(written, case, WORLD)
        assert bool(plan.manifest.tensors.aliases) == ("tied" in case), case
        whole = sum(plan.manifest.tensors.sizes.tolist())
        assert sum(layout.nbytes for layout in layouts) // whole == _copies(case), case
        sent = [_bytes_of(layout, fill) for layout, fill in zip(layouts, plan.fills, strict=True)]
        assert sum(sent) == whole, case
        assert all(sent), case


def _bytes_of(layout, shards):
    return int((layout.shape[shards].prod(axis=1) * layout.tensors.itemsizes[layout.tensor[shards]]).sum())


def _copies(case: str) -> int:
    """How often all ranks together have the model."""
    if "hybrid" in case.lower():
        return 2
    return WORLD if "NO_SHARD" in case or "fsdp" not in case else 1


@pytest.mark.timeout(150)
def test_a_rank_says_nothing_of_what_it_has_nothing_of(written):
    _, layouts = put_together(written, "fsdp1-original-FULL_SHARD", WORLD)
    assert all((layout.shape > 0).all() for layout in layouts)
    assert not all(layout.tensors.names == layouts[0].tensors.names for layout in layouts)


@given(
    st.lists(st.integers(1, 5), max_size=4)
    .map(tuple)
    .flatmap(lambda shape: st.tuples(st.just(shape), *(st.integers(0, prod(shape)) for _ in range(2))))
)
def test_a_stretch_of_a_tensor_is_a_few_boxes(stretch):
    shape, one, other = stretch
    begin, end = sorted((one, other))
    whole = np.arange(prod(shape)).reshape(shape)
    boxes = list(boxes_of_stretch(shape, begin, end))
    found = [whole[window(offset, box)].reshape(-1) for offset, box in boxes]
    assert np.concatenate([np.empty(0, int), *found]).tolist() == [*range(begin, end)]
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_names_of_one_submodule_are_in_its_own_order():
    """Of tied parameters the first is sent, as from modules of any other kind."""
    module = nn.Module()
    module.z = nn.Parameter(torch.zeros(2))
    module.a = module.z
    info = SimpleNamespace(module=module, param_name="z")
    tied = SimpleNamespace(module=module, param_name="a", prim_module=module, prim_param_name="z")
    flat: Any = SimpleNamespace(_param_infos=[info], _shared_param_infos=[tied])
    assert _names(flat, {id(module): [(1, "second."), (0, "first.")]}) == [
        ["first.z", "first.a", "second.z", "second.a"]
    ]
