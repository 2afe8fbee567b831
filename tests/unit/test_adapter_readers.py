"""On which GPUs the ranks of an engine are."""

from __future__ import annotations

import subprocess
import sys

import pytest

from weightsync.adapters import readers
from weightsync.errors import EngineError

SERVER = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as listening:
    print(listening.getsockname()[1], flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def url(monkeypatch):
    """A process of its own that listens, with a CUDA_VISIBLE_DEVICES of its own."""
    monkeypatch.setattr(readers, "all_gpus", lambda: ["aa", "bb", "cc"])
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"CUDA_VISIBLE_DEVICES": "2,0"},
    ) as child:
        assert child.stdout is not None
        yield f"http://127.0.0.1:{int(child.stdout.readline())}"
        child.communicate("\n", timeout=10)


def test_the_engines_own_ordinals(url):
    assert readers.reader_gpus(url, (0, 1), named=(), engine="e") == ["cc", "aa"]
    assert readers.reader_gpus(url, (1,), named=(), engine="e") == ["aa"]


def test_what_the_config_names_wins(url):
    assert readers.reader_gpus(url, (0, 1), named=("GPU-x", "y"), engine="e") == ["x", "y"]
    with pytest.raises(EngineError, match="1 GPUs, and it has 2 ranks"):
        readers.reader_gpus(url, (0, 1), named=("GPU-x",), engine="e")


def test_where_it_cannot_be_told(url):
    with pytest.raises(EngineError, match="sees 2") as caught:
        readers.reader_gpus(url, (0, 1, 2), named=(), engine="e")
    assert "gpus = [" in str(caught.value)
    with pytest.raises(EngineError, match="nobody is seen to listen"):
        readers.reader_gpus("http://127.0.0.1:1", (0,), named=(), engine="e")
