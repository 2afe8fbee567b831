"""Our plugin as SGLang's scheduler calls it: a model of torch, real shared memory, and what it needs of SGLang."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
import torch

from tests.hand_push import HandPush, Tensors, soon
from tests.places_kit import write
from weightsync.adapters.held import HeldSums
from weightsync.adapters.sglang import orders, plugin
from weightsync.adapters.sglang.path_plugin import PluginPath
from weightsync.adapters.sglang.server import PluginState
from weightsync.errors import CodecError, LocalProtocolError
from weightsync.plan.packing import digest_of
from weightsync.plan.replay_facts import NOT_WHOLE

if TYPE_CHECKING:
    from collections.abc import Iterator

UPDATE = "0123456789abcdef"
TENSORS: Tensors = {
    "proj.weight": ("float32", (64, 8), np.arange(512, dtype=np.float32).tobytes()),
    "norm.weight": ("float32", (8,), np.ones(8, np.float32).tobytes()),
}


class Model(torch.nn.Module):
    """Takes what it is given, and refuses shapes that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(8, 64, bias=False)
        self.norm = torch.nn.LayerNorm(8, bias=False)

    def load_weights(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        with torch.no_grad():
            for name, tensor in tensors:
                parameter = dict(self.named_parameters())[name]
                if parameter.shape != tensor.shape:
                    raise ValueError(f"{name} has another shape")
                parameter.copy_(tensor)


class Reply(msgspec.Struct):
    success: bool
    message: str


class Scheduler:
    """What the plugin sees of SGLang's manager of weights, 0.5.21 and later."""

    tp_cpu_group = None

    def __init__(self) -> None:
        self.model = Model()

    def _select_runners(self, target: str) -> list[tuple[str, Any]]:
        return [(target, SimpleNamespace(model=self.model))]

    def ask(self, order: orders.Order | str) -> Any:
        action = order if isinstance(order, str) else orders.encode(order)
        return plugin._check_weights(lambda _self, request: request.action, self, SimpleNamespace(action=action))


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scheduler]:
    structs = ModuleType("sglang.srt.managers.io_struct")
    structs.CheckWeightsReqOutput = Reply  # type: ignore[attr-defined]
    for name in ("sglang", "sglang.srt", "sglang.srt.managers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, structs.__name__, structs)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda _: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _: 1)
    worker = plugin._Worker()
    monkeypatch.setattr(plugin, "_worker", worker)
    yield Scheduler()
    if worker._slots is not None:
        worker._slots.close()


def begin(hand: HandPush, target: str = "all", pull: bool = False) -> orders.Begin:
    offers = tuple(tuple(rank) for rank in hand.offers("e", 1))
    manifest = hand.manifest(TENSORS).pack()
    return orders.Begin(update=UPDATE, manifest=manifest, target=target, offers=offers, seconds=10.0, pull=pull)


def load(hand: HandPush, bucket: int, count: int = 1) -> orders.Load:
    manifest = hand.manifest(TENSORS)
    tickets = [tuple(hand.tickets(manifest, b, TENSORS, "e", 1)) for b in range(bucket, bucket + count)]
    return orders.Load(update=UPDATE, bucket=bucket, tickets=tuple(tickets), seconds=10.0)


def test_tensors_cut_over_buckets_arrive_whole(scheduler: Scheduler) -> None:
    with HandPush(slot_bytes=1024) as hand:
        assert scheduler.ask(begin(hand)).message == "begun"
        buckets = hand.manifest(TENSORS).buckets
        assert buckets > 1
        for bucket in range(buckets):
            assert scheduler.ask(load(hand, bucket)) == Reply(True, "loaded")
        assert scheduler.ask(orders.Finish(update=UPDATE)) == Reply(True, "finished")
    for name, parameter in scheduler.model.named_parameters():
        assert parameter.detach().numpy().tobytes() == TENSORS[name][2]


def test_several_buckets_of_one_order_are_loaded_one_after_the_other(scheduler: Scheduler) -> None:
    with HandPush(slot_bytes=1024) as hand:
        manifest = hand.manifest(TENSORS)
        assert manifest.buckets > 2
        for told in (manifest.pack(), manifest.digest):  # it is remembered
            with torch.no_grad():
                for parameter in scheduler.model.parameters():
                    parameter.zero_()
            order = msgspec.structs.replace(begin(hand), manifest=told)
            assert scheduler.ask(order) == Reply(True, "begun")
            for bucket in range(0, manifest.buckets, 2):
                several = load(hand, bucket, min(2, manifest.buckets - bucket))
                assert scheduler.ask(several) == Reply(True, "loaded")
            assert scheduler.ask(orders.Finish(update=UPDATE)) == Reply(True, "finished")
            for name, parameter in scheduler.model.named_parameters():
                assert parameter.detach().numpy().tobytes() == TENSORS[name][2]


def test_steps_of_another_daemons_update_are_refused(scheduler: Scheduler) -> None:
    """Two of one layout: whose finish comes first would commit what lies there of the other's."""
    with HandPush(slot_bytes=1024) as hand:
        assert scheduler.ask(begin(hand)).message == "begun"
        other = UPDATE.upper()
        assert scheduler.ask(msgspec.structs.replace(begin(hand), update=other)).message == "begun"
        draw = orders.Draw(update=UPDATE, exposures=b"", seconds=10.0)
        buckets = load(hand, 0)
        mine = [buckets, draw, orders.Places(update=UPDATE, known=()), orders.Finish(update=UPDATE)]
        for step in mine:
            answer = scheduler.ask(step)
            assert not answer.success
            assert "another update has begun" in answer.message
        assert scheduler.ask(msgspec.structs.replace(buckets, update=other)) == Reply(True, "loaded")


def test_steps_that_a_gpu_has_queued_end_before_anything_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    gpu = torch.device("cuda", 0)

    class Away(Model):
        def parameters(self, recurse: bool = True) -> Any:
            return iter([SimpleNamespace(device=gpu)])

    class Replay:
        def begin(self, *_: Any) -> None:
            done.append("replay")

    worker, model = plugin._Worker(), Away()
    worker._slots = SimpleNamespace(device=gpu, begin=lambda *_, **__: done.append("slots"))  # type: ignore[assignment]
    monkeypatch.setattr(plugin, "ModelReplay", Replay)
    monkeypatch.setattr(torch.accelerator, "synchronize", done.append)
    with HandPush() as hand:
        worker._begin([model], begin(hand), 0, experts_move=False)
    assert done == [gpu, "slots", "replay"]


def test_a_manifest_that_was_never_told_begins_nothing(scheduler: Scheduler) -> None:
    with HandPush(slot_bytes=1024) as hand:
        order = msgspec.structs.replace(begin(hand), manifest=bytes(16))
        assert "does not remember that manifest" in scheduler.ask(order).message
        assert "begin first" in scheduler.ask(load(hand, 0)).message


def test_what_lies_in_the_model_is_told_once_it_is_proved(scheduler: Scheduler) -> None:
    with HandPush(slot_bytes=1024) as hand:
        manifest = hand.manifest(TENSORS)
        asked = [kind(manifest=manifest.digest, target="all") for kind in (orders.Sums, orders.Boxes)]
        for told in (0, 2, 2):
            scheduler.ask(begin(hand))
            for bucket in range(manifest.buckets):
                scheduler.ask(load(hand, bucket))
            scheduler.ask(orders.Finish(update=UPDATE))
            (sums,), (boxes,) = (orders.unpack_answers(scheduler.ask(order).message) for order in asked)
            held = msgspec.msgpack.decode(sums, type=HeldSums)
            assert len(held.sums) == 8 * told
            assert held.boxes == (digest_of(boxes) if told else b"")


def test_buckets_are_taken_out_of_their_slots_once_no_loader_needs_them(scheduler: Scheduler) -> None:
    with HandPush(slot_bytes=1024) as hand:
        buckets = hand.manifest(TENSORS).buckets
        for pulled in (0, 0, buckets):
            with torch.no_grad():
                scheduler.model.norm.weight.zero_()
            scheduler.ask(begin(hand, pull=True))
            for bucket in range(buckets):
                assert scheduler.ask(load(hand, bucket)) == Reply(True, "loaded")
            scheduler.ask(orders.Finish(update=UPDATE))
            assert plugin._worker._replays[scheduler.model].pulled == pulled
            for name, parameter in scheduler.model.named_parameters():
                assert parameter.detach().numpy().tobytes() == TENSORS[name][2]


def path_to(scheduler: Scheduler) -> PluginPath:
    async def call(route: str, body: dict[str, str], *, deadline: float) -> str:
        answer = scheduler.ask(body["action"])
        assert answer.success, answer.message
        return str(answer.message)

    server: Any = SimpleNamespace(engine="e", call=call)
    profile: Any = SimpleNamespace(sessions=False)
    path = PluginPath(server, profile, "all", 1)
    path._update = UPDATE  # as it is drawn when the update begins, which is ordered by hand here
    return path


def test_others_write_into_the_model_once_no_loader_is_needed(scheduler: Scheduler) -> None:
    path, seen = path_to(scheduler), set()
    with HandPush(slot_bytes=1024) as hand:
        manifest = hand.manifest(TENSORS)
        assert "begin first" in scheduler.ask(orders.Places(update=UPDATE, known=())).message
        for number in range(6):
            by_buckets = number in (0, 1, 3)  # in the fourth push they come after all
            with torch.no_grad():
                scheduler.model.norm.weight.zero_()
            scheduler.ask(begin(hand, pull=True))
            found = asyncio.run(path.places(deadline=soon()))
            assert isinstance(found, str) == (number < 2), found
            if isinstance(found, str):
                assert found == f"tp rank 0: {NOT_WHOLE}"
            else:
                seen.add(found.digest)
            if by_buckets:
                for bucket in range(manifest.buckets):
                    scheduler.ask(load(hand, bucket))
            elif not isinstance(found, str):
                write(found.ranks, manifest, TENSORS)
            assert scheduler.ask(orders.Finish(update=UPDATE)) == Reply(True, "finished")
            assert plugin._worker._replays[scheduler.model].pulled == (0 if number < 2 else manifest.buckets)
            for name, parameter in scheduler.model.named_parameters():
                assert parameter.detach().numpy().tobytes() == TENSORS[name][2]
        assert len(seen) == 2, "there is another landing once buckets have come"


def test_places_are_not_shown_to_a_daemon_that_will_not_compare(scheduler: Scheduler) -> None:
    path = path_to(scheduler)
    with HandPush(slot_bytes=1024) as hand:
        manifest = hand.manifest(TENSORS)
        for _ in range(3):
            scheduler.ask(begin(hand))
            assert asyncio.run(path.places(deadline=soon())) == f"tp rank 0: {NOT_WHOLE}"
            for bucket in range(manifest.buckets):
                scheduler.ask(load(hand, bucket))
            scheduler.ask(orders.Finish(update=UPDATE))


def test_an_older_plugin_is_told_nothing_that_it_does_not_know() -> None:
    order = orders.Begin(update=UPDATE, manifest=b"", target="all", offers=(), seconds=1.0)
    assert not any(word in msgspec.msgpack.encode(order) for word in (b"pull", b"anew"))


def test_what_ranks_answer_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = [b"a", b"bcd"]

    def all_gather(out: list[torch.Tensor], mine: torch.Tensor, group: Any) -> None:
        for there, one in zip(out, theirs, strict=True):
            padded = list(one.ljust(3, b"\0"))
            there.copy_(torch.tensor([len(one)]) if mine.dtype == torch.int64 else torch.tensor(padded))

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    answers = plugin._gathered(b"a", None)
    assert answers == theirs
    assert orders.unpack_answers(orders.pack_answers(answers)) == theirs
    with pytest.raises(CodecError, match="cannot be read"):
        orders.unpack_answers("weightsync")


def test_names_are_judged_before_anything_is_loaded(scheduler: Scheduler) -> None:
    with HandPush() as hand:
        odd: Tensors = {"norm.weight": TENSORS["norm.weight"], "norm.scale.x": ("float32", (1,), bytes(4))}
        answer = scheduler.ask(orders.Accept(manifest=hand.manifest(odd).pack(), target="all"))
    assert answer.success
    accepted = msgspec.json.decode(answer.message, type=orders.Accepted)
    assert accepted == orders.Accepted(unknown=("norm.scale.x",), untouched=("proj.weight",))


def test_failures_are_answers(scheduler: Scheduler, caplog: pytest.LogCaptureFixture) -> None:
    assert "begin first" in scheduler.ask(orders.Finish(update=UPDATE)).message
    assert not scheduler.ask("weightsync1:!").success
    assert "another protocol" in scheduler.ask("weightsync9:gaA=").message
    scheduler.model.proj = torch.nn.Linear(4, 4, bias=False)
    with HandPush() as hand:
        assert scheduler.ask(begin(hand)).success
        answer = scheduler.ask(load(hand, 0))
        assert (answer.success, answer.message) == (False, "ValueError: proj.weight has another shape")
        assert "Load failed" in caplog.text
        scheduler.model.proj = torch.nn.Linear(8, 64, bias=False)
        assert scheduler.ask(begin(hand)).success  # the next push
        assert scheduler.ask(load(hand, 0)).success
        assert scheduler.ask(orders.Finish(update=UPDATE)).success


def test_an_update_that_is_not_complete_does_not_finish(scheduler: Scheduler) -> None:
    with HandPush(slot_bytes=1024) as hand:
        assert scheduler.ask(begin(hand)).success
        answer = scheduler.ask(orders.Finish(update=UPDATE))
    assert not answer.success
    assert "did not come whole" in answer.message


@pytest.mark.parametrize("asks", [lambda model: getattr(model, "why", None), lambda: "a split of the weights is kept"])
def test_weights_of_which_graphs_keep_copies_are_refused_as_sglang_does(
    asks: Any, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("sglang.srt.model_executor.model_runner_components.weight_updater")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with HandPush() as hand:
        accept = orders.Accept(manifest=hand.manifest(TENSORS).pack(), target="all")
        assert not msgspec.json.decode(scheduler.ask(accept).message, type=orders.Accepted).refused
        module._unsupported_derived_weight_cache_error = asks  # type: ignore[attr-defined]
        scheduler.model.why = "a split of the weights is kept"  # type: ignore[assignment]
        answer = msgspec.json.decode(scheduler.ask(accept).message, type=orders.Accepted)
        assert answer == orders.Accepted(refused="a split of the weights is kept")
        begun = scheduler.ask(begin(hand))
        assert (begun.success, begun.message) == (False, "a split of the weights is kept")
        assert "begin first" in scheduler.ask(load(hand, 0)).message


@pytest.mark.parametrize("home", ["mm_schedule", "mm_utils"])
def test_embeddings_of_images_by_the_old_weights_are_forgotten(
    home: str, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType(f"sglang.srt.managers.{home}")
    module.embedding_cache = {"an image": "its embedding"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with HandPush() as hand:
        scheduler.ask(begin(hand))
        scheduler.ask(load(hand, 0))
        assert module.embedding_cache
        assert scheduler.ask(orders.Finish(update=UPDATE)) == Reply(True, "finished")
        assert not module.embedding_cache
        module.embedding_cache = None  # type: ignore[attr-defined]  # a model without images has none
        scheduler.ask(begin(hand))
        scheduler.ask(load(hand, 0))
        assert scheduler.ask(orders.Finish(update=UPDATE)) == Reply(True, "finished")


def test_actions_of_sglang_itself_go_on_to_it(scheduler: Scheduler) -> None:
    assert scheduler.ask("checksum") == "checksum"


def test_before_selectors_there_is_the_served_model_only(scheduler: Scheduler) -> None:
    runner = SimpleNamespace(model=scheduler.model)
    old = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner), draft_worker=object())
    assert plugin._models(old, "target") == [scheduler.model]
    with pytest.raises(LocalProtocolError, match="draft model"):
        plugin._models(old, "all")


def test_a_failure_of_another_rank_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(out: list[torch.Tensor], mine: torch.Tensor, group: Any) -> None:
        out[0].copy_(mine)
        out[1][:4] = torch.tensor(list(b"oops"), dtype=torch.uint8)

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    assert plugin._agree("", None) == "tp rank 1: oops"
    assert plugin._agree("é" * 2000, None).startswith("tp rank 0: éé")


def test_what_server_info_tells_and_an_order_asks_for(scheduler: Scheduler) -> None:
    result = SimpleNamespace(internal_state={})
    assert scheduler.ask(orders.State()).success is False, "nobody knows it yet"
    model_runner = SimpleNamespace(model=scheduler.model)
    running = SimpleNamespace(
        _engine_paused=True,
        weight_updater=SimpleNamespace(offload_tags={"weights", "kv_cache"}),
        tp_worker=SimpleNamespace(model_runner=model_runner),
    )
    plugin._get_internal_state(result, running)
    told = result.internal_state["weightsync"]
    assert told == {
        "protocol": 4,
        "incarnation": plugin._worker.incarnation,
        "paused": True,
        "asleep": ["kv_cache", "weights"],
        "requantises": False,
        "replay": None,
    }
    answer = scheduler.ask(orders.State())
    assert answer.success
    assert msgspec.json.decode(answer.message) == told
    del running.tp_worker  # as in an SGLang that has it elsewhere: its scheduler must not end for that
    later = SimpleNamespace(internal_state={"load": 1})
    plugin._get_internal_state(later, running)
    assert later.internal_state == {"load": 1}
    running.tp_worker = SimpleNamespace(model_runner=model_runner)
    running._engine_paused, running.weight_updater.offload_tags = False, set()
    now = msgspec.json.decode(scheduler.ask(orders.State()).message, type=PluginState)
    assert (now.paused, now.asleep, now.incarnation) == (False, (), told["incarnation"])


def test_another_process_is_another_incarnation() -> None:
    assert plugin._Worker().incarnation != plugin._Worker().incarnation


def test_processes_without_a_scheduler_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    plugin.register()  # sglang is not installed here: importing any of it would fail
