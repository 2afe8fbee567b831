"""Models as trainers shard, wrap and offload them on GPUs, pushed after real steps: engines hold what torch gathers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from tests.gpu.kit import Node, needs, serving
from tests.gpu.test_push import DENSE
from tests.gpu.trainer_push import CASES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.timeout(240), pytest.mark.e2e]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with serving(DENSE, "cuda") as node:
        yield node


def push(node: Node, case: str, out: Path) -> None:
    last, told = node.pushed("trainer_push.py", CASES[case].ranks, case, out)
    whole = load_file(out / "whole.safetensors")
    before = node.weights("B")
    assert whole.keys() == before.keys()
    assert {weight.dtype for weight in whole.values()} == {torch.float32 if CASES[case].masters else torch.bfloat16}
    whole = {name: weight.bfloat16() for name, weight in whole.items()}
    assert not any(torch.equal(before[name], weight) for name, weight in whole.items()), "no step was taken"
    node.assert_holds(whole, last)
    assert [report["complete"] for report in told] == [True, True]
    assert {e["checked"] for report in told for e in report["engines"]} == {len(before)}


@pytest.mark.parametrize("case", CASES)
def test_engines_hold_what_torch_gathers(node, case, gpus, tmp_path):
    needs(CASES[case].ranks, gpus)
    push(node, case, tmp_path)
