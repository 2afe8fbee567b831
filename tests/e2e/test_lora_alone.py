"""LoRA adapters through two real daemons, each with a server that has the routes and nothing behind them.

What real servers make of them is in tests/engines/test_lora.py.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.own import named
from weightsync import push_lora
from weightsync.config import EngineConfig
from weightsync.errors import PushAborted, PushRefused
from weightsync.fleet import Fleet
from weightsync.operator import change_engines, fetch_status
from weightsync.testing import eventually

pytestmark = pytest.mark.e2e
CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}


class Routes(ThreadingHTTPServer):
    """A server of LoRA adapters: what it has loaded, by name, and every call that it got."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.loaded: dict[str, dict[str, torch.Tensor]] = {}
        self.calls: list[tuple[str, str]] = []
        self.refuses = False
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: Routes

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            cards = [{"id": name, "parent": "base"} for name in self.server.loaded]
            self._answer(200, {"data": [{"id": "base", "parent": None}, *cards]})
        else:
            self._answer(405 if "lora_adapter" in self.path else 404, {"detail": "no"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body["lora_name"]
        self.server.calls.append((self.path.rpartition("/")[2], name))
        if self.path == "/v1/load_lora_adapter" and not self.server.refuses:
            self.server.loaded[name] = load_file(Path(body["lora_path"]) / "adapter_model.safetensors")
        elif self.path == "/v1/unload_lora_adapter":
            del self.server.loaded[name]
        else:
            self._answer(400, {"error": {"message": "out of memory"}})
            return
        self._answer(200, {})

    def _answer(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def servers():
    found = [Routes(), Routes()]
    yield found
    for server in found:
        server.shutdown()
        server.server_close()


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {f"base_model.model.q_proj.lora_{m}.weight": torch.full((2, 1 << 20), value) for m in "AB"}


def test_engines_of_two_nodes_are_told_once_each(servers):
    with Fleet() as fleet:
        far = fleet.start_daemon(named("lora-far"))
        near = fleet.start_daemon(named("lora-near"), peers=[far])
        for daemon, server, name in ((near, servers[0], "e0"), (far, servers[1], "e1")):
            url = f"http://127.0.0.1:{server.server_address[1]}"
            change_engines(daemon.endpoint, add=[EngineConfig(name=name, kind="vllm", url=url)])

        def push(version: int) -> dict[str, str]:
            report = push_lora(
                tensors(version), config=CONFIG, version=version, daemon=near.endpoint, model="default", timeout=30
            )
            assert report is not None
            assert report.bytes > 2**24, "more than a frame that is not meant to be large"
            return {f"{one.node}/{one.engine}": one.outcome for one in report.engines}

        def known() -> bool:  # the near daemon hears of its peer's new engine with a heartbeat
            return {engine.name for engine in fetch_status(near.endpoint).engines} == {"e0", "e1"}

        assert eventually(known, seconds=30)
        assert push(7) == {f"{near.name}/e0": "loaded", f"{far.name}/e1": "loaded"}
        assert eventually(lambda: [list(server.loaded) for server in servers] == [["policy@7"]] * 2, seconds=10)
        for server in servers:
            assert server.calls.count(("load_lora_adapter", "policy@7")) == 1
            assert all(bool((tensor == 7).all()) for tensor in server.loaded["policy@7"].values())

        servers[1].refuses = True
        assert push(8) == {f"{near.name}/e0": "loaded", f"{far.name}/e1": "failed"}
        assert list(servers[1].loaded) == ["policy@7"]
        with pytest.raises(PushRefused, match="engine e0 has policy@8 loaded already"):
            push(8)
        servers[0].refuses = True
        with pytest.raises(PushAborted, match="out of memory"):
            push(9)
        assert eventually(lambda: list(servers[0].loaded) == ["policy@8"], seconds=10), servers[0].calls
