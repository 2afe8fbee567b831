"""The vLLM adapter against what a real server answered, and against one that answers as told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from functools import wraps

import httpx
import pytest

from tests.hand_push import manifest_of
from tests.recorded import FIXTURES, Replay, Through
from weightsync.adapters.vllm.control import VLLMAdapter
from weightsync.adapters.vllm.path_group import GroupPath
from weightsync.adapters.vllm.path_ipc import IpcPath
from weightsync.adapters.vllm.path_plugin import ExtensionPath, PluginPath
from weightsync.adapters.vllm.profiles import MARK
from weightsync.adapters.vllm.server import ticket_seconds
from weightsync.config import EngineConfig
from weightsync.errors import PLUGIN_HINT, EngineError, EngineLost, EngineRefused, LocalProtocolError

OFFER = [[b"offer" * 20]]
TICKET = [b"ticket" * 20]
MODEL = {f"model.layers.{i}.mlp.down_proj.weight": ("bfloat16", (64, 8), bytes(1024)) for i in range(3)}
GETS = ("/is_paused", "/get_world_size", "/weight_info", "/server_info", "/is_sleeping", "/version", "/metrics")
ROUTES = (
    *("/pause", "/resume", "/is_paused", "/get_world_size", "/reset_prefix_cache", "/reset_encoder_cache"),
    *("/collective_rpc", "/update_weights", "/init_weight_transfer_engine", "/start_weight_update"),
    *("/finish_weight_update", "/start_draft_weight_update", "/weight_info", "/update_weight_version", "/wake_up"),
)


def on_loop(test):
    @wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


def soon():
    return time.monotonic() + 29.5


def adapter(transport, path="auto", target="all"):
    spec = EngineConfig(name="e", kind="vllm", url="http://127.0.0.1:8000", path=path, target=target)
    return VLLMAdapter(spec, client=Through(transport))


def replayed(release, name, path):
    replay = Replay(FIXTURES / f"vllm-{release}-{name}.json")
    return replay, adapter(replay, path)


def manifest(names=tuple(MODEL), slot_bytes=1024):
    """As many buckets as were recorded."""
    return manifest_of({name: MODEL[name] for name in names}, slot_bytes=slot_bytes)


async def push(hand, version, mode="keep"):
    plan = manifest()
    await hand.probe(deadline=soon())
    await hand.accept(plan, deadline=soon())
    await hand.pause(mode, deadline=soon())
    await hand.begin(version, plan, OFFER, deadline=soon())
    for bucket in range(plan.buckets):
        await hand.load(bucket, TICKET, deadline=soon())
    await hand.finish(version, deadline=soon())
    await hand.resume(deadline=soon())
    return await hand.probe(deadline=soon())


RELEASES = ["0.27.1", "0.32.0"]


@pytest.mark.parametrize("path", ["plugin", "extension"])
@pytest.mark.parametrize("release", RELEASES)
@on_loop
async def test_a_recorded_push(release, path):
    replay, hand = replayed(release, f"{path}-push", path)
    info = await push(hand, 41)
    assert replay.rest() == []
    assert info.version == 41
    assert not info.torn
    assert not info.paused
    assert info.software == f"vllm {release}"
    assert info.incarnation
    assert f"path {path}" in info.profile
    await hand.close()


@pytest.mark.parametrize("path", ["plugin", "extension"])
@pytest.mark.parametrize("release", RELEASES)
@on_loop
async def test_a_recorded_failure_and_its_repair(release, path):
    replay, hand = replayed(release, f"{path}-repair", path)
    plan = manifest()
    await hand.probe(deadline=soon())
    await hand.pause("keep", deadline=soon())
    await hand.begin(42, plan, OFFER, deadline=soon())
    await hand.begin(43, plan, OFFER, deadline=soon())  # nobody ended the first
    await hand.load(0, TICKET, deadline=soon())
    with pytest.raises(EngineError, match="its checksum differs"):
        await hand.load(1, TICKET, deadline=soon())
    info = await hand.probe(deadline=soon())
    assert info.torn
    assert info.version == 41
    assert info.paused
    with pytest.raises(EngineRefused, match=r"torn or asleep.*and 13 more"):
        await hand.accept(manifest([next(iter(MODEL))]), deadline=soon())
    assert (await push(hand, 44, mode="abort")).version == 44
    with pytest.raises(EngineRefused, match=r"no parameter for 'model\.layers\.0\.self_attn\.z_proj\.weight'"):
        await hand.accept(plan, deadline=soon())
    assert len(await hand.accept(plan, deadline=soon())) == 18
    assert replay.rest() == []
    await hand.close()


@pytest.mark.parametrize("release", RELEASES)
@on_loop
async def test_a_recorded_examination(release):
    replay, hand = replayed(release, "doctor", "auto")
    findings = await hand.examine(deadline=soon())
    assert [finding.level for finding in findings] == ["ok", "ok", "ok"]
    assert replay.rest() == []
    await hand.close()


@on_loop
async def test_a_recorded_stock_server():
    replay = Replay(FIXTURES / "vllm-0.32.0-stock-ipc.json")
    spec = EngineConfig(name="e", kind="vllm", url="http://127.0.0.1:8000", gpus=("GPU-aa",))
    hand = VLLMAdapter(spec, client=Through(replay))
    findings = await hand.examine(deadline=soon())
    assert [finding.level for finding in findings] == ["ok", "ok", "warn", "warn"]
    info = await hand.probe(deadline=soon())
    assert info.transport == "torch-cuda"
    assert "path ipc: no plugin answered" in info.profile
    assert await hand.accept(manifest(), deadline=soon()) is None, "a stock server cannot tell"
    assert replay.rest() == []
    await hand.close()


class Server:
    """A vLLM server as told: its state, and every POST it got."""

    def __init__(self, *, version="0.32.0", backend="weightsync", plugin=True, routes=ROUTES, world=1, each=1):
        self.version, self.backend, self.plugin, self.routes = version, backend, plugin, set(routes)
        self.world, self.each = world, each
        self.weight_version = "default"
        self.released = False  # its cache alone
        self.paused = self.sleeping = self.metrics_off = self.info_off = self.docs_off = False
        self.started = 1.5
        self.workers_version = "5"
        self.config: dict[str, object] = {}  # more of /server_info's
        self.connector: bool | None = None  # what its workers say
        self.protocol = 4
        self.posted: list[tuple[str, dict[str, str]]] = []
        self.asked: list[str] = []  # of its workers
        self.answers: dict[str, tuple[int, object]] = {}
        self.open = False

    def transport(self):
        return httpx.MockTransport(self.handle)

    def handle(self, request):
        path, query = request.url.path, dict(request.url.params)
        body = json.loads(request.content or b"{}")
        if request.method == "POST":
            self.posted.append((path, query))
        if path in self.answers:
            answer = self.answers[path]
            return answer if isinstance(answer, httpx.Response) else httpx.Response(answer[0], json=answer[1])
        match path:
            case "/version":
                return httpx.Response(200, json={"version": self.version})
            case "/openapi.json" if not self.docs_off:
                return httpx.Response(200, json={"paths": {route: {} for route in self.routes}})
            case "/metrics" if not self.metrics_off:
                text = f"process_start_time_seconds {self.started}\n"
                return httpx.Response(200, text=text + self.sleep_state())
        if path in ("/server_info", "/is_sleeping"):
            pass
        elif path in self.routes and (request.method == "GET") != (path in GETS):
            return httpx.Response(405, json={"detail": "Method Not Allowed"})
        elif path not in self.routes:
            return httpx.Response(404, json={"detail": "Not Found"})
        match path:
            case "/server_info":
                if self.info_off:
                    return error("'NoneType' object has no attribute 'splitlines'")
                transfer = {"backend": self.backend} if self.backend else None
                config = {"weight_transfer_config": transfer, **self.config}
                return httpx.Response(200, json={"vllm_config": config, "vllm_env": {}})
            case "/is_sleeping":
                return httpx.Response(200, json={"is_sleeping": self.sleeping or self.paused})
            case "/is_paused":
                return httpx.Response(200, json={"is_paused": self.paused})
            case "/get_world_size":
                return httpx.Response(200, json={"world_size": self.each if query else self.world})
            case "/weight_info":
                return httpx.Response(200, json={"weight_version": self.weight_version})
            case "/update_weight_version":
                self.weight_version = body["new_version"]
            case "/collective_rpc":
                return self.worker(body)
            case "/init_weight_transfer_engine" if self.backend != "weightsync" and "weightsync" in body["init_info"]:
                return error(
                    "Invalid init_info for IPCWeightTransferEngine: unexpected keyword argument 'weightsync'"
                    if self.backend
                    else "Weight transfer not configured. Please set weight_transfer_config to enable weight transfer."
                )
            case "/start_weight_update" if self.backend == "ipc":
                if self.open:
                    return error("start_weight_update called while a weight update is already active.")
                self.open = True
            case "/finish_weight_update" if self.backend == "ipc":
                if not self.open:
                    return error("finish_weight_update called without a matching start_weight_update.")
                self.open = False
            case "/reset_prefix_cache":
                return httpx.Response(200, json={"success": True})
        return httpx.Response(200, json={"status": "done"})

    def worker(self, body):
        self.asked.append(body["method"])
        if body["method"] == "__dir__":
            return httpx.Response(200, json={"results": [["a", *[MARK] * self.plugin]] * self.world})
        if not self.plugin:
            return error("'CPUWorker' object has no attribute 'weightsync'")
        asked = json.loads(body["args"][0])
        answers = {
            "hello": {
                "protocol": self.protocol,
                "rank": 0,
                "platform": "cpu",
                "replicas": 1,
                "world_size": 1,
                "incarnation": "token",
                "weight_version": self.workers_version,
                "backend": self.backend,
                **({} if self.connector is None else {"connector": self.connector}),
            },
            "check": {"unknown": [], "unknowns": 0, "partial": [], "partials": 0, "untouched": []},
        }
        return httpx.Response(200, json={"results": [answers.get(asked["do"], {})]})

    def sleep_state(self):
        states = {"awake": not (self.sleeping or self.released), "weights_offloaded": self.sleeping}
        return "".join(
            f'vllm:engine_sleep_state{{engine="0",sleep_state="{state}"}} {float(on)}\n' for state, on in states.items()
        )

    def paths(self):
        return [path for path, _ in self.posted]


def error(message):
    return httpx.Response(500, json={"error": {"message": message, "type": "InternalServerError", "code": 500}})


async def way(server, path="auto", target="all"):
    hand = adapter(server.transport(), path, target)
    info = await hand.probe(deadline=soon())
    return hand, info


@pytest.mark.parametrize(
    ("options", "path", "kind", "transport"),
    [
        ({}, "auto", PluginPath, "mapped"),
        ({"backend": "nccl"}, "auto", ExtensionPath, "mapped"),
        ({"backend": None}, "auto", ExtensionPath, "mapped"),
        ({"backend": "ipc", "plugin": False}, "auto", IpcPath, "torch-cuda"),
        ({"backend": "nccl", "plugin": False}, "auto", GroupPath, "group-vllm"),
        ({"backend": "nccl"}, "group", GroupPath, "group-vllm"),
        ({"version": "0.19.1"}, "plugin", ExtensionPath, "mapped"),  # takes no backends of others
    ],
)
@on_loop
async def test_ways_in(options, path, kind, transport):
    hand, info = await way(Server(**options), path)
    assert type(hand._path) is kind
    assert info.transport == transport


@on_loop
async def test_a_backend_is_found_where_server_info_fails():
    server = Server(backend="ipc", plugin=False)
    server.info_off = True
    hand, _ = await way(server)
    assert isinstance(hand._path, IpcPath)


@pytest.mark.parametrize(
    ("backend", "path"), [(None, "auto"), ("sparse_nccl", "auto"), ("ipc", "plugin"), (None, "plugin")]
)
@on_loop
async def test_no_way_in_is_told_with_the_flag(backend, path):
    with pytest.raises(EngineError) as caught:
        await way(Server(backend=backend, plugin=False), path)
    assert '--weight-transfer-config \'{"backend": "weightsync"}\'' in (caught.value.hint or "")


@on_loop
async def test_a_plugin_of_another_weightsync():
    server = Server()
    server.protocol = 5
    with pytest.raises(EngineError, match="speaks protocol 5, this daemon 4"):
        await way(server)


@on_loop
async def test_routes_are_asked_for_one_by_one_without_openapi():
    server = Server()
    server.docs_off = True
    _, info = await way(server)
    assert "vllm-0.29" in info.profile


@on_loop
async def test_production_mode():
    with pytest.raises(EngineError, match="answers 404") as caught:
        await way(Server(routes=[]))
    assert "VLLM_SERVER_DEV_MODE=1" in (caught.value.hint or "")


@on_loop
async def test_a_torn_server_is_known_by_its_version():
    server = Server()
    server.weight_version = "16>17"
    _, info = await way(server)
    assert info.torn
    assert info.version == 16


@on_loop
async def test_the_version_is_torn_before_anything_and_served_after_everything():
    server = Server()
    hand, _ = await way(server)
    server.posted.clear()
    plan = manifest()
    await hand.begin(5, plan, OFFER, deadline=soon())
    assert server.weight_version == ">5"
    assert server.paths()[:2] == ["/update_weight_version", "/start_weight_update"]
    server.posted.clear()
    await hand.finish(5, deadline=soon())
    assert server.weight_version == ">5", "nobody has looked yet whether it was loaded right"
    assert server.paths() == ["/finish_weight_update", "/reset_prefix_cache", "/reset_encoder_cache"]
    server.posted.clear()
    await hand.resume(deadline=soon())
    assert server.weight_version == "5"
    assert server.paths()[0] == "/update_weight_version"
    assert server.paths()[-1] == "/resume"


@on_loop
async def test_the_mark_of_an_update_says_what_was_there_before():
    server = Server()
    server.weight_version = "16"
    hand, _ = await way(server)
    await hand.begin(17, manifest(), OFFER, deadline=soon())
    assert server.weight_version == "16>17"
    await hand.begin(18, manifest(), OFFER, deadline=soon())
    assert server.weight_version == "16>18"
    await hand.finish(18, deadline=soon())
    await hand.resume(deadline=soon())
    await hand.begin(19, manifest(), OFFER, deadline=soon())
    assert server.weight_version == "18>19"


@on_loop
async def test_an_engine_whose_workers_were_not_told_is_not_resumed():
    server = Server()
    hand, _ = await way(server)
    await hand.begin(5, manifest(), OFFER, deadline=soon())
    await hand.finish(5, deadline=soon())
    server.answers["/collective_rpc"] = (500, {"error": "a worker has died"})
    with pytest.raises(EngineError, match="a worker has died"):
        await hand.resume(deadline=soon())
    assert "/resume" not in server.paths()


async def loaded(server, hand, version):
    """Everything but `resume`. Workers keep the version by themselves."""
    plan = manifest()
    await hand.pause("keep", deadline=soon())
    await hand.begin(version, plan, OFFER, deadline=soon())
    server.workers_version = f">{version}"
    await hand.finish(version, deadline=soon())


@pytest.mark.parametrize("keeper", ["server", "workers", "nobody"])
@on_loop
async def test_a_server_that_restarted_after_it_was_loaded_is_not_labelled(keeper):
    """It holds its own checkpoint, and nobody has asked it anything since."""
    options = {"backend": "ipc", "plugin": False} if keeper == "nobody" else {}
    server = Server(**options)
    if keeper != "server":
        server.version = "0.26.0"
        server.routes -= {"/weight_info", "/update_weight_version"}
    spec = EngineConfig(name="e", kind="vllm", url="http://127.0.0.1:8000", gpus=("GPU-aa",))
    hand = VLLMAdapter(spec, client=Through(server.transport()))
    await hand.probe(deadline=soon())
    await loaded(server, hand, 6)
    await hand.resume(deadline=soon())  # one that was there all the time serves
    assert (await hand.probe(deadline=soon())).version == (None if keeper == "workers" else 6)
    await loaded(server, hand, 7)
    server.started, server.weight_version, server.workers_version = 2.5, "default", "default"
    server.posted.clear()
    with pytest.raises(EngineLost, match="was restarted during the push"):
        await hand.resume(deadline=soon())
    assert not {"/update_weight_version", "/resume"} & set(server.paths())
    info = await hand.probe(deadline=soon())
    assert info.version is None


@on_loop
async def test_a_version_whose_comparison_failed_is_not_served_by_a_later_resume():
    server = Server()
    hand, _ = await way(server)
    await loaded(server, hand, 5)  # … and compared, and found wrong
    await hand.probe(deadline=soon())
    await hand.pause("keep", deadline=soon())  # the next push, which ends before it begins
    await hand.resume(deadline=soon())
    assert server.weight_version == ">5"


@pytest.mark.parametrize(
    ("mode", "paused_as", "running"),
    [("keep", "keep", "true"), ("wait", "wait", "true"), ("abort", "abort", "true"), ("none", "keep", "false")],
)
@on_loop
async def test_pause_modes(mode, paused_as, running):
    server = Server()
    hand, _ = await way(server)
    await hand.pause(mode, deadline=soon())
    assert server.posted[-1] == ("/pause", {"mode": paused_as, "clear_cache": "false"})
    await hand.finish(5, deadline=soon())
    resets = [query for path, query in server.posted if path == "/reset_prefix_cache"]
    assert resets == [{"reset_running_requests": running}]


@pytest.mark.parametrize(
    ("path", "connector", "config", "external"),
    [
        ("plugin", True, {}, "true"),
        ("plugin", False, {}, None),
        ("plugin", None, {}, None),  # as an older plugin says
        ("ipc", None, {"kv_transfer_config": {"kv_connector": "LMCacheConnectorV1"}}, "true"),
        ("ipc", None, {"kv_transfer_config": None, "cache_config": {"kv_offloading_size": 4.0}}, "true"),
        ("ipc", None, {"kv_transfer_config": None, "cache_config": {"kv_offloading_size": None}}, None),
        ("ipc", None, {}, None),
    ],
)
@on_loop
async def test_what_a_kv_connector_keeps_is_forgotten_too(path, connector, config, external):
    server = Server() if path == "plugin" else Server(backend="ipc", plugin=False)
    server.connector, server.config = connector, config
    hand, _ = await way(server, path)
    await hand.begin(5, manifest(), OFFER, deadline=soon())
    await hand.finish(5, deadline=soon())
    resets = [query.get("reset_external") for path, query in server.posted if path == "/reset_prefix_cache"]
    assert resets == [external]


@on_loop
async def test_a_cache_that_was_not_reset_leaves_the_server_torn():
    server = Server()
    hand, _ = await way(server)
    await hand.begin(5, manifest(), OFFER, deadline=soon())
    server.answers["/reset_prefix_cache"] = (200, {"success": False})
    with pytest.raises(EngineError, match=r"prefix cache of engine .* could not be reset"):
        await hand.finish(5, deadline=soon())
    assert (await hand.probe(deadline=soon())).torn
    await hand.pause("none", deadline=soon())
    await hand.finish(5, deadline=soon())  # its KV was to be kept
    await hand.resume(deadline=soon())
    assert not (await hand.probe(deadline=soon())).torn


@on_loop
async def test_a_sleeping_server_is_woken_by_parts():
    server = Server()
    server.sleeping = True
    hand, info = await way(server)
    assert info.asleep
    await hand.begin(5, manifest(), OFFER, deadline=soon())
    await hand.resume(deadline=soon())
    woken = [query for path, query in server.posted if path == "/wake_up"]
    assert woken == [{"tags": "weights"}, {"tags": "kv_cache"}]
    assert server.paths()[-1] == "/resume"


@on_loop
async def test_a_sleeping_server_that_was_not_loaded_sleeps_on():
    """Its weights are gone: resumed, it would serve whatever lies there."""
    server = Server()
    server.sleeping = True
    hand, _ = await way(server)
    await hand.pause("keep", deadline=soon())
    await hand.resume(deadline=soon())
    assert not {"/wake_up", "/resume"} & set(server.paths())


@on_loop
async def test_a_cache_that_was_released_alone_is_woken_before_it_resumes():
    """As by `/release_kv_cache_memory`: a step would write into memory that is not there."""
    server = Server()
    server.released = server.paused = True
    hand, info = await way(server)
    assert not info.asleep, "a part of its weights may be pushed"
    await hand.begin(5, manifest(), OFFER, deadline=soon())
    await hand.resume(deadline=soon())
    woken = [(path, query) for path, query in server.posted if path in ("/wake_up", "/resume", "/pause")]
    assert woken == [("/wake_up", {"tags": "kv_cache"}), ("/resume", {})]


@on_loop
async def test_a_server_that_is_awake_is_asked_for_no_waking():
    server = Server()
    hand, _ = await way(server)
    await hand.begin(5, manifest(), OFFER, deadline=soon())
    await hand.resume(deadline=soon())
    assert "/wake_up" not in server.paths()
    assert server.paths()[-1] == "/resume"


@on_loop
async def test_a_paused_server_is_not_asleep():
    server = Server()
    server.paused = True
    _, info = await way(server)
    assert info.paused
    assert not info.asleep


@on_loop
async def test_a_draft_model():
    server = Server()
    hand, _ = await way(server, target="draft")
    await hand.begin(5, manifest(), OFFER, deadline=soon())
    assert "/start_draft_weight_update" in server.paths()
    assert "/start_weight_update" not in server.paths()


@on_loop
async def test_replicas_are_refused():
    hand, info = await way(Server(world=4, each=2))
    assert info.tp_size == 4
    with pytest.raises(EngineRefused, match="data parallelism"):
        await hand.accept(manifest(), deadline=soon())


@on_loop
async def test_a_restart_is_another_incarnation():
    server = Server()
    hand, before = await way(server)
    server.started, server.version = 2.5, "0.29.0"
    after = await hand.probe(deadline=soon())
    assert before.incarnation != after.incarnation
    assert after.software == "vllm 0.29.0"


@on_loop
async def test_a_restart_as_one_that_lacks_what_it_is_asked_for():
    server = Server()
    hand, before = await way(server)
    server.started, server.version = 2.5, "0.24.0"
    server.routes -= {"/weight_info", "/update_weight_version"}
    after = await hand.probe(deadline=soon())
    assert before.incarnation != after.incarnation
    assert after.version == 5


@on_loop
async def test_a_restart_without_our_plugin_is_asked_nothing_that_its_workers_refuse():
    """Of several workers such a call leaves the server out of step, and here they keep the version, too."""
    routes = [route for route in ROUTES if route not in ("/weight_info", "/update_weight_version")]
    server = Server(version="0.24.0", routes=routes, world=2, each=2)
    hand, _ = await way(server)
    server.started, server.plugin = 2.5, False
    server.backend, server.asked = "ipc", []
    with contextlib.suppress(EngineError):  # by which way it is spoken to then is another matter
        await hand.probe(deadline=soon())
    assert "weightsync" not in server.asked


@on_loop
async def test_what_a_known_server_fails_to_answer_is_told():
    server = Server()
    hand, _ = await way(server)
    server.answers["/is_paused"] = (500, {"error": "out of order"})
    with pytest.raises(EngineError, match="out of order"):
        await hand.probe(deadline=soon())


@on_loop
async def test_without_metrics_the_workers_tell_incarnations():
    server = Server()
    server.metrics_off = True
    _, info = await way(server)
    assert info.incarnation == "token"


@on_loop
async def test_workers_keep_the_version_where_the_server_does_not():
    routes = [route for route in ROUTES if route not in ("/weight_info", "/update_weight_version")]
    _, info = await way(Server(version="0.24.0", routes=routes))
    assert info.version == 5


@on_loop
async def test_nothing_is_done_before_a_probe():
    hand = adapter(Server().transport())
    with pytest.raises(LocalProtocolError, match="was not probed"):
        await hand.load(0, TICKET, deadline=soon())


def judged(findings):
    return [(finding.level, finding.fix) for finding in findings if finding.level != "ok"]


@on_loop
async def test_examining_a_server_without_anything():
    server = Server(backend=None, plugin=False)
    found = judged(await adapter(server.transport()).examine(deadline=soon()))
    assert [level for level, _ in found] == ["warn", "fail"]
    assert PLUGIN_HINT in found[0][1]
    assert '{"backend": "weightsync"}' in found[1][1]


@on_loop
async def test_examining_stock_ipc_that_allows_no_pickles():
    found = judged(await adapter(Server(backend="ipc", plugin=False).transport(), "ipc").examine(deadline=soon()))
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION=1" in found[-1][1]


@on_loop
async def test_examining_production_mode():
    found = judged(await adapter(Server(routes=[]).transport()).examine(deadline=soon()))
    assert len(found) == 1
    assert "VLLM_SERVER_DEV_MODE=1" in found[0][1]


@on_loop
async def test_examining_changes_nothing():
    server = Server(backend="ipc", plugin=False)
    server.info_off = True
    await adapter(server.transport()).examine(deadline=soon())
    assert set(server.paths()) <= {"/collective_rpc", "/init_weight_transfer_engine"}


@on_loop
async def test_an_address_that_others_reach():
    spec = EngineConfig(name="e", kind="vllm", url="http://10.0.0.7:8000")
    found = judged(await VLLMAdapter(spec, client=Through(Server().transport())).examine(deadline=soon()))
    assert found[0][0] == "warn"
    assert "--host 127.0.0.1" in found[0][1]


# --- several workers: a call that fails leaves vLLM out of step -------------------------------------------------------


@pytest.mark.parametrize("backend", ["ipc", "nccl", "sparse_nccl"])
@on_loop
async def test_several_stock_workers_are_asked_nothing_that_they_refuse(backend):
    server = Server(backend=backend, plugin=False, world=2, each=2)
    hand = adapter(server.transport())
    if backend in ("ipc", "nccl"):
        path = {"ipc": "ipc", "nccl": "group"}[backend]
        assert f"path {path}: no plugin answered" in (await hand.probe(deadline=soon())).profile
    else:
        with pytest.raises(EngineError, match="its weight-transfer backend is sparse_nccl"):
            await hand.probe(deadline=soon())
    assert server.paths() == ["/collective_rpc"]


@on_loop
async def test_several_stock_workers_that_cannot_be_asked_have_to_be_configured():
    server = Server(backend="ipc", plugin=False, world=2, each=2)
    server.info_off = True
    hand = adapter(server.transport())
    with pytest.raises(EngineError, match=r"cannot be asked.*vllm-project/vllm#57846") as caught:
        await hand.probe(deadline=soon())
    assert 'path = "ipc"' in (caught.value.hint or "")
    levels = [finding.level for finding in await hand.examine(deadline=soon())]
    assert levels[-1] == "warn"
    assert "/init_weight_transfer_engine" not in server.paths()


@on_loop
async def test_our_plugin_in_several_workers_answers():
    hand, info = await way(Server(world=2, each=2))
    assert type(hand._path) is PluginPath
    assert info.tp_size == 2


def stock(world):
    server = Server(backend="ipc", plugin=False, world=world, each=world)
    spec = EngineConfig(name="e", kind="vllm", url="http://127.0.0.1:8000", gpus=("GPU-aa", "GPU-bb")[:world])
    return server, VLLMAdapter(spec, client=Through(server.transport()))


@on_loop
async def test_a_stock_server_is_put_in_order_by_calls_that_succeed():
    server, hand = stock(2)
    await hand.probe(deadline=soon())
    await hand.begin(1, manifest(), OFFER * 2, deadline=soon())
    opened = [path for path in server.paths() if path.endswith("_weight_update")]
    assert opened == ["/start_weight_update"]
    server.weight_version = "1>2"  # an update that failed
    await hand.probe(deadline=soon())
    server.posted.clear()
    await hand.begin(2, manifest(), OFFER * 2, deadline=soon())
    opened = [path for path in server.paths() if path.endswith("_weight_update")]
    assert opened == [
        "/finish_weight_update",
        *["/start_weight_update", "/finish_weight_update"],
        "/start_weight_update",
    ]


@on_loop
async def test_one_stock_worker_with_an_update_of_somebody_else_is_put_in_order():
    server, hand = stock(1)
    server.open, server.weight_version = True, "1>2"
    await hand.probe(deadline=soon())
    await hand.begin(2, manifest(), OFFER, deadline=soon())
    assert server.open
    await hand.finish(2, deadline=soon())


@pytest.mark.parametrize("world", [1, 2])
@on_loop
async def test_several_stock_workers_one_of_which_failed_have_to_be_restarted(world):
    server, hand = stock(world)
    await hand.probe(deadline=soon())
    await hand.begin(1, manifest(), OFFER * world, deadline=soon())
    server.answers["/finish_weight_update"] = error("a layer is not whole")
    with pytest.raises(EngineError, match="a layer is not whole"):
        await hand.finish(1, deadline=soon())
    if world == 1:
        await hand.accept(manifest(), deadline=soon())
    else:
        with pytest.raises(EngineRefused, match=r"a layer is not whole.*takes the answers of its other workers") as e:
            await hand.accept(manifest(), deadline=soon())
        assert "restart it" in (e.value.hint or "")
        server.started = 2.5
        server.answers.clear()
        await hand.probe(deadline=soon())
        await hand.accept(manifest(), deadline=soon())


@pytest.mark.parametrize(("left", "seconds"), [(29.2, 30.0), (30.0, 30.0), (0.01, 1.0), (-3.0, 1.0)])
def test_a_worker_is_given_whole_seconds_and_never_none(left, seconds):
    assert ticket_seconds(100.0 + left, 100.0) == seconds
