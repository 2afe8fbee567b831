"""`python -m bench push` runs, on a model small enough for any machine. No figure is looked at, only what is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TINY = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "torch_dtype": "bfloat16",
}


@pytest.mark.e2e
@pytest.mark.usefixtures("no_leaks")
def test_pushes_and_the_broadcast_beside_them(tmp_path):
    shape, out = tmp_path / "tiny.json", tmp_path / "out.json"
    shape.write_text(json.dumps(TINY))
    arguments = ["--shape", str(shape), "--slot", "1MiB", "--pushes", "2", "--way", "push", "--way", "broadcast-check"]
    command = [sys.executable, "-m", "bench", "push", *arguments, "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())["figures"]
    ours, peer = figures["ways"]
    assert figures["bytes"] == 2 * (128 * 32 * 2 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 2 * 8 + 3 * 64 * 32 + 2 * 32) + 32)
    for way in (ours, peer):
        assert way["seconds"]["runs"] == len(way["seconds"]["all"]) == 2
        assert way["checked"] == "in engines"
        assert {"trainer rank", "engine rank"} <= way["peak"].keys()
    assert "Fastest: " in done.stdout
