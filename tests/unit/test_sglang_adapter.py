"""The adapter against what real SGLang servers answered: recorded exchanges, and the rules that they do not show."""

from __future__ import annotations

import asyncio
import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import numpy as np
import pytest

from tests.hand_push import Tensors, manifest_of, soon
from tests.recorded import FIXTURES, Replay, Through
from weightsync.adapters.sglang import orders
from weightsync.adapters.sglang.control import SGLangAdapter
from weightsync.adapters.sglang.path_plugin import PluginPath
from weightsync.errors import EngineError, EngineLost, EngineRefused
from weightsync.ipc.descriptors import seal
from weightsync.transports.group import GroupOffer, GroupTicket
from weightsync.transports.torch_shm import TorchShmTicket

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightsync.adapters.base import EngineInfo, PauseMode
    from weightsync.plan.manifest import Manifest

VERSIONS = ("0.5.23", "0.5.20", "0.5.15.post1")
URL = "http://127.0.0.1:31021"
NORMS: Tensors = {
    f"model.layers.{i}.input_layernorm.weight": ("float32", (128,), np.full(128, 0.5 + i, np.float32).tobytes())
    for i in range(2)
}
MANIFEST = manifest_of(NORMS, slot_bytes=512)
ODD = manifest_of({**NORMS, "model.layers.0.bogus.weight": ("float32", (1,), bytes(4))}, slot_bytes=512)
TICKET = seal(b"S", TorchShmTicket(reader="e/0", handle=b"/weightsync-none", nbytes=512, checksum=0))


def spec(path: str = "auto", target: str = "all", key: str | None = None, url: str = URL) -> Any:
    known = {"kind": "sglang", "name": "sgl", "url": url, "api_key": key, "ca_file": None, "gpus": ()}
    return SimpleNamespace(**known, path=path, target=target)


async def push(
    hand: SGLangAdapter,
    version: int,
    offers: Sequence[Sequence[bytes]],
    ticket: Callable[[int], bytes],
    mode: PauseMode = "keep",
    manifest: Manifest = MANIFEST,
    *,
    refused: str = "",
) -> EngineInfo:
    """A whole push of `manifest`, done even if it is `refused`; how the engine is while it is under way."""
    await hand.probe(deadline=soon())
    with pytest.raises(EngineRefused, match=refused) if refused else nullcontext():
        await hand.accept(manifest, deadline=soon())
    await hand.pause(mode, deadline=soon())
    await hand.begin(version, manifest, offers, deadline=soon())
    during = await hand.probe(deadline=soon())
    for bucket in range(manifest.buckets):
        await hand.load(bucket, [ticket(bucket)], deadline=soon())
    await hand.finish(version, deadline=soon())
    assert await hand.verify(manifest, np.zeros(len(manifest.tensors), np.uint64), deadline=soon()) is None
    await hand.resume(deadline=soon())
    return during


def replayed(name: str, version: str = "0.5.23", **options: Any) -> tuple[SGLangAdapter, Replay]:
    replay = Replay(FIXTURES / f"sglang-{version}-{name}.json")
    return SGLangAdapter(spec(**options), client=Through(replay)), replay


async def tensor_story(hand: SGLangAdapter, ticket: Callable[[int], bytes]) -> None:
    before = await hand.probe(deadline=soon())
    assert before.software.startswith("sglang 0.5.")
    assert before.profile.endswith("path tensor: asked for")
    assert (before.transport, before.tp_size, before.paused, before.torn) == ("torch-shm", 1, False, False)
    during = await push(hand, 17, [[b""]], ticket, "keep")
    assert (during.paused, during.torn, during.version) == (True, True, before.version)
    after = await hand.probe(deadline=soon())
    assert (after.version, after.paused, after.torn) == (17, False, False)
    assert after.incarnation == before.incarnation != ""
    # a push that stops half-way, and the next one
    await hand.pause("wait", deadline=soon())
    await hand.begin(18, MANIFEST, [[b""]], deadline=soon())
    assert (await hand.probe(deadline=soon())).version == 17
    await push(hand, 19, [[b""]], ticket, "abort")
    assert (await hand.probe(deadline=soon())).version == 19


async def plugin_story(hand: SGLangAdapter, offers: Sequence[Sequence[bytes]], ticket: Callable[[int], bytes]) -> None:
    info = await hand.probe(deadline=soon())
    assert info.profile.endswith("path plugin: our plugin answers")
    assert (info.transport, info.asleep) == ("mapped", False)
    with pytest.raises(EngineRefused, match=r"no place for 'model\.layers\.0\.bogus\.weight'"):
        await hand.accept(ODD, deadline=soon())
    left = await hand.accept(MANIFEST, deadline=soon())
    assert left is not None
    assert "model.layers.0.self_attn.qkv_proj.weight" in left
    assert "model.layers.0.input_layernorm.weight" not in left
    await hand.pause("none", deadline=soon())
    await hand.begin(3, MANIFEST, offers, deadline=soon())
    with pytest.raises(EngineError, match="ShmTicket") as failure:
        await hand.load(0, [b"no ticket"], deadline=soon())
    assert failure.value.phase == "load"
    torn = await hand.probe(deadline=soon())
    assert (torn.paused, torn.torn) == (True, True)
    await push(hand, 4, offers, ticket, refused="it is torn, so only a whole model")
    assert (await hand.probe(deadline=soon())).version == 4


async def sleep_story(hand: SGLangAdapter, offers: Sequence[Sequence[bytes]], ticket: Callable[[int], bytes]) -> None:
    """The server's weights and cache are released when it begins."""
    assert (await hand.probe(deadline=soon())).asleep
    await push(hand, 5, offers, ticket, refused="its weights are released, so only a whole model")
    assert not (await hand.probe(deadline=soon())).asleep


@pytest.mark.parametrize("version", VERSIONS)
def test_a_push_into_a_stock_server_and_its_repair(version: str) -> None:
    async def run() -> None:
        hand, replay = replayed("tensor", version, path="tensor")
        await tensor_story(hand, lambda _: TICKET)
        await hand.close()
        assert replay.rest() == []

    asyncio.run(run())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("fixture", "story"), [("plugin", plugin_story), ("asleep", sleep_story)])
def test_a_push_through_the_plugin(fixture: str, story: Any, version: str) -> None:
    async def run() -> None:
        hand, replay = replayed(fixture, version)
        await story(hand, [[b"o" * 100]], lambda _: b"t" * 100)
        await hand.close()
        assert replay.rest() == []

    asyncio.run(run())


def test_the_doctor_of_a_guarded_server() -> None:
    async def findings(fixture: str, key: str) -> list[tuple[str, str]]:
        hand, _ = replayed(fixture, key=key)
        found = await hand.examine(deadline=soon())
        await hand.close()
        return [(finding.level, finding.what) for finding in found]

    assert ("fail", "its weight endpoints do not take our key") in asyncio.run(findings("wrong-key", "no"))
    right = asyncio.run(findings("right-key", "secret"))
    assert ("ok", "its weight endpoints take our calls") in right
    assert ("warn", "our plugin is not loaded: pickles, whole tensors only, and a failed load ends the server") in right


class Server(httpx.AsyncBaseTransport):
    """Answers like a stock server; single answers can be replaced. Remembers what it was asked."""

    def __init__(self, version: str = "0.5.23", *, openapi: bool = True, **facts: Any) -> None:
        self.facts = {"version": version, "tp_size": 1, "dp_size": 1, "device": "cpu", "random_seed": 1, **facts}
        self.sessions = version >= "0.5.21"
        self.openapi = openapi
        self.weights = "default"
        self.replaced: dict[str, tuple[int, Any]] = {}
        self.asked: list[tuple[str, Any]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        path, content = request.url.path, await request.aread()
        body: Any = json.loads(content) if content else None
        if request.method == "POST":
            self.asked.append((path, body))
        if path in self.replaced:
            status, answer = self.replaced[path]
            return httpx.Response(status, json=answer)
        if path == "/update_weight_version" and request.method == "POST":
            self.weights = body["new_version"]
        answers: dict[str, Any] = {
            "/server_info": self.facts,
            "/model_info": {"weight_version": self.weights},
            "/openapi.json": self._openapi() if self.openapi else None,
        }
        if path not in self._paths() and path != "/openapi.json":
            return httpx.Response(404, json={"detail": "Not Found"})
        if request.method == "GET" and path not in answers:
            return httpx.Response(405, json={"detail": "Method Not Allowed"})
        answer = answers.get(path, {"success": True, "message": "Success"})
        return httpx.Response(404 if answer is None else 200, json=answer)

    def _paths(self) -> list[str]:
        paths = ["server_info", "model_info", "pause_generation", "continue_generation", "flush_cache"]
        paths += ["hicache/storage-backend/clear"]
        paths += ["update_weight_version", "update_weights_from_tensor", "resume_memory_occupation"]
        paths += ["init_weights_update_group", "destroy_weights_update_group", "update_weights_from_distributed"]
        return [f"/{path}" for path in paths + ["begin_weight_update", "end_weight_update"] * self.sessions]

    def _openapi(self) -> dict[str, Any]:
        reference = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/T"}}}}
        fields = ["serialized_named_tensors", "load_format", "flush_cache"]
        fields += ["selector" if self.sessions else "disable_draft_model"]
        paths: dict[str, Any] = {path: {"post": {}} for path in self._paths()}
        paths["/update_weights_from_tensor"] = {"post": {"requestBody": reference}}
        return {"paths": paths, "components": {"schemas": {"T": {"properties": {field: {} for field in fields}}}}}

    def said(self, path: str) -> list[Any]:
        return [body for asked, body in self.asked if asked == path]


def served(server: Server, **options: Any) -> SGLangAdapter:
    return SGLangAdapter(spec(**options), client=Through(server))


def pushed(server: Server, mode: PauseMode = "keep", **options: Any) -> None:
    async def run() -> None:
        hand = served(server, **options)
        try:
            await push(hand, 2, [[b""]], lambda _: TICKET, mode)
        finally:
            await hand.close()

    asyncio.run(run())


def test_the_cache_is_flushed_once_and_the_version_set_last() -> None:
    server = Server()
    pushed(server)
    order = [path for path, _ in server.asked]
    assert order.count("/flush_cache") == 1
    assert order.index("/end_weight_update") < order.index("/flush_cache")
    last = len(order) - 1 - order[::-1].index("/update_weight_version")
    assert order.index("/flush_cache") < last < order.index("/continue_generation")
    assert server.said("/update_weight_version") == [
        {"new_version": ">2", "abort_all_requests": False},
        {"new_version": "2", "abort_all_requests": False},
    ]
    assert [body["flush_cache"] for body in server.said("/update_weights_from_tensor")] == [False, False]


@pytest.mark.parametrize(
    ("version", "mode", "waits", "word"),
    [
        ("0.5.23", "keep", False, "retract"),
        ("0.5.23", "wait", True, "retract"),
        ("0.5.23", "abort", False, "abort"),
        ("0.5.23", "none", False, "in_place"),
        ("0.5.15.post1", "keep", True, "abort"),
        ("0.5.15.post1", "wait", True, "abort"),
        ("0.5.15.post1", "none", False, "in_place"),
    ],
)
def test_pause_modes(version: str, mode: PauseMode, waits: bool, word: str) -> None:
    async def run() -> Server:
        server = Server(version)
        hand = served(server)
        await hand.probe(deadline=soon())
        await hand.pause(mode, deadline=soon())
        await hand.pause(mode, deadline=soon())  # waits for nobody: it is paused
        await hand.close()
        return server

    server = asyncio.run(run())
    assert server.said("/pause_generation") == [{"mode": word}] * 2
    drained = server.said("/update_weights_from_tensor")
    assert [body["load_format"] for body in drained] == ["direct"] * waits


def test_a_wait_outside_a_session_is_refused_after_the_wait_and_that_is_fine() -> None:
    server = Server()
    message = "update_weights_from_tensor must run between begin_weight_update() and end_weight_update()"
    server.replaced["/update_weights_from_tensor"] = (400, {"success": False, "message": message})

    async def run() -> None:
        hand = served(server)
        await hand.probe(deadline=soon())
        await hand.pause("wait", deadline=soon())
        await hand.close()

    asyncio.run(run())
    assert server.said("/pause_generation") == [{"mode": "retract"}]


@pytest.mark.parametrize(
    ("version", "target", "field"),
    [
        ("0.5.23", "all", {"selector": "all"}),
        ("0.5.23", "model", {"selector": "target"}),
        ("0.5.23", "draft", {"selector": "draft"}),
        ("0.5.15.post1", "all", {}),
        ("0.5.15.post1", "model", {"disable_draft_model": True}),
    ],
)
def test_which_model_takes_the_tensors(version: str, target: str, field: dict[str, Any]) -> None:
    facts: dict[str, Any] = {"speculative_algorithm": "EAGLE"} if target == "draft" else {}
    server = Server(version, **facts)
    pushed(server, target=target)
    for body in server.said("/update_weights_from_tensor")[-2:]:
        del body["serialized_named_tensors"], body["load_format"], body["flush_cache"]
        assert body == field
    assert server.said("/begin_weight_update") == ([field] if version == "0.5.23" else [])


@pytest.mark.parametrize(
    ("version", "facts", "options", "reason"),
    [
        ("0.5.23", {"dp_size": 2}, {}, "dp_size 2"),
        ("0.5.23", {"pp_size": 2}, {}, "pp_size 2"),
        ("0.5.23", {"weight_cache_mode": "client"}, {}, "--weight-cache-mode client"),
        ("0.5.23", {"enable_lora": True}, {}, "--enable-lora"),
        ("0.5.15.post1", {"quantization": "fp8"}, {}, "cannot load new weights over quantised ones"),
        ("0.5.23", {"quantization": "fp8"}, {}, "cannot load new weights over quantised ones"),
        ("0.5.15.post1", {"quantization": "fp8", "load_format": "flash_rl"}, {}, "--load-format flash_rl"),
        ("0.5.15.post1", {"quantization": "compressed-tensors"}, {}, "cannot load new weights"),
        ("0.5.15.post1", {"speculative_algorithm": "EAGLE"}, {"target": "draft"}, "cannot load into the draft model"),
        ("0.5.23", {}, {"target": "draft"}, "it has no draft model"),
        ("0.5.23", {"tokenizer_worker_num": 2}, {}, "each of its 2 tokenizer workers"),
        ("0.5.23", {"tp_size": 2}, {"path": "ipc"}, "only --tp 1"),
        ("0.5.15.post1", {}, {"path": "ipc"}, "asks CUDA for its UUID"),
    ],
)
def test_refusals(version: str, facts: dict[str, Any], options: dict[str, Any], reason: str) -> None:
    server = Server(version, **facts)
    with pytest.raises(EngineRefused, match=reason):
        pushed(server, **options)
    assert server.asked == []


def test_a_loader_that_quantises_anew_takes_weights() -> None:
    server = Server("0.5.23", quantization="fp8", load_format="flash_rl")
    pushed(server)
    assert server.weights == "2"


@pytest.mark.parametrize("path", ["tensor", "ipc"])
def test_stock_servers_on_gpus_take_handles_for_their_own_gpus(path: str) -> None:
    async def run() -> None:
        named = SimpleNamespace(**vars(spec(path)) | {"gpus": ("GPU-aa", "bb")})
        hand = SGLangAdapter(named, client=Through(Server(device="cuda", tp_size=2)))
        assert (await hand.probe(deadline=soon())).transport == "torch-cuda"
        await hand.close()
        blind = SGLangAdapter(spec(path, url="http://127.0.0.1:1"), client=Through(Server(device="cuda")))
        with pytest.raises(EngineError, match="cannot determine which GPUs"):
            await blind.probe(deadline=soon())
        await blind.close()

    asyncio.run(run())


def test_stock_servers_refuse_parts() -> None:
    async def run() -> None:
        hand = served(Server())
        await hand.probe(deadline=soon())
        big = manifest_of({"lm_head.weight": ("float32", (4, 128), bytes(2048))}, slot_bytes=1024)
        with pytest.raises(EngineRefused, match=r"whole ones only: 'lm_head\.weight'") as refusal:
            await hand.accept(big, deadline=soon())
        assert refusal.value.hint is not None
        assert "at least 2048" in refusal.value.hint
        await hand.close()

    asyncio.run(run())


def group(name: str, port: int = 29500) -> bytes:
    return GroupOffer(name=name, host="127.0.0.1", port=port, world=2, backend="gloo").pack()


def test_groups_are_joined_once_and_left_for_others() -> None:
    """One with each of two bridges; the second of which makes another, later."""
    server = Server()
    first, second, third = group("a", 1), group("b", 2), group("c", 3)

    async def run() -> None:
        hand = served(server, path="group")
        ticket = GroupTicket(group="a", sequence=1).pack()
        for version, offers in ((2, [first, second]), (3, [first, second]), (4, [first, third])):
            await push(hand, version, [offers], lambda _: ticket)
        await hand.close()

    asyncio.run(run())
    joined = server.said("/init_weights_update_group")
    assert [(body["group_name"], body["master_port"]) for body in joined] == [("a", 1), ("b", 2), ("c", 3)]
    assert all((body["rank_offset"], body["world_size"], body["backend"]) == (1, 2, "gloo") for body in joined)
    assert server.said("/destroy_weights_update_group") == [{"group_name": "b"}]
    loads = server.said("/update_weights_from_distributed")
    assert len(loads) == 3 * MANIFEST.buckets
    table = MANIFEST.tensors
    assert [name for body in loads[: MANIFEST.buckets] for name in body["names"]] == [
        table.names[tensor] for tensor in MANIFEST.piece_tensor.tolist()
    ]
    assert {body["group_name"] for body in loads} == {"a"}
    assert all(not body["flush_cache"] and "load_format" not in body for body in loads)


def test_a_group_that_cannot_be_joined_leaves_nothing_open() -> None:
    server = Server()
    server.replaced["/init_weights_update_group"] = (400, {"success": False, "message": "connection refused"})

    async def run() -> None:
        hand = served(server, path="group")
        with pytest.raises(EngineError, match="connection refused"):
            await push(hand, 2, [[group("a")]], lambda _: TICKET)
        await hand.close()

    asyncio.run(run())
    assert not server.said("/begin_weight_update")


def test_tensors_without_elements_cannot_be_broadcast() -> None:
    async def run() -> None:
        hand = served(Server(), path="group")
        await hand.probe(deadline=soon())
        empty = manifest_of(
            {"model.bias": ("float32", (0, 4), b""), "model.weight": ("float32", (4,), bytes(16))}, slot_bytes=64
        )
        with pytest.raises(EngineRefused, match=r"'model\.bias' has no elements"):
            await hand.accept(empty, deadline=soon())
        await hand.close()

    asyncio.run(run())


def test_a_failed_load_ends_the_session() -> None:
    server = Server()
    server.replaced["/update_weights_from_tensor"] = (400, {"success": False, "message": "no such parameter"})
    with pytest.raises(EngineError, match="no such parameter"):
        pushed(server)
    assert server.asked[-1][0] == "/end_weight_update"
    assert server.weights == ">2"


def test_a_success_of_false_is_a_failure_whatever_the_status() -> None:
    server = Server()
    server.replaced["/end_weight_update"] = (200, {"success": False, "message": "post-processing failed"})
    with pytest.raises(EngineError, match="post-processing failed"):
        pushed(server)


@pytest.mark.parametrize(("mode", "fails"), [("keep", True), ("none", False)])
def test_a_cache_that_cannot_be_flushed(mode: PauseMode, fails: bool) -> None:
    server = Server()
    server.replaced["/flush_cache"] = (400, "Flush cache failed.")
    if fails:
        with pytest.raises(EngineError, match="the cache could not be flushed"):
            pushed(server, mode)
    else:
        pushed(server, mode)
    assert server.weights == (">2" if fails else "2")


@pytest.mark.parametrize("mode", ["keep", "none"])
def test_what_hicache_has_stored_elsewhere_is_forgotten_too(mode: PauseMode) -> None:
    server = Server(hicache_storage_backend="file")
    pushed(server, mode)
    order = [path for path, _ in server.asked]
    assert order[order.index("/flush_cache") + 1] == "/hicache/storage-backend/clear"
    stock = Server(hicache_storage_backend=None)
    pushed(stock, mode)
    assert not stock.said("/hicache/storage-backend/clear")


@pytest.mark.parametrize("mode", ["keep", "none"])
def test_a_storage_that_cannot_be_cleared_leaves_the_server_torn(mode: PauseMode) -> None:
    server = Server(hicache_storage_backend="mooncake")
    server.replaced["/hicache/storage-backend/clear"] = (400, "")
    with pytest.raises(EngineError, match="/hicache/storage-backend/clear answered 400"):
        pushed(server, mode)
    assert server.weights == ">2"


def test_somebody_else_sets_the_version() -> None:
    server = Server()
    server.replaced["/update_weight_version"] = (200, {"success": True})
    with pytest.raises(EngineError, match="weight version is 'default', not the mark of 2"):
        pushed(server)


def test_a_server_that_restarted_after_it_was_loaded_is_not_labelled() -> None:
    """It holds its own checkpoint, and nobody has asked it anything since."""

    async def run() -> None:
        server = Server()
        hand = served(server)
        await push(hand, 2, [[b""]], lambda _: TICKET)
        await hand.pause("keep", deadline=soon())
        await hand.begin(3, MANIFEST, [[b""]], deadline=soon())
        await hand.finish(3, deadline=soon())
        server.weights, server.facts["random_seed"] = "default", 2
        server.asked.clear()
        with pytest.raises(EngineLost, match="was restarted during the push"):
            await hand.resume(deadline=soon())
        assert server.asked == []
        assert (await hand.probe(deadline=soon())).version is None
        await hand.close()

    asyncio.run(run())


def test_a_version_whose_comparison_failed_is_not_served_by_a_later_resume() -> None:
    async def run() -> None:
        server = Server()
        hand = served(server)
        await hand.probe(deadline=soon())
        await hand.pause("keep", deadline=soon())
        await hand.begin(2, MANIFEST, [[b""]], deadline=soon())
        await hand.finish(2, deadline=soon())  # … and compared, and found wrong
        await hand.pause("keep", deadline=soon())  # the next push, which ends before it begins
        await hand.resume(deadline=soon())
        assert server.weights == ">2"
        await hand.close()

    asyncio.run(run())


def test_a_restart_is_another_incarnation() -> None:
    async def run() -> None:
        server = Server()
        hand = served(server)
        first = await hand.probe(deadline=soon())
        await hand.pause("keep", deadline=soon())
        assert (await hand.probe(deadline=soon())).paused
        server.facts["random_seed"] = 2
        second = await hand.probe(deadline=soon())
        assert second.incarnation != first.incarnation
        assert not second.paused
        await hand.close()

    asyncio.run(run())


class PluginServer(Server):
    """… with our plugin, which answers by itself."""

    def __init__(self, **state: Any) -> None:
        super().__init__()
        self.state: dict[str, Any] = {"protocol": 4, "incarnation": "first", **state}
        self.looked = 0  # how often /server_info was asked for
        self.silent = False  # it knows no order that asks for its state
        self.paused = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/server_info":
            self.looked += 1
            self.facts["internal_states"] = [{"weightsync": self.state}]
        if request.url.path == "/weights_checker":
            assert json.loads(await request.aread())["action"] == orders.encode(orders.State())
            if self.silent:
                return httpx.Response(400, json={"success": False, "message": "an order that cannot be read"})
            return httpx.Response(200, json={"success": True, "message": json.dumps(self.state)})
        if request.url.path == "/ready" and "/ready" not in self.replaced:
            return httpx.Response(503 if self.paused else 200)
        return await super().handle_async_request(request)

    def _paths(self) -> list[str]:
        return [*super()._paths(), "/ready"]


def probes(server: Server, *changes: Callable[[], None]) -> list[EngineInfo]:
    """What one adapter finds, first, and after each of the changes."""

    async def run() -> list[EngineInfo]:
        hand = served(server)
        found = [await hand.probe(deadline=soon())]
        for change in changes:
            change()
            found.append(await hand.probe(deadline=soon()))
        await hand.close()
        return found

    return asyncio.run(run())


def test_a_known_plugin_is_asked_for_what_changes_and_no_more() -> None:
    server = PluginServer()

    def go_on() -> None:
        server.weights, server.paused = "16>17", True
        server.state |= {"asleep": ["weights"], "replay": {"phase": "replay", "compares": True}}

    first, second = probes(server, go_on)
    assert server.looked == 1
    assert (first.version, first.torn, first.paused, first.asleep, first.replay) == (None, False, False, False, None)
    assert (second.version, second.torn, second.paused, second.asleep) == (16, True, True, True)
    assert second.replay is not None
    assert second.replay.compares
    assert second.incarnation == first.incarnation == "first"
    assert (second.software, second.profile, second.tp_size) == (first.software, first.profile, first.tp_size)


@pytest.mark.parametrize("kind", ["the same", "an older plugin", "stock", "older than /ready"])
def test_a_restart_is_found_where_the_plugin_is_asked(kind: str) -> None:
    server = PluginServer(paused=True)

    def restart() -> None:
        server.state = {"protocol": 4, "incarnation": "second"}
        if kind == "an older plugin":
            del server.state["incarnation"]
        if kind == "stock":
            server.replaced["/server_info"] = (200, {**server.facts, "internal_states": [{}]})
        if kind == "older than /ready":
            server.replaced["/openapi.json"] = (200, Server()._openapi())
            server.replaced["/ready"] = (404, {"detail": "Not Found"})
        server.silent = kind in ("an older plugin", "stock")

    first, second = probes(server, restart)
    assert second.incarnation not in ("", first.incarnation)
    assert server.looked == 2


def test_a_plugin_that_cannot_be_asked_is_met_anew_each_time() -> None:
    server = PluginServer(incarnation="")
    first, second = probes(server, lambda: None)
    assert server.looked == 2
    assert second.incarnation == first.incarnation != ""


def test_weights_that_sglang_does_not_update_are_refused_in_its_words() -> None:
    async def call(*_: Any, **__: Any) -> str:
        return msgspec.json.encode(orders.Accepted(refused="captured graphs retain a copy")).decode()

    server: Any = SimpleNamespace(engine="sgl", call=call)
    profile: Any = SimpleNamespace(sessions=True)
    path = PluginPath(server, profile, "all", 1)
    with pytest.raises(EngineRefused, match=r"SGLang cannot take weights: captured graphs retain a copy"):
        asyncio.run(path.accept(MANIFEST, deadline=soon()))


def test_endpoints_are_asked_for_where_openapi_is_off() -> None:
    async def run() -> str:
        hand = served(Server(openapi=False))
        info = await hand.probe(deadline=soon())
        await hand.close()
        return info.profile

    assert asyncio.run(run()).startswith("sglang-session (0.5.23")


@pytest.mark.parametrize("answer", ["hello", [], {"version": 5}])
def test_no_sglang_server(answer: Any) -> None:
    server = Server()
    server.replaced["/server_info"] = (200, answer)
    with pytest.raises(EngineError, match="not that of an SGLang server"):
        pushed(server)


def test_the_plugin_is_asked_for_and_does_not_answer() -> None:
    with pytest.raises(EngineError, match="no plugin answers"):
        pushed(Server(), path="plugin")
    old: dict[str, Any] = {"internal_states": [{"weightsync": {"protocol": 7}}]}
    with pytest.raises(EngineError, match="a plugin of protocol 7 answers"):
        pushed(Server(**old), path="plugin")


def test_a_deadline_that_passes() -> None:
    class Silent(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await asyncio.Event().wait()
            raise AssertionError

    async def run() -> None:
        hand = SGLangAdapter(spec(), client=Through(Silent()))
        with pytest.raises(EngineLost):
            await hand.probe(deadline=soon(0.01))
        await hand.close()

    asyncio.run(run())
