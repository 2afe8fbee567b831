"""LoRA adapters through the daemon's part, to servers that answer as vLLM and SGLang do."""

from __future__ import annotations

import asyncio
import errno
import json
import stat
import time
from functools import wraps
from pathlib import Path

import httpx
import pytest

from tests.recorded import Through
from weightsync import push_lora
from weightsync.adapters.vllm.control import VLLMAdapter
from weightsync.config import EngineConfig, NodeConfig, NodeSection, TimeoutConfig
from weightsync.errors import PushAborted, PushRefused, PushTimeout, SourceError
from weightsync.wire import messages as msg
from weightsync.wire.codec import decode_untrusted, encode
from weightsyncd.engines import Engines
from weightsyncd.loras import Loras, older_versions


def on_loop(test):
    @wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 20))

    return run


def check_files(path):
    assert json.loads((path / "adapter_config.json").read_text())["r"] == 4
    assert (path / "adapter_model.safetensors").read_bytes() == b"weights"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


class Server:
    """A server with the routes for LoRA adapters."""

    def __init__(self, *names, takes=True):
        self.loaded = dict.fromkeys(names, "from before")
        self.takes = takes
        self.posts: list[tuple[str, str]] = []
        self.fails = ""
        self.gone = False
        self.idle = asyncio.Event()
        self.idle.set()

    async def __call__(self, request):
        path = request.url.path
        if self.gone:
            raise ConnectionRefusedError("refused")
        if path == "/v1/models":
            cards = [{"id": "base", "parent": None}, *({"id": name, "parent": "base"} for name in self.loaded)]
            return httpx.Response(200, json={"data": cards})
        if not self.takes:
            return httpx.Response(404, json={"detail": "Not Found"})
        if request.method == "GET":
            return httpx.Response(405)
        body = json.loads(request.content)
        self.posts.append((path, body["lora_name"]))
        if path == "/v1/load_lora_adapter":
            if self.fails:
                return httpx.Response(400, json={"error": {"message": self.fails}})
            check_files(Path(body["lora_path"]))
            self.loaded[body["lora_name"]] = body["lora_path"]
        else:
            await self.idle.wait()
            del self.loaded[body["lora_name"]]
        return httpx.Response(200)


class FarNode:
    """Another node, by way of the wire."""

    name = "n1"

    def __init__(self, loras, *statuses):
        self.engines = statuses
        self._loras = loras

    async def ask(self, message, deadline):
        return decode_untrusted(encode(await self._loras.push(decode_untrusted(encode(message)))))


class Node:
    def __init__(self, servers, name="n0", peers=None):
        configs = tuple(EngineConfig(name=one, kind="vllm", url="http://127.0.0.1:1") for one in servers)
        self.engines = Engines(configs, TimeoutConfig(), busy=lambda: False)
        for one, server in servers.items():
            self.engines[one].adapter = VLLMAdapter(
                self.engines[one].config, client=Through(httpx.MockTransport(server))
            )
        self.busy = False
        self.tasks: list[asyncio.Task[None]] = []
        self.loras = Loras(
            NodeConfig(node=NodeSection(name=name)),
            self.engines,
            peers or {},
            lambda: self.busy,
            lambda work: self.tasks.append(asyncio.create_task(work)),
        )

    async def push(self, version, **changes):
        terms = {"model": "default", "name": "policy", "keep": 0, "timeout": 5.0, "forward": True, **changes}
        message = msg.PushLora(version=version, config=b'{"r": 4}', weights=b"weights", **terms)
        pushed = await self.loras.push(message)
        return {outcome.engine: outcome for outcome in pushed.engines}

    async def settled(self):
        await asyncio.gather(*self.tasks)


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "weightsync" / "n0.loras" / "default"


@on_loop
async def test_each_engine_is_told_once_and_the_old_version_goes_after_the_new_one_is_there(runtime):
    servers = {"e0": Server(), "e1": Server("policy@3", "other@1")}
    node = Node(servers)
    outcomes = await node.push(7)
    await node.settled()
    assert [outcome.outcome for outcome in outcomes.values()] == ["loaded", "loaded"]
    assert servers["e0"].posts == [("/v1/load_lora_adapter", "policy@7")]
    assert servers["e1"].posts == [("/v1/load_lora_adapter", "policy@7"), ("/v1/unload_lora_adapter", "policy@3")]
    assert sorted(servers["e1"].loaded) == ["other@1", "policy@7"]
    assert servers["e0"].loaded["policy@7"] == str(runtime / "policy@7")


@on_loop
async def test_versions_follow_one_another_and_directories_do_not_pile_up(runtime):
    server = Server()
    node = Node({"e0": server})
    for version in (1, 2, 5, 10):
        await node.push(version)
        await node.settled()
        assert list(server.loaded) == [f"policy@{version}"]
    assert sorted(path.name for path in runtime.iterdir()) == ["policy@10", "policy@5"]


@on_loop
async def test_what_an_earlier_run_has_left_does_not_push_out_what_engines_have(runtime):
    node = Node({"e0": Server()})
    await node.push(500)
    again = Node({"e0": Server()})
    (runtime / ".new-half").mkdir()
    for version in (1, 2):
        await again.push(version)
        await again.settled()
    assert sorted(path.name for path in runtime.iterdir()) == ["policy@1", "policy@2"]


@on_loop
async def test_a_disk_that_is_full_is_said_and_nothing_of_it_is_left(runtime, monkeypatch):
    node = Node({"e0": Server()})
    await node.push(1)

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(PushAborted, match=r"node n0 cannot write the adapter to .*: No space left on device"):
        await node.push(2)
    assert [path.name for path in runtime.iterdir()] == ["policy@1"]


@on_loop
async def test_versions_before_are_kept_if_asked_for():
    server = Server()
    node = Node({"e0": server})
    for version in (9, 10, 11):
        await node.push(version, keep=1)
        await node.settled()
    assert list(server.loaded) == ["policy@10", "policy@11"]


def test_which_versions_are_older():
    held = ["policy@9", "policy@10", "policy@2", "policy-b@1", "policy@x", "policy"]
    assert older_versions("policy", 11, 0, held) == ["policy@2", "policy@9", "policy@10"]
    assert older_versions("policy", 11, 2, held) == ["policy@2"]
    assert older_versions("policy", 11, 3, held) == []
    assert older_versions("policy", 11, 4, held) == []
    assert older_versions("policy", 10, 0, held) == ["policy@2", "policy@9"]


@on_loop
async def test_who_waits_for_the_push_does_not_wait_for_requests_on_the_old_version():
    server = Server("policy@1")
    server.idle.clear()
    node = Node({"e0": server})
    assert (await node.push(2))["e0"].outcome == "loaded"
    assert sorted(server.loaded) == ["policy@1", "policy@2"]
    server.idle.set()
    await node.settled()
    assert list(server.loaded) == ["policy@2"]


@on_loop
async def test_an_engine_that_fails_goes_on_with_what_it_had():
    servers = {"bad": Server("policy@1"), "good": Server("policy@1"), "gone": Server()}
    servers["bad"].fails = "LoRA rank 64 is greater than max_lora_rank 16."
    servers["gone"].gone = True
    node = Node(servers)
    outcomes = await node.push(2)
    await node.settled()
    assert {name: outcome.outcome for name, outcome in outcomes.items()} == {
        "bad": "failed",
        "good": "loaded",
        "gone": "lost",
    }
    assert "LoRA rank 64 is greater than max_lora_rank 16." in outcomes["bad"].error.message
    assert list(servers["bad"].loaded) == ["policy@1"]
    assert list(servers["good"].loaded) == ["policy@2"]


@on_loop
async def test_what_is_refused_touches_no_engine():
    servers = {"e0": Server(), "e1": Server("policy@5")}
    node = Node(servers)
    with pytest.raises(PushRefused, match="engine e1 has policy@5 loaded already"):
        await node.push(5)
    with pytest.raises(PushRefused, match="no engine serves model 'draft'"):
        await node.push(6, model="draft")
    servers["e1"].takes = False
    with pytest.raises(PushRefused, match="engine e1 takes no LoRA adapters") as caught:
        await node.push(6)
    assert "--enable-lora" in str(caught.value.hint)
    assert not servers["e0"].posts
    assert not servers["e1"].posts


@on_loop
async def test_a_push_of_weights_is_waited_for_and_no_longer_than_asked():
    server = Server()
    node = Node({"e0": server})
    node.busy = True
    with pytest.raises(PushTimeout, match="a push of weights is still under way on node n0"):
        await node.push(6, timeout=0.05)
    waits = asyncio.create_task(node.push(6))
    behind = asyncio.create_task(node.push(7))
    await asyncio.sleep(0)
    node.loras.go_on()  # as when the next push of weights began at once
    await asyncio.sleep(0)
    assert not server.posts
    node.busy = False
    node.loras.go_on()
    assert [(await one)["e0"].outcome for one in (waits, behind)] == ["loaded", "loaded"]


@on_loop
async def test_engines_of_other_nodes_are_told_by_their_own_daemon(tmp_path):
    near, far = Server(), Server("policy@1")
    there = Node({"e1": far}, name="n1")
    status = there.engines["e1"].status("n1")
    here = Node({"e0": near}, peers={"n1": FarNode(there.loras, status)})
    outcomes = await here.push(2)
    await there.settled()
    assert {(o.engine, o.node, o.outcome) for o in outcomes.values()} == {
        ("e0", "n0", "loaded"),
        ("e1", "n1", "loaded"),
    }
    assert list(far.loaded) == ["policy@2"]
    assert far.loaded["policy@2"] == str(tmp_path / "weightsync" / "n1.loras" / "default" / "policy@2")
    far.loaded["policy@9"] = "by another trainer"
    outcomes = await here.push(3)
    assert (outcomes["e0"].outcome, outcomes["e1"].outcome) == ("loaded", "failed")
    assert "engine e1 has policy@9 loaded already" in outcomes["e1"].error.message


@on_loop
async def test_two_at_a_time_take_turns():
    server = Server()
    node = Node({"e0": server})
    done = await asyncio.gather(node.push(1), node.push(2))
    assert [outcomes["e0"].outcome for outcomes in done] == ["loaded", "loaded"]
    await node.settled()
    assert list(server.loaded) == ["policy@2"]


# --- the trainer's side ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"version": -1}, "version = -1"),
        ({"version": True}, "version = True"),
        ({"version": 1, "keep": -1}, "keep = -1"),
        ({"version": 1, "name": "a/b"}, "name = 'a/b'"),
        ({"version": 1, "name": 7}, "name = 7"),
        ({"version": 1, "timeout": 0}, "timeout = 0"),
        ({"version": 1}, "without its config"),
    ],
)
def test_arguments_are_checked_before_anything_is_sent(options, words):
    with pytest.raises(SourceError, match=words):
        push_lora({}, daemon="ipc:///nowhere.sock", **options)


def test_ranks_beyond_the_first_send_nothing(monkeypatch):
    from weightsync.trainer import place

    monkeypatch.setattr(place, "trainer_place", lambda _: place.TrainerPlace("t", 1, 2))
    started = time.monotonic()
    assert push_lora(object(), version=1, daemon="ipc:///nowhere.sock") is None
    assert time.monotonic() - started < 5
