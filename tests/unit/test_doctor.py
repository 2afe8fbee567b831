"""The doctor's own questions; what each brand's adapter adds is tested with that brand."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from tests.engine_process import running_engine
from tests.faults.kit import TINY
from weightsync import doctor
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.cli import app
from weightsync.config import EngineConfig


def spec(url: str, kind: str = "auto") -> EngineConfig:
    return EngineConfig(name="e", kind=kind, url=url)


def levels(findings) -> dict[str, list[str]]:
    return {level: [f.what for f in findings if f.level == level] for level in ("fail", "warn", "ok")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    where = tmp_path_factory.mktemp("checkpoint")
    random_checkpoint(TINY, where)
    return where


def test_a_healthy_reference_engine(checkpoint):
    with running_engine(checkpoint) as engine:
        found = doctor.examine(spec(engine.url))
    by_level = levels(found)
    assert by_level["fail"] == []
    assert any("reference" in what for what in by_level["ok"])
    assert any("/dev/shm is shared" in what for what in by_level["ok"])
    assert any("in host memory" in what for what in by_level["ok"])


def test_nobody_there():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        found = doctor.examine(spec(url))
    assert found[0].level == "fail"
    assert f"{url}/health" in found[0].fix


@pytest.fixture
def stranger():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_stranger_is_named_as_such(stranger):
    found = doctor.examine(spec(stranger))
    assert "neither vLLM nor SGLang" in found[0].what
    assert "router" in found[0].fix


def test_an_engine_that_is_to_join_a_group_which_it_cannot():
    nobody = EngineConfig(name="e", kind="vllm", path="group", url="http://127.0.0.1:9")
    assert any("vllm joins groups over NCCL alone" in what for what in levels(doctor.examine(nobody))["fail"])


def test_another_machine():
    found = doctor.examine(spec("http://192.0.2.1:9"), timeout=0.2)
    assert any("another machine" in f.what and "peers" in f.fix for f in found if f.level == "fail")


def test_the_command(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    run = CliRunner()
    with running_engine(checkpoint) as engine:
        good = run.invoke(app, ["doctor", "--engine", engine.url, "--json"])
        assert good.exit_code == 0, good.output
        assert {f["level"] for f in json.loads(good.output)} <= {"ok", "warn"}
        config = tmp_path / "node.toml"
        config.write_text(f'[[engines]]\nname = "a"\nkind = "reference"\nurl = "{engine.url}"\n')
        table = run.invoke(app, ["doctor", "--node-config", str(config)])
        assert table.exit_code == 0
        assert f"a at {engine.url}" in table.output
        assert f"node node0 of {config}" in " ".join(table.output.split())
        assert "slots of 128 MiB, in host memory" in " ".join(table.output.split())
        both = run.invoke(app, ["doctor", "--node-config", str(config), "--json"])
        assert json.loads(both.output).keys() == {"node node0", "a"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        bad = run.invoke(app, ["doctor", "--engine", f"http://127.0.0.1:{taken.getsockname()[1]}"])
    assert bad.exit_code == 1
    assert "fail" in bad.output
    far = run.invoke(app, ["doctor", "--engine", "http://192.0.2.1:9", "--timeout", "0.2"])
    assert "name it in [cluster.peers] here" in far.output
    two = run.invoke(app, ["doctor", "--engine", "http://127.0.0.1:9", "--node-config", str(config)])
    assert two.exit_code == 1
    assert "either --engine URL, or --node-config" in str(two.exception)
    alone = json.loads(run.invoke(app, ["doctor", "--json"]).output)
    assert list(alone) == ["this machine"]
    assert any("open files" in finding["what"] for finding in alone["this machine"])


def test_time_is_kept():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        found = doctor.examine(spec(f"http://127.0.0.1:{silent.getsockname()[1]}"), timeout=0.3)
    assert found[0].level == "fail"
    assert time.monotonic() - began < 5, sys.platform
