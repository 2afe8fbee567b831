"""slime's interface, copied from its sources, drives the weight updater; SGLang's real router is shown the engines.

The copy: module names, what `MegatronTrainRayActor.init` and `update_weights` call and with which arguments, and what
`SGLangEngine` answers. slime itself is not on PyPI and needs GPUs.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests.engines.router import running_router
from tests.own import named
from weightsync.errors import ConfigError, EngineError
from weightsync.fleet import Fleet
from weightsync.integrations.router import Router
from weightsync.integrations.slime import UpdateWeightFromWeightsync, install
from weightsync.operator import change_engines, fetch_status

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
BASE = "slime.backends.megatron_utils"


class Remote:
    """A method of a Ray actor."""

    def __init__(self, answer: object) -> None:
        self._answer = answer

    def remote(self) -> object:
        return self._answer


def engine_actor(url: str) -> SimpleNamespace:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return SimpleNamespace(get_server_host=Remote(host), get_server_port=Remote(int(port)))


class HfWeightIteratorDirect:
    """Whole tensors under Hugging Face's names, a few at a time; slime's makes them by collectives."""

    def __init__(self, args, model, model_name, quantization_config) -> None:
        assert quantization_config is None

    def get_hf_weight_chunks(self, megatron_local_weights):
        pairs = list(megatron_local_weights.items())
        for first in range(0, len(pairs), 4):
            yield pairs[first : first + 4]


@pytest.fixture
def actor(monkeypatch) -> ModuleType:
    """`slime.backends.megatron_utils.actor`, with the classes that it chooses among."""
    modules = {}
    names = ["slime", "slime.backends", BASE, f"{BASE}.update_weight"]
    for name in [*names, f"{BASE}.actor", f"{BASE}.update_weight.hf_weight_iterator_direct", "ray"]:
        modules[name] = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, modules[name])
    modules["ray"].__dict__["get"] = lambda references: references
    found = modules[f"{BASE}.actor"]
    found.__dict__.update(UpdateWeightFromTensor=object, UpdateWeightFromDistributed=object)
    iterators = modules[f"{BASE}.update_weight.hf_weight_iterator_direct"]
    iterators.__dict__["HfWeightIteratorDirect"] = HfWeightIteratorDirect
    return found


class Training:
    """What `MegatronTrainRayActor` does of weights: `init`, `update_weights`."""

    def __init__(self, actor, args, weights) -> None:
        chosen = actor.UpdateWeightFromTensor if args.colocate else actor.UpdateWeightFromDistributed
        self.weights = weights
        self.updater = chosen(
            args, [], weights_getter=lambda: self.weights, model_name="qwen3", quantization_config=None
        )

    def update_weights(self, engines, num_new_engines: int = 0) -> None:
        if num_new_engines > 0:
            counts, offsets = [1] * len(engines), list(range(len(engines)))
            self.updater.connect_rollout_engines(engines, None, engine_gpu_counts=counts, engine_gpu_offsets=offsets)
        self.updater.update_weights()


@pytest.fixture
def site(node):
    """A daemon that knows no engine; the node's engines are slime's, or were started by others."""
    with Fleet() as fleet:
        yield SimpleNamespace(node=node, fleet=fleet, daemon=fleet.start_daemon(named("slime0")))


def options(site, **more):
    given = {"daemon": site.daemon.endpoint, "kind": "reference", "timeout": 60, **more}
    return SimpleNamespace(colocate=False, weightsync=given)


def test_slimes_actor_pushes_through_weightsync(actor, site):
    args, node = options(site), site.node
    install(args)
    assert actor.UpdateWeightFromTensor is actor.UpdateWeightFromDistributed is UpdateWeightFromWeightsync
    training = Training(actor, args, node.weights("B"))
    engines = [engine_actor(engine.url) for engine in node.engines]
    training.update_weights(engines, num_new_engines=len(engines))
    node.assert_holds(node.weights("B"), training.updater.weight_version)
    assert training.updater.pop_metrics()["weightsync/bytes"] > 0
    assert training.updater.pop_metrics() == {}
    training.weights = node.weights("A")
    training.update_weights(engines)
    node.assert_holds(node.weights("A"), training.updater.weight_version)

    # one engine was replaced: slime connects anew with those that are left
    training.update_weights(engines[:1], num_new_engines=1)
    assert [e.url for e in fetch_status(site.daemon.endpoint).engines] == [node.engines[0].url]

    # a restarted job counts from 0 again, and engines do not
    before = training.updater.weight_version
    again = Training(actor, args, node.weights("B"))
    again.update_weights(engines, num_new_engines=len(engines))
    assert again.updater.weight_version > before
    node.assert_holds(node.weights("B"), again.updater.weight_version)


def test_a_later_slime_has_a_function_that_chooses(actor):
    del actor.UpdateWeightFromTensor, actor.UpdateWeightFromDistributed
    actor.create_weight_updater = object
    install(SimpleNamespace())
    assert actor.create_weight_updater is UpdateWeightFromWeightsync


def test_a_slime_that_chooses_otherwise_is_named(actor):
    del actor.UpdateWeightFromTensor, actor.UpdateWeightFromDistributed
    with pytest.raises(ConfigError, match=r"slime\.backends\.megatron_utils\.actor has none of"):
        install(SimpleNamespace())


@pytest.mark.engines
def test_the_router_is_shown_engines_once_they_have_the_weights(actor, site, tmp_path):
    """External engines: not before the first push, and out again with whoever fell behind."""
    node = site.node
    with running_router(tmp_path / "router.log") as url:
        install(None)
        training = Training(actor, options(site, router=url), node.weights("A"))
        engines = [engine_actor(engine.url) for engine in node.engines]
        router = Router(url)
        training.updater.connect_rollout_engines(engines, None)
        assert router.workers() == {}
        training.update_weights(engines)
        assert set(router.workers()) == {engine.url for engine in node.engines}

        # e2 leaves the daemon, misses a push, and comes back: behind, so the router must let go of it
        status = {e.url: e for e in fetch_status(site.daemon.endpoint).engines}
        late = status[node.engines[1].url]
        change_engines(site.daemon.endpoint, remove=[late.name])
        training.update_weights(engines)
        training.updater.connect_rollout_engines(engines, None)
        router.show(fetch_status(site.daemon.endpoint).engines)
        assert set(router.workers()) == {node.engines[0].url}
        training.update_weights(engines)
        assert set(router.workers()) == {engine.url for engine in node.engines}


@pytest.mark.engines
def test_an_engine_that_the_router_does_not_take_is_named(site, tmp_path):
    from weightsync.wire.messages import EngineStatus

    with running_router(tmp_path / "router.log") as url:
        router = Router(url, timeout=2.0)
        gone = EngineStatus(
            name="gone", node="n", kind="sglang", model="default", url="http://127.0.0.1:9", state="serving", version=1
        )
        with pytest.raises(EngineError, match="gone is up to date and does not answer"):
            router.show([gone])
