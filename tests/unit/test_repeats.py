"""Who is late, and what a keeper keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.bucket_kit import Buckets, soon
from weightsync.config import parse_node_config
from weightsync.errors import ConfigError, LocalProtocolError
from weightsync.gpus import Gpu
from weightsync.keeper.store import Store
from weightsync.placement import placed
from weightsync.wire.messages import EngineStatus
from weightsyncd.repeats import late_engines


def status(name, state="serving", version=7, **more):
    return EngineStatus(name=name, node="n", kind="reference", model="m", url="", state=state, version=version, **more)


@pytest.mark.parametrize(
    ("engine", "late"),
    [
        (status("e"), False),
        (status("e", version=6), True),
        (status("e", "blank", None), True),
        (status("e", "torn", None), True),
        (status("e", "torn", 7), True),
        (status("e", "blank", None, frozen=True), False),
        (status("e", "paused", 6), False),  # somebody has a reason
        (status("e", "asleep", 6), False),
        (status("e", "lost", None), False),
        (status("e", "unknown", None), False),
    ],
)
def test_who_is_late(engine, late):
    assert late_engines([status("other"), engine], "m", 7) == ["e"] * late
    assert late_engines([engine], "another", 7) == []


def test_a_fleet_never_goes_back():
    assert (
        late_engines([status("new", version=8), status("old", version=6), status("torn", "torn", None)], "m", 7) == []
    )


def test_what_lies_on_gpus_is_not_kept():
    config = parse_node_config('[node]\nretain = "host"\n[arena]\ndevice = "auto"\n')
    with pytest.raises(ConfigError, match="these lie on GPUs"):
        placed(config, {}, [Gpu("a", 1 << 37, mig=False)])
    assert placed(config, {}, []).node.retain == "host"


TENSORS = {
    "embed": torch.randn(40, 8),
    "norm": torch.randn(7).to(torch.bfloat16),
    "none": torch.empty(0, 4),
    "scale": torch.tensor(3.5),
}


@pytest.fixture
def buckets(tmp_path):
    made = Buckets(tmp_path, 512, TENSORS, [("head", "embed")])
    yield made
    made.close()


def take(store, buckets, version, count=None):
    """An update of so many buckets, all by default."""
    store.begin(version, buckets.manifest.pack(), [buckets.offer], deadline=soon())
    for bucket in range(buckets.manifest.buckets if count is None else count):
        store.load(bucket, buckets.ticket(bucket), deadline=soon())


def test_what_is_kept_is_what_was_pushed(buckets):
    store = Store()
    take(store, buckets, 3)
    store.finish()
    assert store.kept is None, "not before it is committed"
    store.commit()
    kept: Any = store.kept
    assert (kept.version, kept.nbytes) == (3, sum(t.nbytes for t in TENSORS.values()))
    source = kept.source()
    layout = source.layout()
    assert layout.tensors.aliases == (("head", "embed"),)
    held = {layout.shard(i).name: source.local(i) for i in range(len(layout))}
    assert held.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(held[name], tensor), name
        assert held[name].dtype == tensor.dtype


def test_a_push_that_came_to_nothing_leaves_what_was_kept(buckets):
    store = Store()
    take(store, buckets, 3)
    store.finish()
    store.commit()
    take(store, buckets, 4, count=1)
    with pytest.raises(LocalProtocolError, match="did not come whole"):
        store.finish()
    with pytest.raises(LocalProtocolError, match="no update was finished"):
        store.commit()
    kept: Any = store.kept
    assert kept.version == 3
    assert torch.equal(kept.tensors["embed"], TENSORS["embed"])


def test_what_was_finished_and_not_committed_is_forgotten(buckets):
    store = Store()
    take(store, buckets, 3)
    store.finish()
    take(store, buckets, 4, count=1)
    with pytest.raises(LocalProtocolError, match="no update was finished"):
        store.commit()
