"""What an engine was started on, held against what is pushed."""

from __future__ import annotations

import asyncio

import pytest
import torch
from safetensors.torch import save_file

from tests.plan_kit import rank, whole
from weightsync.adapters.checkpoint import CheckpointCheck, find_checkpoint, misfits, read_shapes
from weightsync.errors import EngineRefused
from weightsync.plan.buckets import plan_push

SHAPES = {
    "model.embed_tokens.weight": (32, 8),
    "model.layers.0.mlp.gate_proj.weight": (16, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.norm.weight": (8,),
}


@pytest.fixture
def checkpoint(tmp_path):
    save_file({name: torch.zeros(shape) for name, shape in SHAPES.items()}, tmp_path / "model.safetensors")
    return tmp_path


def manifest(**changes: tuple[int, ...]):
    shapes = SHAPES | {name.replace("__", "."): shape for name, shape in changes.items()}
    return plan_push(
        [rank(*(whole(n, "bfloat16", s) for n, s in shapes.items()))], slot_bytes=1 << 20, owners=1
    ).manifest


def test_the_headers_are_read(checkpoint):
    assert read_shapes(checkpoint) == SHAPES


def test_what_fits_fits():
    assert misfits(manifest(), SHAPES) == ""


def test_a_tensor_of_another_shape_is_named_with_both():
    found = misfits(manifest(model__layers__0__mlp__gate_proj__weight=(32, 8)), SHAPES)
    assert found == "'model.layers.0.mlp.gate_proj.weight' is [32, 8] and should be [16, 8]"


def test_an_unknown_name_is_named():
    assert misfits(manifest(model__norms__weight=(8,)), SHAPES) == "its checkpoint has no 'model.norms.weight'"


def test_a_head_that_a_tied_checkpoint_leaves_out_is_no_fault():
    assert misfits(manifest(lm_head__weight=(32, 8)), SHAPES) == ""


def test_a_trainer_that_calls_everything_otherwise_is_not_judged():
    assert misfits(manifest(), {"transformer.wte": (32, 8)}) == ""
    assert misfits(manifest(), {}) == ""


def test_the_refusal(checkpoint):
    wrong = manifest(model__norm__weight=(9,))
    with pytest.raises(EngineRefused, match=r"'model\.norm\.weight' is \[9\] and should be \[8\]") as caught:
        asyncio.run(CheckpointCheck(str(checkpoint), "e").refuse(wrong))
    assert str(checkpoint) in str(caught.value)
    asyncio.run(CheckpointCheck(str(checkpoint), "e").refuse(manifest()))
    for elsewhere in (None, "/no/such/folder", "nobody/no-model"):
        asyncio.run(CheckpointCheck(elsewhere, "e").refuse(wrong))


def test_a_damaged_checkpoint_refuses_nobody(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    asyncio.run(CheckpointCheck(str(tmp_path), "e").refuse(manifest(model__norm__weight=(9,))))


def test_a_name_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshots = tmp_path / "models--org--m" / "snapshots"
    (snapshots / "abc").mkdir(parents=True)
    assert find_checkpoint("org/m") == snapshots / "abc"
    (snapshots / "def").mkdir()
    assert find_checkpoint("org/m") is None, "nobody knows which it was"


def test_a_torn_engine_takes_the_whole_only(checkpoint):
    check = CheckpointCheck(str(checkpoint), "e")
    asyncio.run(check.refuse(manifest(), whole="it is torn", sure=True))
    part = plan_push([rank(whole("model.norm.weight", "bfloat16", (8,)))], slot_bytes=1 << 20, owners=1).manifest
    asyncio.run(check.refuse(part))
    with pytest.raises(EngineRefused, match=r"it is torn, so only a whole model can be loaded: 'model\.embed_tokens"):
        asyncio.run(check.refuse(part, whole="it is torn"))
    unknown = CheckpointCheck(None, "e")
    asyncio.run(unknown.refuse(part, whole="it is torn"))
    with pytest.raises(EngineRefused, match=r"it quantises, .* cannot be read here"):
        asyncio.run(unknown.refuse(manifest(), whole="it quantises", sure=True))


def test_names_of_which_none_is_known_are_refused_where_an_engine_would_say_nothing(checkpoint):
    strange = plan_push([rank(whole("module.norm.weight", "bfloat16", (8,)))], slot_bytes=1 << 20, owners=1).manifest
    asyncio.run(CheckpointCheck(str(checkpoint), "e").refuse(strange))
    with pytest.raises(EngineRefused, match=r"none of the names that are pushed, such as 'module\.norm\.weight'"):
        asyncio.run(CheckpointCheck(str(checkpoint), "e", silent=True).refuse(strange))
