"""Real vLLM and SGLang servers on this machine's GPUs, and what they generate."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

__all__ = ["Case", "Server", "compare", "free_memory", "gpu_memory", "stop_all"]

PROMPTS = ("Hello", "The quick brown fox", "1 2 3")
TOKENS = 8
START = 240.0
# vLLM's weight transfer backend for each way; the way "nccl" is vLLM's own trainer API
BACKENDS = {"ipc": "ipc", "group": "nccl", "plugin": "weightsync", "nccl": "nccl"}
ROOT = Path(__file__).resolve().parent.parent
EXTENSION = "weightsync.adapters.vllm.extension.WeightSyncExtension"


@dataclass(frozen=True)
class Case:
    kind: str
    path: str
    model: str = "dense"
    tp: int = 1
    quantization: str = ""  # fp8: by the engine; block: it serves a checkpoint of fp8 blocks
    sleep: str = ""  # put to sleep before each push; vLLM's level; SGLang: all, weights and cache

    @property
    def oracle(self) -> tuple[Any, ...]:
        return (self.kind, self.model, self.tp, self.quantization)

    @property
    def served(self) -> str:
        return f"{self.model}-block" if self.quantization == "block" else self.model

    @property
    def name(self) -> str:
        sleep = f"sleep-{self.sleep}" if self.sleep else ""
        return "-".join(filter(None, [self.kind, self.path, self.model, f"tp{self.tp}", self.quantization, sleep]))


class Server:
    def __init__(
        self,
        case: Case,
        checkpoint: Path,
        port: int,
        gpus: str,
        options: argparse.Namespace,
        flags: tuple[str, ...] = (),
    ) -> None:
        self.case, self.port, self.url = case, port, f"http://127.0.0.1:{port}"
        self.log = options.logs / f"{case.name}-{checkpoint.name}.log"
        env = os.environ | {"CUDA_VISIBLE_DEVICES": gpus}
        if case.path in ("plugin", "extension"):
            env["EXTRA_PYTHONPATH"] = f"{options.plugins}:{ROOT}"
            env["PYTHONPATH"] = f"{options.plugins}:{ROOT}:{env.get('PYTHONPATH', '')}"
        else:
            env.pop("PYTHONPATH", None)
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*self._command(checkpoint, options), *flags],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    def _command(self, checkpoint: Path, options: argparse.Namespace) -> list[str]:
        case = self.case
        common = ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(self.port)]
        if case.quantization == "fp8":
            common += ["--quantization", "fp8"]
        if case.sleep:
            common += ["--enable-sleep-mode" if case.kind == "vllm" else "--enable-memory-saver"]
        if case.kind == "vllm":
            command = [
                *shlex.split(options.vllm),
                "serve",
                str(checkpoint),
                "--enforce-eager",
                "--max-model-len",
                "1024",
            ]
            # A cache of given size: vLLM would measure what is free, and other servers start meanwhile.
            command += ["--max-num-seqs", "8", "--kv-cache-memory-bytes", str(2 << 30)]
            command += ["--gpu-memory-utilization", str(options.memory)]
            command += ["--attention-backend", "TRITON_ATTN", "--disable-custom-all-reduce"]
            command += ["--tensor-parallel-size", str(case.tp), *common]
            if case.path in BACKENDS:
                command += ["--weight-transfer-config", json.dumps({"backend": BACKENDS[case.path]})]
            if case.path == "extension":
                command += ["--worker-extension-cls", EXTENSION]
            return command
        command = [*shlex.split(options.sglang), "--model-path", str(checkpoint), "--tp", str(case.tp)]
        command += ["--attention-backend", "triton", "--sampling-backend", "pytorch", "--disable-cuda-graph"]
        command += ["--context-length", "1024", "--max-running-requests", "8", "--max-total-tokens", "16384"]
        command += ["--mem-fraction-static", str(options.memory), "--disable-custom-all-reduce", "--skip-server-warmup"]
        return [*command, *common]

    def wait(self) -> str:
        """Wait until the server answers. Returns "", or else why it does not."""
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                return f"ended: {self.tail()}"
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).read()
            except OSError:
                time.sleep(0.5)
            else:
                return ""
        return f"was not ready in {START:g} s: {self.tail()}"

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        telling = [line for line in lines if "Error" in line or "error:" in line] or lines
        return " | ".join(line.strip()[-200:] for line in telling[-3:])

    def sleep(self) -> int:
        """Put the server to sleep. Returns the MiB of GPU memory that became free."""
        before = free_memory()
        if self.case.kind == "vllm":
            self._post(f"/sleep?level={self.case.sleep}", {})
        else:
            self._post("/release_memory_occupation", {"tags": ["weights", "kv_cache"]})
        return free_memory() - before

    def generate(self) -> list[tuple[list[int], list[float]]]:
        """Return greedy tokens and logprobs for each prompt. Caches are flushed: a cached prefix rounds differently."""
        self._post("/reset_prefix_cache" if self.case.kind == "vllm" else "/flush_cache", {})
        return [self._generate(prompt) for prompt in PROMPTS]

    def _generate(self, prompt: str) -> tuple[list[int], list[float]]:
        if self.case.kind == "vllm":
            body = {"model": "m", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
            body |= {"ignore_eos": True, "return_token_ids": True}
            choice = self._post("/v1/completions", body)["choices"][0]
            return choice["token_ids"], choice["logprobs"]["token_logprobs"]
        sampling = {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        answer = self._post("/generate", {"text": prompt, "sampling_params": sampling, "return_logprob": True})
        return answer["output_ids"], [p[0] for p in answer["meta_info"]["output_token_logprobs"]]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            content = answer.read()
        return json.loads(content) if content.startswith((b"{", b"[")) else None

    def terminate(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(8)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


def compare(found: list[Any], wanted: list[Any]) -> tuple[bool, float]:
    tokens = all(f[0] == w[0] for f, w in zip(found, wanted, strict=True))
    worst = max(abs(a - b) for f, w in zip(found, wanted, strict=True) for a, b in zip(f[1], w[1], strict=True))
    return tokens, worst


def stop_all(servers: list[Server]) -> None:
    for server in servers:
        server.terminate()
    for server in servers:
        server.stop()


def free_memory() -> int:
    """Return the MiB that are free, of all GPUs together."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    return sum(map(int, subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()))


def gpu_memory() -> dict[int, int]:
    """Return the MiB that each process uses, on all GPUs together."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    used: dict[int, int] = {}
    for line in subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines():
        pid, _, mib = line.partition(",")
        used[int(pid)] = used.get(int(pid), 0) + int(mib)
    return used
