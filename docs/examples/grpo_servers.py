"""The servers of `grpo_tiny.py`: one inference engine, started with its stock flags, and a weightsyncd beside it.

vLLM and SGLang are those that `make engines` has put into `.engines/` (`$WEIGHTSYNC_ENGINES` names another place).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.adapters.reference.config import ModelConfig
from weightsync.fleet import Child, Daemon, Fleet, FleetError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["KINDS", "VOCABULARY", "Servers", "free_port", "make_checkpoint", "running"]

ROOT = Path(__file__).resolve().parents[2]
ENGINES = Path(os.environ.get("WEIGHTSYNC_ENGINES", ROOT / ".engines")).resolve()
KINDS = ("vllm", "sglang", "reference")
PORTS = (24000, 24100)
START = 300.0  # seconds; half a minute where cores are idle
VOCABULARY = 128  # token 65 is "A": the tokens are ASCII

FLAGS = {
    "vllm": ["--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "64", "--block-size", "32"],
    "sglang": [
        *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
        *("--context-length", "1024", "--max-total-tokens", "16384", "--mem-fraction-static", "0.2"),
        *("--max-running-requests", "64", "--disable-overlap-schedule", "--skip-server-warmup"),
    ],
}
ENVIRONMENT = {
    "vllm": {
        "VLLM_SERVER_DEV_MODE": "1",  # opens the routes that take weights
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
    },
    "sglang": {"SGLANG_USE_CPU_ENGINE": "1", "GLOO_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo"},
}


@dataclass(frozen=True)
class Servers:
    """Where they are reached."""

    engine: str  # http://…
    daemon: str  # ipc://…


def make_checkpoint(folder: Path) -> None:
    """A Qwen3 of 328,000 seeded random weights, and a tokenizer that knows ASCII, as any engine loads them."""
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
    )
    random_checkpoint(config, folder, seed=0, scale=0.05)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {chr(i): i for i in range(VOCABULARY)}, "unk_token": "\0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


@contextlib.contextmanager
def running(kind: str, checkpoint: Path, url: str = "") -> Iterator[Servers]:
    """An engine on the checkpoint and its node's weightsyncd; both end with the block. Their logs lie beside the
    checkpoint then.

    With `url` the engine is yours, and is waited for. Raises `FleetError` with the end of a log when one does not come
    up.
    """
    with Fleet() as fleet:
        try:
            if url:
                _wait_healthy(url, None)
            elif kind == "reference":
                url = fleet.start_engine("engine", checkpoint).url
            else:
                url = _start_engine(fleet, kind, checkpoint)
            yield Servers(url, _start_daemon(fleet, kind, url).endpoint)
        finally:
            segments = _segments({child.pid for child in fleet.children})
            for log in fleet.root.glob("*.log"):
                shutil.copy(log, checkpoint.parent)
            fleet.stop()
            for segment in segments:
                segment.unlink(missing_ok=True)


def _start_daemon(fleet: Fleet, kind: str, url: str) -> Daemon:
    """This is all that an operator writes: one service for each node, which names the engines there."""
    name = f"grpo{os.getpid()}"
    endpoint = f"ipc://{fleet.root}/weightsyncd.sock"
    config = fleet.root / "node.toml"
    config.write_text(f"""
        [node]
        name = "{name}"
        listen = "{endpoint}"
        [arena]
        device = "cpu"
        slot_bytes = "1MiB"     # of a model this small; the default suits a large one
        [[engines]]
        name = "engine"
        kind = "{kind}"
        url = "{url}"
    """)
    child = fleet.spawn("weightsyncd", ("-m", "weightsyncd", "--node-config", str(config)))
    daemon = Daemon(name, child.process, child.log, endpoint=endpoint, config=config)
    fleet.wait_daemon(daemon, engines=1)
    return daemon


def _start_engine(fleet: Fleet, kind: str, checkpoint: Path) -> str:
    """A real server with our plugin in its environment. Returns its URL when it answers."""
    python = ENGINES / kind / "bin/python"
    if not python.exists():
        raise FleetError(f"there is no {python}: run `make engines`, or start a server yourself and give its --url")
    port = free_port()
    where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "policy", "--dtype", "float32"]
    model = {
        "vllm": [str(checkpoint), "--weight-transfer-config", '{"backend": "weightsync"}'],
        "sglang": ["--model-path", str(checkpoint)],
    }
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")},
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ENGINES / "plugins"),  # what installing weightsync in the engine's environment does
        **ENVIRONMENT[kind],
    }
    log = fleet.root / "engine.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [str(python), str(ROOT / f"engines/serve_{kind}.py"), *model[kind], *where, *FLAGS[kind]],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=fleet.root,
            start_new_session=True,
        )
    child = Child("engine", process, log)
    fleet.children.append(child)  # which ends it
    # vLLM's processes yield in circles while they wait; Linux 6.18 then runs nobody else's for as long as 14 s
    with contextlib.suppress(OSError):  # a kernel without autogroups has no such trouble
        Path(f"/proc/{process.pid}/autogroup").write_text("5")
    url = f"http://127.0.0.1:{port}"
    _wait_healthy(url, child)
    return url


def _segments(sessions: set[int]) -> set[Path]:
    """Files of shared memory that processes of these sessions have mapped: vLLM and SGLang leave theirs behind."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has just ended, or is somebody else's
            if os.getsid(int(maps.parent.name)) in sessions:
                found |= set(re.findall(r"/dev/shm/\S+", maps.read_text()))
    return {Path(name) for name in found if not name.startswith("/dev/shm/weightsync-")}  # these weightsyncd removes


def _wait_healthy(url: str, child: Child | None) -> None:
    deadline = time.monotonic() + START
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success:
                return
        log = f"\n{child.tail(40)}" if child is not None else ""
        if child is not None and child.process.poll() is not None:
            raise FleetError(f"the engine ended with status {child.process.returncode}{log}")
        if time.monotonic() > deadline:
            raise FleetError(f"{url} has not answered within {START:g} s{log}")
        select.select([], [], [], 0.1)


def free_port() -> int:
    """A port that nobody has now, below those that the kernel gives to clients: an engine takes a minute to bind it."""
    for port in range(*PORTS):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise FleetError(f"no free port from {PORTS[0]} to {PORTS[1] - 1}")
