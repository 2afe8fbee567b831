"""A router is not an engine: it passes requests on, and knows nothing of weights."""

from __future__ import annotations

import pytest

from tests.engines.router import running_router
from weightsync import doctor
from weightsync.config import EngineConfig

pytestmark = [pytest.mark.engines, pytest.mark.timeout(120)]


@pytest.fixture
def router(tmp_path):
    with running_router(tmp_path / "router.log") as url:
        yield url


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
