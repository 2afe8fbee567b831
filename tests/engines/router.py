"""SGLang's router, started for a test."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.engines.kit import ENGINES, free_port
from weightsync.testing import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["running_router"]


@contextlib.contextmanager
def running_router(log: Path) -> Iterator[str]:
    """SGLang's router, at the URL that this gives."""
    python = ENGINES / "router/bin/python"
    if not python.exists():
        pytest.fail(f"no router in {ENGINES}: run `make engines`")
    port, metrics = free_port(), free_port(50)
    command = [str(python), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics), "--policy", "round_robin"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return httpx.get(f"{url}/liveness", timeout=5, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    try:
        assert eventually(answers, seconds=60), log.read_text()
        yield url
    finally:
        os.killpg(process.pid, 9)
        process.wait(15)
