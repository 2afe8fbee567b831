"""Who is late, and what a keeper keeps."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.bucket_kit import Buckets, soon
from weightsync.adapters import worker
from weightsync.config import LogConfig, TimeoutConfig
from weightsync.errors import EngineError, LocalProtocolError, PushAborted
from weightsync.keeper.memory import LockedMemory
from weightsync.keeper.store import Store
from weightsync.placement import keeper_gpu
from weightsync.transports.shm import ShmReceiver
from weightsync.wire.messages import EngineStatus
from weightsyncd.keeper import KeeperAdapter
from weightsyncd.repeats import Repeats, late_engines


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


def test_keepers_of_several_models_have_a_gpu_each_from_the_last_on():
    assert [keeper_gpu(("a", "b", "c"), others) for others in range(4)] == ["c", "b", "a", "c"]
    assert keeper_gpu((), 0) == ""


def started(monkeypatch, gpu):
    """The arguments and the environment with which a keeper is started."""
    found: list[Any] = []

    async def start(*arguments, env, **_):
        found.append((list(arguments), env))
        raise OSError("seen")

    async def main():
        monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
        await KeeperAdapter("m", "ipc:///d.sock", LogConfig(), lambda model: None, gpu=gpu).warm(deadline=soon())

    asyncio.run(main())
    return found[0]


@pytest.mark.parametrize("gpu", ["", "uuid"])
def test_a_keeper_sees_one_gpu_or_none(monkeypatch, gpu):
    arguments, environment = started(monkeypatch, gpu)
    assert environment["CUDA_VISIBLE_DEVICES"] == ("GPU-uuid" if gpu else "")
    assert ("--gpu" in arguments) == bool(gpu)


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


class Fetched:
    """As `FetchedBuckets`, of slots that are in host memory after all."""

    device = torch.device("cuda", 0)

    def __init__(self, room):
        self.room = room
        self.manifests: list[Any] = []

    def expect(self, manifest, *, deadline):
        self.manifests.append(manifest)

    def settle(self, *, deadline):
        pass

    def copy(self, bucket, lease, *, deadline):
        kept = self.room(lease.nbytes)
        kept.numpy()[:] = lease.view
        lease.release()
        return kept


@pytest.fixture
def by_gpu(monkeypatch):
    """A store that reads slots by a GPU, as far as it knows."""
    monkeypatch.setattr(worker, "ArenaOffer", SimpleNamespace(unpack=lambda offer: SimpleNamespace(memory="there")))
    monkeypatch.setattr(worker, "CudaIpcReceiver", lambda device: ShmReceiver())
    memory = LockedMemory(0, lambda address, nbytes, device: "", lambda address, device: None)
    fetched = Fetched(memory.take)
    monkeypatch.setattr(Store, "_fetched", lambda store, gpu: fetched)
    store = Store(0)
    store._locked = memory
    return store, fetched


def take(store, buckets, version, count=None, after=None):
    """An update of so many buckets, all by default."""
    store.begin(version, after, buckets.manifest.pack(), [buckets.offer], deadline=soon())
    for bucket in range(buckets.manifest.buckets if count is None else count):
        store.load(bucket, buckets.ticket(bucket), deadline=soon())


def test_what_is_kept_is_what_was_pushed(buckets):
    store = Store()
    take(store, buckets, 3)
    store.finish()
    assert store.kept is None, "not before it is committed"
    store.commit()
    kept: Any = store.kept
    assert not kept.whole, "nobody has said so"
    store.settle(whole=3)
    assert kept.whole
    assert (kept.version, kept.nbytes) == (3, sum(t.nbytes for t in TENSORS.values()))
    source = kept.source()
    layout = source.layout()
    assert layout.tensors.aliases == (("head", "embed"),)
    held = {layout.shard(i).name: source.local(i) for i in range(len(layout))}
    assert held.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(held[name], tensor), name
        assert held[name].dtype == tensor.dtype


def test_what_comes_by_a_gpu_is_kept_in_memory_that_the_push_after_next_has_again(by_gpu, buckets, monkeypatch):
    store, fetched = by_gpu
    taken = []
    for version in (1, 2, 3, 4):
        if version == 3:  # what is spare counts as free
            monkeypatch.setattr("weightsync.keeper.store.available", lambda: 0)
        take(store, buckets, version)
        store.finish()
        store.commit()
        store.settle(whole=version)
        gc.collect()
        kept: Any = store.kept
        assert kept.tensors.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert torch.equal(kept.tensors[name], tensor), name
            assert kept.tensors[name].dtype == tensor.dtype
        taken.append(kept.tensors["norm"].data_ptr())
    assert taken[0] != taken[1]
    assert taken[2:] == taken[:2]
    assert len({id(manifest) for manifest in fetched.manifests}) == 1, "what a GPU has of a layout is good still"


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


def test_an_update_that_is_given_up_takes_no_memory(buckets):
    store = Store()
    take(store, buckets, 3, count=1)
    store.settle(whole=None)
    assert store._coming is None


def test_where_there_is_no_room_the_update_is_refused_and_what_is_kept_stays(buckets, monkeypatch):
    store = Store()
    take(store, buckets, 3)
    store.finish()
    store.commit()
    monkeypatch.setattr("weightsync.keeper.store.available", lambda: 1000)
    with pytest.raises(EngineError, match=r"do not fit into host memory, of which 0\.0 GB are free"):
        take(store, buckets, 4)
    assert store.kept is not None
    assert store.kept.version == 3


@pytest.fixture
def some(tmp_path):
    (tmp_path / "some").mkdir()
    made = Buckets(tmp_path / "some", 512, {"norm": torch.ones(7).to(torch.bfloat16), "more": torch.ones(2)})
    yield made
    made.close()


def committed(store, buckets, version, *, after, partial):
    take(store, buckets, version, after=after)
    store.finish()
    store.commit()
    store.settle(whole=None if partial else version)


def test_a_push_of_some_tensors_leaves_the_others_as_they_were_kept(buckets, some):
    store = Store()
    committed(store, buckets, 3, after=None, partial=False)
    committed(store, some, 4, after=3, partial=True)
    kept: Any = store.kept
    assert (kept.version, kept.whole) == (4, True)
    assert kept.tensors.keys() == TENSORS.keys() | {"more"}
    assert torch.equal(kept.tensors["norm"], some.tensors["norm"])
    assert torch.equal(kept.tensors["embed"], TENSORS["embed"])
    assert kept.aliases == {"head": "embed"}


def test_a_push_that_came_to_nothing_makes_nothing_whole(some):
    store = Store()
    committed(store, some, 6, after=None, partial=True)
    take(store, some, 7, after=6, count=0)
    store.settle(whole=None)  # it was aborted
    store.settle(whole=8)  # it was committed, and this keeper had left it
    kept: Any = store.kept
    assert (kept.version, kept.whole) == (6, False)


@pytest.mark.parametrize("after", [None, 3, 5])
def test_a_push_of_some_tensors_over_another_than_was_kept_is_not_whole(buckets, some, after):
    store = Store()
    if after == 5:  # what is kept is older than what the engines have
        committed(store, buckets, 3, after=None, partial=False)
    committed(store, some, 6, after=after, partial=True)
    kept: Any = store.kept
    assert (kept.version, kept.whole) == (6, False)


# --- when it is pushed again ------------------------------------------------------------------------------------------


class Keeper:
    """One that keeps version 7 of model m, and fails as often as it is told to."""

    alive = True

    def __init__(self, fails=0):
        self.version, self.fails, self.asked = 7, fails, []

    async def repeat(self, engines, *, deadline):
        self.asked.append(engines)
        if self.fails:
            self.fails -= 1
            raise PushAborted("e1 refuses")

    async def close(self):
        raise AssertionError("it answers")


def bring_up(keeper, engines, *, newest=7, looks=1):
    async def refresh():
        pass

    repeats = Repeats(
        {"m": keeper},
        TimeoutConfig(probe_every=0.001),
        engines=lambda: engines,
        refresh=refresh,
        newest=lambda model: newest,
        busy=lambda: False,
    )

    async def main():
        for _ in range(looks):
            await repeats._bring_up("m", keeper)
            repeats._failures = {name: (times, 0.0) for name, (times, _) in repeats._failures.items()}

    asyncio.run(main())
    return keeper.asked


def test_late_engines_get_it_together():
    assert bring_up(Keeper(), [status("e1", "blank", None), status("e2", version=6)]) == [["e1", "e2"]]


def test_what_is_older_than_the_last_push_is_not_repeated():
    """The keeper has missed version 8, which engines had before they all restarted."""
    assert bring_up(Keeper(), [status("e1", "blank", None)], newest=8) == []


def test_an_engine_that_refuses_does_not_keep_the_others_from_it():
    asked = bring_up(Keeper(fails=1), [status("e1", "blank", None), status("e2", "torn", None)], looks=2)
    assert asked == [["e1", "e2"], ["e1"]]
