"""Real reference engines for tests: started, waited for and ended, with nothing left behind.

with running_engine(model_dir, tp=2) as engine:
    engine.post("/generate", {"prompt_ids": [1, 2], "max_tokens": 4})
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Answer", "EngineProcess", "running_engine"]

REPOSITORY = Path(__file__).resolve().parent.parent
_TICK = 0.02  # seconds between looks at the port file, spent waiting for the process


class Answer(NamedTuple):
    """An HTTP answer; `body` is its JSON."""

    status: int
    body: Any


class EngineProcess:
    """One engine, front and workers. `kind`, `name`, `url` and `api_key` make it the spec of its own adapter."""

    kind = "reference"
    ca_file, path, gpus, target = None, "auto", (), "all"  # needed by adapters of other brands

    def __init__(self, process: subprocess.Popen[bytes], name: str, directory: Path, api_key: str | None) -> None:
        self.process = process
        self.name = name
        self.api_key = api_key
        self.url = ""
        self._directory = directory
        self._workers: list[psutil.Process] = []

    @property
    def log(self) -> str:
        """Output of front and workers so far."""
        return (self._directory / "log").read_text()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids by tp_rank."""
        return [worker.pid for worker in self._workers]

    def get(self, path: str, *, seconds: float = 30.0) -> Answer:
        return self.request("GET", path, b"", seconds=seconds)

    def post(self, path: str, body: Any = None, *, seconds: float = 30.0) -> Answer:
        return self.request("POST", path, b"" if body is None else json.dumps(body).encode(), seconds=seconds)

    def request(self, method: str, path: str, body: bytes, *, seconds: float = 30.0) -> Answer:
        """Make one request, over a new connection."""
        address = urlsplit(self.url)
        assert address.hostname is not None
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=seconds)
        headers = {"X-Timeout-Seconds": f"{seconds}"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
            return Answer(response.status, json.loads(response.read()))
        finally:
            connection.close()

    def info(self) -> Any:
        answer = self.get("/info")
        assert answer.status == 200, answer
        return answer.body

    def wait_running(self, count: int, *, seconds: float = 20.0) -> None:
        """Return when exactly `count` requests are in flight."""
        deadline = time.monotonic() + seconds
        while self.info()["running"] != count:
            assert time.monotonic() < deadline, f"never {count} requests in flight"

    def generate(self, prompt_ids: list[int], max_tokens: int, *, seconds: float = 30.0) -> Any:
        answer = self.post(
            "/generate", {"prompt_ids": prompt_ids, "max_tokens": max_tokens, "logprobs": True}, seconds=seconds
        )
        assert answer.status == 200, answer
        return answer.body

    def kill_worker(self, tp_rank: int) -> None:
        """Kill a worker with SIGKILL, as in a crash."""
        os.kill(self._workers[tp_rank].pid, signal.SIGKILL)

    def wait_exit(self, *, seconds: float = 20.0) -> int:
        """Wait until front and workers have ended, and return the front's exit status. Fails if any lives on."""
        status = self.process.wait(timeout=seconds)
        deadline = time.monotonic() + seconds
        while alive := [worker for worker in self._workers if _runs(worker)]:
            assert time.monotonic() < deadline, f"workers outlived the engine: {alive}"
            psutil.wait_procs(alive, timeout=_TICK)
        return status

    def _wait_ready(self, port_file: Path, deadline: float) -> None:
        while not port_file.exists():
            try:
                status = self.process.wait(timeout=_TICK)
            except subprocess.TimeoutExpired:
                if time.monotonic() < deadline:
                    continue
                raise AssertionError(f"the engine is not ready in time; it says:\n{self.log}") from None
            raise AssertionError(f"the engine ended with status {status}; it says:\n{self.log}")
        self.url = f"http://127.0.0.1:{int(port_file.read_text())}"
        self._workers = [psutil.Process(pid) for pid in self.info()["worker_pids"]]

    def _stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(timeout=15)
        for worker in psutil.wait_procs(self._workers, timeout=5)[1]:
            worker.kill()  # it was stopped; or there is a bug, which another test has to find


def _runs(process: psutil.Process) -> bool:
    """Return whether the process still executes. A zombie does not; orphans stay such in a container without init."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def running_engine(
    model: Path | str,
    tp: int = 1,
    *,
    name: str = "engine",
    load_format: str = "auto",
    faults: bool = False,
    api_key: str | None = None,
    arguments: tuple[str, ...] = (),
    start_seconds: float = 50.0,
) -> Iterator[EngineProcess]:
    """Start an engine and wait until it is ready. It is ended at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="weightsync-engine-") as directory:
        root = Path(directory)
        command = [
            *(sys.executable, "-m", "weightsync.adapters.reference", "--model", str(model), "--tp", str(tp)),
            *("--name", name, "--load-format", load_format, "--port", "0", "--port-file", str(root / "port")),
            *(("--enable-faults",) if faults else ()),
            *arguments,
        ]
        environment = {key: value for key, value in os.environ.items() if key != "WEIGHTSYNC_REFERENCE_API_KEY"}
        environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        if api_key is not None:
            environment["WEIGHTSYNC_REFERENCE_API_KEY"] = api_key
        with (root / "log").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=directory
            )
        engine = EngineProcess(process, name, root, api_key)
        try:
            engine._wait_ready(root / "port", time.monotonic() + start_seconds)
            yield engine
        finally:
            engine._stop()
