"""Our side in a vLLM worker, with stand-ins for the few things of vLLM that it calls."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from tests.hand_push import HandPush, as_bytes, manifest_of, soon
from tests.places_kit import write
from weightsync.adapters.vllm.extension import answer
from weightsync.adapters.vllm.path_plugin import ExtensionPath
from weightsync.adapters.vllm.reload import WeightReload, worker_index
from weightsync.errors import EngineError, LocalProtocolError
from weightsync.plan.exposure import Exposures
from weightsync.plan.replay_facts import NOT_WHOLE

RELOAD = "vllm.model_executor.model_loader.reload"


class Info:
    def __init__(self, half_loaded):
        self.half_loaded = half_loaded
        self.load_numel = 7
        self.loaded_weights = ["something"]

    def can_load(self):
        return self.half_loaded


class Model(torch.nn.Module):
    """Loads what it knows, by copying, and says what it loaded."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace()
        self.embed = torch.nn.Linear(4, 8, bias=False)
        self.norm = torch.nn.Linear(2, 2, bias=False)
        self.head = self.embed
        self.deaf: set[str] = set()
        self.asked: list[str] = []

    def load_weights(self, weights):
        known = dict(self.named_parameters(remove_duplicate=False))
        loaded = set()
        for name, tensor in weights:
            self.asked.append(name)
            if name not in self.deaf:
                known[name].data.copy_(tensor)
                loaded.add(name)
        return loaded


@pytest.fixture
def vllm(monkeypatch):
    """What was done to the model's reload, in order."""
    calls: list[str] = []
    infos: dict[torch.nn.Module, Info] = {}
    reload: Any = ModuleType(RELOAD)
    reload.initialize_layerwise_reload = lambda model: calls.append("initialize")
    reload.finalize_layerwise_reload = lambda model, config: calls.append("finalize")
    layerwise: Any = ModuleType(f"{RELOAD}.layerwise")
    layerwise.get_layerwise_info = lambda layer: infos.setdefault(layer, Info(False))
    config: Any = ModuleType("vllm.config")
    config.set_current_vllm_config = lambda config: nullcontext()
    for module in (reload, layerwise, config):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.model_loader"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return SimpleNamespace(calls=calls, infos=infos)


def vllm_config(**parallel):
    ranks = {"rank": 0, "world_size": 1, "data_parallel_size": 1, "data_parallel_index": 0, "pipeline_parallel_size": 1}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**{**ranks, **parallel}),
        model_config=SimpleNamespace(quantization=None),
        speculative_config=None,
    )


class Worker:
    def __init__(self, model):
        self.vllm_config = vllm_config()
        self.device = torch.device("cpu")
        self.model_runner = SimpleNamespace(get_model=lambda: model)

    def ask(self, do, **request):
        return answer(self, json.dumps({"do": do, **request}))


def text(data):
    return base64.b64encode(data).decode()


def weights(*names):
    shapes = {"embed.weight": (8, 4), "norm.weight": (2, 2), "other.weight": (2, 2)}
    return as_bytes((name, torch.rand(shapes[name])) for name in names)


def push(worker, tensors, version=3, aliases=(), *, at_once=1, seen=False):
    with HandPush(slot_bytes=256) as hand:
        manifest = hand.manifest(tensors, aliases)
        offers = [[text(offer) for offer in rank] for rank in hand.offers("e", 1)]
        told = text(manifest.digest if seen else manifest.pack())
        worker.ask("begin", version=version, manifest=told, offers=offers, seconds=30)
        for first in range(0, manifest.buckets, at_once):
            several = range(first, min(first + at_once, manifest.buckets))
            tickets = [[text(t) for t in hand.tickets(manifest, bucket, tensors, "e", 1)] for bucket in several]
            worker.ask("load", bucket=first, tickets=tickets, seconds=30)
        worker.ask("finish")
        return worker.ask("serve", version=version)


def test_a_push_through_the_extension(vllm):
    model = Model()
    worker = Worker(model)
    tensors = weights("embed.weight", "norm.weight")
    assert push(worker, tensors) == {"weight_version": "3", "replay": None}
    assert as_bytes(model.named_parameters()) == tensors
    assert vllm.calls == ["initialize", "finalize"]
    assert worker.ask("hello")["weight_version"] == "3"


@pytest.mark.parametrize("step", ["load", "draw", "places", "finish"])
def test_a_step_of_another_daemons_update_is_refused(vllm, step):
    """Two of one layout: whose finish comes first would commit what lies there of the other's."""
    model = Model()
    worker, tensors = Worker(model), weights("embed.weight", "norm.weight")
    with HandPush(slot_bytes=256) as hand:
        manifest = hand.manifest(tensors, ())
        offers = [[text(offer) for offer in rank] for rank in hand.offers("e", 1)]
        for update, version in (("mine", 17), ("another's", 18)):
            told = text(manifest.pack())
            worker.ask("begin", version=version, manifest=told, offers=offers, seconds=30, update=update)
        tickets = [[text(ticket) for ticket in hand.tickets(manifest, 0, tensors, "e", 1)]]
        with pytest.raises(LocalProtocolError, match="another update has begun"):
            worker.ask(step, bucket=0, tickets=tickets, seconds=30, update="mine")
        assert "finalize" not in vllm.calls
        worker.ask("load", bucket=0, tickets=tickets, seconds=30, update="another's")


def test_others_write_into_the_model_once_no_loader_is_needed(vllm):
    sys.modules[f"{RELOAD}.layerwise"]._place_kernel_tensors = lambda layer, info: None  # type: ignore[attr-defined]
    model = Model()
    worker, digests = Worker(model), set()

    async def workers(do: str, *, deadline: float, **request: Any) -> list[dict[str, Any]]:
        return [worker.ask(do, **request)]

    server: Any = SimpleNamespace(engine="e", world=1, workers=workers)
    path = ExtensionPath(server, draft=False)
    with HandPush(slot_bytes=256) as hand:
        for number in range(4):
            tensors = weights("embed.weight", "norm.weight")
            manifest = hand.manifest(tensors)
            offers, told = [[text(offer) for offer in rank] for rank in hand.offers("e", 1)], text(manifest.pack())
            worker.ask("begin", version=number, manifest=told, offers=offers, seconds=30, pull=True)
            found = asyncio.run(path.places(deadline=soon()))
            if number < 2:
                assert found == f"tp rank 0: {NOT_WHOLE}"
                for bucket in range(manifest.buckets):
                    tickets = [[text(t) for t in hand.tickets(manifest, bucket, tensors, "e", 1)]]
                    worker.ask("load", bucket=bucket, tickets=tickets, seconds=30)
            else:
                assert isinstance(found, Exposures)
                digests.add(found.digest)
                write(found.ranks, manifest, tensors)
            worker.ask("finish")
            assert worker.ask("serve", version=number)["replay"]["pulled"] == (manifest.buckets if number > 1 else 0)
            assert as_bytes(model.named_parameters()) == tensors
    assert len(digests) == 1


def test_a_kv_connector_is_told_of(vllm):
    worker = Worker(Model())
    assert not worker.ask("hello")["connector"]
    worker.vllm_config.kv_transfer_config = SimpleNamespace(kv_connector="OffloadingConnector")
    assert worker.ask("hello")["connector"]


def test_a_step_under_way_on_a_gpu_ends_before_anything_is_written(monkeypatch):
    done: list[str] = []

    class Slots:
        manifest = manifest_of({"a": ("float32", (1,), bytes(4))}, slot_bytes=64)

        def begin(self, manifest, offers, *, deadline):
            done.append("begin")

    state = WeightReload(vllm_config(), torch.device("cpu"))
    state._device = torch.device("cuda", 3)
    monkeypatch.setattr(state, "_slots", Slots())
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: done.append(f"synchronize {device}"))
    state.begin(3, Slots.manifest.pack(), [], 30.0)
    assert done == ["synchronize cuda:3", "begin"]


def test_further_names_of_a_tensor_are_loaded_too(vllm):
    model = Model()
    push(Worker(model), weights("embed.weight"), aliases=[("head.weight", "embed.weight"), ("gone", "embed.weight")])
    assert model.asked == ["embed.weight", "head.weight"]


def test_several_buckets_in_one_call_of_a_manifest_that_was_seen(vllm):
    model = Model()
    worker, names = Worker(model), ("embed.weight", "norm.weight")
    push(worker, weights(*names))
    tensors = weights(*names)
    assert push(worker, tensors, 4, at_once=2, seen=True)["weight_version"] == "4"
    assert as_bytes(model.named_parameters()) == tensors
    with pytest.raises(LocalProtocolError, match="does not remember that manifest"):
        push(worker, weights("norm.weight"), 5, seen=True)


def test_what_the_model_ignores_is_named_and_the_worker_stays_torn(vllm):
    model = Model()
    model.deaf = {"norm.weight"}
    worker = Worker(model)
    with pytest.raises(EngineError, match=r"the model ignored norm\.weight"):
        push(worker, weights("embed.weight", "norm.weight"))
    assert worker.ask("hello")["weight_version"] == ">3"
    model.deaf = set()
    assert push(worker, weights("embed.weight", "norm.weight"), 4)["weight_version"] == "4"


def test_what_a_loader_trips_over_is_named(vllm):
    tensors = {"norm.weight": ("float32", (3, 1), bytes(12))}
    with pytest.raises(EngineError, match=r"could not load one of norm\.weight \(3, 1\): RuntimeError"):
        push(Worker(Model()), tensors)


def test_an_update_that_is_not_whole_does_not_finish(vllm):
    worker = Worker(Model())
    tensors = weights("embed.weight", "norm.weight")
    with HandPush(slot_bytes=256) as hand:
        manifest = text(hand.manifest(tensors).pack())
        offers = [[text(offer) for offer in rank] for rank in hand.offers("e", 1)]
        worker.ask("begin", version=3, manifest=manifest, offers=offers, seconds=30)
        with pytest.raises(LocalProtocolError, match="did not come whole"):
            worker.ask("finish")
    assert "finalize" not in vllm.calls


def test_half_loaded_layers_are_put_back_before_the_next_update(vllm):
    model = Model()
    left = vllm.infos[model.norm] = Info(True)
    push(Worker(model), weights("embed.weight"))
    assert vllm.calls[:2] == ["finalize", "initialize"]
    assert left.loaded_weights == []
    assert left.load_numel == 0


def test_a_check_loads_nothing(vllm):
    model = Model()
    fit = Worker(model).ask("check", manifest=text(manifest_of(weights("other.weight"), slot_bytes=256).pack()))
    assert fit["unknown"] == ("other.weight",)
    assert fit["unknowns"] == 1
    assert fit["untouched"] == ("embed.weight", "norm.weight", "head.weight")
    assert model.asked == []
    assert vllm.calls == []


def test_experts_that_a_cpu_would_not_repack_are_refused(vllm):
    model = Model()
    model.config.num_experts = 2
    fit = WeightReload(vllm_config(), torch.device("cpu")).fit(
        model, manifest_of(weights("embed.weight"), slot_bytes=256).pack()
    )
    assert "does not repack expert weights" in fit.partial[0]


def test_a_draft_model_that_is_not_there(vllm):
    with pytest.raises(EngineError, match="no draft model"):
        Worker(Model()).ask("check", manifest="", draft=True)


def test_an_unknown_request(vllm):
    with pytest.raises(LocalProtocolError, match="cannot do 'dance'"):
        Worker(Model()).ask("dance")


def test_the_backends_state_is_the_workers(vllm):
    worker: Any = Worker(Model())
    state = WeightReload(None, torch.device("cpu"))
    worker.weight_transfer_engine = SimpleNamespace(weightsync=state)
    assert worker.ask("hello")["incarnation"] == state.incarnation
    assert state.config is worker.vllm_config


def test_worker_index():
    assert worker_index(vllm_config(rank=1, world_size=4, data_parallel_index=2).parallel_config) == 9
    older = SimpleNamespace(rank=1, world_size=4, data_parallel_rank=2)
    assert worker_index(older) == 9
