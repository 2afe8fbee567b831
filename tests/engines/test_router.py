"""A router is not an engine: it passes requests on, and knows nothing of weights."""

from __future__ import annotations

import os
import subprocess

import httpx
import pytest

from tests.engines.kit import ENGINES, free_port
from weightsync import doctor
from weightsync.config import EngineConfig
from weightsync.testing import eventually

pytestmark = [pytest.mark.engines, pytest.mark.timeout(120)]


@pytest.fixture
def router(tmp_path):
    python = ENGINES / "router/bin/python"
    if not python.exists():
        pytest.fail(f"no router in {ENGINES}: run `make engines`")
    port, metrics = free_port(), free_port(50)
    command = [str(python), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics), "--policy", "round_robin"]
    with (tmp_path / "router.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return httpx.get(f"{url}/liveness", timeout=5, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    try:
        assert eventually(answers, seconds=60), (tmp_path / "router.log").read_text()
        yield url
    finally:
        os.killpg(process.pid, 9)
        process.wait(15)


def test_the_doctor_tells_a_router_from_an_engine(router):
    found = doctor.examine(EngineConfig(name="e", kind="auto", url=router))
    assert found[0].level == "fail"
    assert "neither vLLM nor SGLang" in found[0].what
    assert "router" in found[0].fix


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
def test_a_router_taken_for_an_engine_fails_in_a_sentence(router, kind):
    found = doctor.examine(EngineConfig(name="e", kind=kind, url=router))
    assert found[0].level == "fail"
    assert "Traceback" not in found[0].what
