"""Real vLLM and SGLang servers for tests: started, asked, watched and ended, with nothing of them left.

`make engines` installs them into `.engines/`; `$WEIGHTSYNC_ENGINES` names another such folder. An engine sees
weightsync only if it is started with `plugin=True`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
import psutil

from weightsync.fleet import Child, FleetError
from weightsync.testing import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["ENGINES", "Oracle", "RealEngine", "Running", "Said", "free_port", "installed", "model", "oracle"]

_ROOT = Path(__file__).resolve().parents[2]
ENGINES = Path(os.environ.get("WEIGHTSYNC_ENGINES", _ROOT / ".engines")).resolve()
_SHM = Path("/dev/shm")
_START = 150.0  # seconds; tensor parallel 2 on two busy cores takes the longest
_STOP = 15.0
_PORTS = (23000, 23100)
_LOOK = 0.1  # seconds between looks at a server that starts
_ANSWER = 60.0  # seconds for a request that nothing holds back
_HTTP = httpx.Client(trust_env=False, verify=False, limits=httpx.Limits(max_keepalive_connections=0))
LOGPROB = 1e-4  # what two implementations in fp32 may differ by


@dataclass(frozen=True)
class Said:
    """What an engine generated."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    def differs(self, other: Said, tolerance: float = LOGPROB) -> str:
        """How it differs from `other`; "" if it does not."""
        if self.tokens != other.tokens:
            return f"tokens {self.tokens} instead of {other.tokens}"
        worst = max(abs(a - b) for a, b in zip(self.logprobs, other.logprobs, strict=True))
        return f"logprobs differ by {worst:.2g}" if worst > tolerance else ""


@dataclass(frozen=True)
class Oracle:
    """What an engine with a checkpoint's weights says to some prompts."""

    said: dict[tuple[int, ...], Said]

    @classmethod
    def record(cls, engine: RealEngine, other: Oracle) -> Oracle:
        """What this engine says now to the prompts of `other`, as its own oracle for later."""
        return cls({prompt: engine.generate(prompt, len(said.tokens)) for prompt, said in other.said.items()})

    def check(self, engine: RealEngine, tolerance: float = LOGPROB) -> None:
        """The engine says just that."""
        for prompt, wanted in self.said.items():
            difference = engine.generate(prompt, len(wanted.tokens)).differs(wanted, tolerance)
            assert not difference, f"{engine.name} after {list(prompt)}: {difference}"


def model(name: str) -> Path:
    """The folder of a tiny checkpoint, such as `dense_base`."""
    return ENGINES / "models" / name


@cache
def oracle(name: str) -> Oracle:
    """What transformers says, in fp32, with the weights of a tiny checkpoint."""
    words = json.loads((model(name) / "oracle.json").read_text())
    return Oracle({tuple(w["prompt"]): Said(tuple(w["tokens"]), tuple(w["logprobs"])) for w in words})


def installed(kind: str) -> str:
    """The version of an engine in `ENGINES`; "" if it is not there."""
    packages = {"vllm": "vllm", "sglang": "sglang"}
    found = sorted((ENGINES / kind / "lib/python3.11/site-packages").glob(f"{packages[kind]}-*.dist-info"))
    return found[0].name.removesuffix(".dist-info").partition("-")[2] if found else ""


class Running:
    """A request under way in a thread of its own; `tokens` grows while the engine generates."""

    def __init__(self, engine: RealEngine, prompt: Sequence[int], count: int) -> None:
        self.prompt = tuple(prompt)
        self.tokens: list[int] = []
        self.error: str = ""  # what it ended with before all tokens were there
        self._count = count
        self._engine = engine
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{engine.name}-request", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for tokens in self._engine.stream(self.prompt, self._count):
                self.tokens += tokens
                if self._stop.is_set():
                    return
            if len(self.tokens) < self._count:
                self.error = f"ended after {len(self.tokens)} tokens"
        except (httpx.HTTPError, RuntimeError) as error:
            self.error = f"{type(error).__name__}: {error}"

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait_first(self, seconds: float = _ANSWER) -> None:
        """Return when it has got a token."""
        if not self.tokens:
            self.wait_tokens(1, seconds)

    def wait_tokens(self, more: int, seconds: float = _ANSWER) -> None:
        """Return when it has got so many tokens more than it has now, or all that it asked for."""
        wanted = min(len(self.tokens) + more, self._count)
        eventually(lambda: len(self.tokens) >= wanted or self.done, seconds=seconds)
        how = self.error or "still running"
        assert len(self.tokens) >= wanted, f"{len(self.tokens)} of {wanted} tokens after {seconds:g} s: {how}"

    def wait_end(self, seconds: float = _ANSWER) -> None:
        """Return when it has ended, well or not."""
        self._thread.join(seconds)
        assert self.done, f"still running after {seconds:g} s, with {len(self.tokens)} tokens"

    def leave(self) -> None:
        """Hang up."""
        self._stop.set()
        self.wait_end()


@dataclass
class RealEngine:
    """One server. Its process leads a session of its own, so that its workers end with it."""

    kind: str  # vllm | sglang
    checkpoint: Path
    root: Path  # for its log
    name: str = "engine"
    plugin: bool = False  # whether it sees weightsync
    tp: int = 1
    dtype: str = "float32"
    fp8: bool = False  # SGLang only
    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    port: int = 0
    child: Child | None = None
    _segments: set[str] = field(default_factory=set)  # of /dev/shm, that its processes have mapped

    # --- starting and ending --------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Self:
        """Start it, and return when it answers. Raises `FleetError` with the end of its log when it does not."""
        self.port = self.port or free_port()
        before = {p.name for p in _SHM.iterdir()}
        log = self.root / f"{self.name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                cwd=self.root,
                start_new_session=True,
            )
        self.child = Child(self.name, process, log)
        # vLLM's processes yield in circles while they wait; Linux 6.18 then runs nobody else's for as long as 14 s
        with contextlib.suppress(OSError):  # a kernel without autogroups: one run queue for all, and no such trouble
            Path(f"/proc/{process.pid}/autogroup").write_text("5")
        self._segments = set()
        deadline = time.monotonic() + _START
        while not self._healthy():
            if process.poll() is not None or time.monotonic() > deadline:
                what = "ended" if process.poll() is not None else f"was not ready within {_START:g} s"
                words = f"{self.kind} {what}\n{self.child.tail(40)}"
                self.stop()
                raise FleetError(words)
            select.select([], [], [], _LOOK)
        if self.kind == "sglang":
            # its own call after the start comes too early without a warm-up: then every flush on a CPU walks its heap
            self.ask("POST", "/freeze_gc")
        self._look_at_segments()
        self._segments -= before
        return self

    def _healthy(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return _HTTP.get(f"{self.url}/health", timeout=5).status_code == httpx.codes.OK
        return False

    def stop(self) -> None:
        """End it and remove what it has left in shared memory."""
        if self.child is not None and self.child.process.poll() is None:
            self._look_at_segments()
            self.child.kill(signal.SIGTERM)
            with contextlib.suppress(FleetError):
                self.child.wait(_STOP)
        self.kill()

    def kill(self) -> None:
        """SIGKILL for all of its processes."""
        if self.child is None:
            return
        if self.child.process.poll() is None:
            self._look_at_segments()
        group = self._processes(all_of_session=True)
        for process in group:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(group, timeout=_STOP)
        self.child.wait(_STOP)
        self.child = None
        for name in self._segments:
            if not name.startswith("weightsync-"):  # those are ours to remove, and the tests see to it
                (_SHM / name).unlink(missing_ok=True)

    def _environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        common = {
            "HF_HUB_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PATH": f"{ENGINES / self.kind / 'bin'}:{os.environ['PATH']}",
        }
        if self.plugin:
            common["PYTHONPATH"] = str(ENGINES / "plugins")
        own = {
            "vllm": {
                "VLLM_SERVER_DEV_MODE": "1",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_HOST_IP": "127.0.0.1",
            },
            "sglang": {
                "SGLANG_USE_CPU_ENGINE": "1",
                "GLOO_SOCKET_IFNAME": "lo",
                "TP_SOCKET_IFNAME": "lo",
                **({"SGLANG_CPU_OMP_THREADS_BIND": "|".join("01"[: self.tp])} if self.tp > 1 else {}),
            },
        }
        return kept | common | own[self.kind] | self.env

    def _command(self) -> list[str]:
        python = str(ENGINES / self.kind / "bin/python")
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "tiny", "--dtype", self.dtype]
        if self.kind == "vllm":
            own = ["--enforce-eager", "--max-model-len", "8192", "--max-num-seqs", "4"]
            own += ["--max-num-batched-tokens", "4096", "--tensor-parallel-size", str(self.tp)]
            return [python, str(_ROOT / "engines/serve_vllm.py"), str(self.checkpoint), *where, *own, *self.flags]
        own = ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
        own += ["--context-length", "8192", "--max-total-tokens", "16384", "--max-running-requests", "4"]
        own += ["--mem-fraction-static", "0.2", "--disable-overlap-schedule", "--skip-server-warmup"]
        own += ["--tp", str(self.tp)]
        own += ["--model-path", str(self.checkpoint), *(["--quantization", "fp8"] if self.fp8 else [])]
        script = "serve_sglang_fp8.py" if self.fp8 else "serve_sglang.py"
        return [python, str(_ROOT / "engines" / script), *where, *own, *self.flags]

    # --- asking ---------------------------------------------------------------------------------------------------

    def post(self, path: str, body: Any = None, *, seconds: float = _ANSWER) -> Any:
        """The decoded answer; raises `httpx.HTTPStatusError` where it is no success."""
        answer = _HTTP.post(f"{self.url}{path}", json=body, timeout=seconds).raise_for_status()
        return answer.json() if answer.content else None

    def get(self, path: str, *, seconds: float = _ANSWER) -> Any:
        """As `post`."""
        return _HTTP.get(f"{self.url}{path}", timeout=seconds).raise_for_status().json()

    def generate(self, prompt: Sequence[int], count: int, *, seconds: float = _ANSWER) -> Said:
        """Greedy tokens after the prompt, never ending early, and their logprobs."""
        if self.kind == "vllm":
            body = self._completion(prompt, count) | {"logprobs": 0}
            choice = self.post("/v1/completions", body, seconds=seconds)["choices"][0]
            return Said(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))
        body = self._generation(prompt, count) | {"return_logprob": True}
        pairs = self.post("/generate", body, seconds=seconds)["meta_info"]["output_token_logprobs"]
        return Said(tuple(int(token) for _, token, *_ in pairs), tuple(logprob for logprob, *_ in pairs))

    def stream(self, prompt: Sequence[int], count: int) -> Iterator[list[int]]:
        """As `generate`, tokens as they come."""
        if self.kind == "vllm":
            path, body = "/v1/completions", self._completion(prompt, count) | {"stream": True}
        else:
            path, body = "/generate", self._generation(prompt, count) | {"stream": True}
        seen = 0
        with _HTTP.stream("POST", f"{self.url}{path}", json=body, timeout=_ANSWER) as answer:
            if answer.status_code != httpx.codes.OK:
                raise RuntimeError(f"{answer.status_code} {answer.read()[:300]!r}")
            for line in answer.iter_lines():
                word = line.removeprefix("data:").strip()
                if not word or word == "[DONE]":
                    continue
                part = json.loads(word)
                if "error" in part:
                    raise RuntimeError(str(part["error"]))
                if self.kind == "vllm":
                    yield part["choices"][0].get("token_ids") or [] if part["choices"] else []
                else:  # all tokens each time
                    yield part["output_ids"][seen:]
                    seen = max(seen, len(part["output_ids"]))

    def ask(self, method: str, path: str) -> bool:
        """Whether it says yes; what it says does not matter."""
        return _HTTP.request(method, f"{self.url}{path}", timeout=_ANSWER).is_success

    def flush_cache(self) -> None:
        """Forget what prompts' beginnings computed to. Refused until the engine has noticed who hung up."""
        path = "/reset_prefix_cache" if self.kind == "vllm" else "/flush_cache"
        assert eventually(lambda: self.ask("POST", path), seconds=_STOP), f"{self.name} does not flush its cache"

    def weight_version(self) -> str:
        """What the engine itself says that it holds."""
        answer = self.get("/weight_info" if self.kind == "vllm" else "/model_info")
        return str(answer["weight_version"])

    def start_requests(self, prompts: Sequence[Sequence[int]], count: int) -> list[Running]:
        """One request for each prompt; all have got their first token when this returns."""
        requests = [Running(self, prompt, count) for prompt in prompts]
        for request in requests:
            request.wait_first()
        return requests

    def _completion(self, prompt: Sequence[int], count: int) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": list(prompt), "max_tokens": count, "temperature": 0, "ignore_eos": True}
        return body | {"return_token_ids": True}

    def _generation(self, prompt: Sequence[int], count: int) -> dict[str, Any]:
        sampling = {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}
        return {"input_ids": list(prompt), "sampling_params": sampling}

    # --- watching -------------------------------------------------------------------------------------------------

    def _processes(self, *, all_of_session: bool = False) -> list[psutil.Process]:
        if self.child is None:
            return []
        if not all_of_session:
            with contextlib.suppress(psutil.NoSuchProcess):
                front = psutil.Process(self.child.pid)
                return [front, *front.children(recursive=True)]
            return []
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                if os.getsid(process.pid) == self.child.pid:
                    found.append(process)
        return found

    def rss(self) -> int:
        """Bytes of memory that its processes have, shared ones counted once for each."""
        total = 0
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def segments(self) -> set[str]:
        """Names in /dev/shm that its processes have mapped or open now."""
        found = set()
        for process in self._processes():
            with contextlib.suppress(OSError, psutil.Error):
                paths = [Path(f"/proc/{process.pid}/maps").read_text()]
                paths += [os.readlink(f) for f in Path(f"/proc/{process.pid}/fd").iterdir()]
                for line in "\n".join(paths).splitlines():
                    name = line.partition("/dev/shm/")[2]
                    if name and not name.endswith("(deleted)"):
                        found.add(name.partition("/")[0])
        return found

    def _look_at_segments(self) -> None:
        self._segments |= self.segments()


def free_port(skip: int = 0) -> int:
    """A port that nobody has now, below those that the kernel gives to clients: an engine takes a minute to bind it.

    `skip` is for who needs several at once.
    """
    for port in range(_PORTS[0] + skip, _PORTS[1]):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise FleetError(f"no free port from {_PORTS[0]} to {_PORTS[1] - 1}")
