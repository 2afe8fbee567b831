"""A node whose slots lie on GPUs keeps what was pushed last in host memory, and gives it to engines that come late."""

from __future__ import annotations

import itertools
import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.gpu.test_push import DENSE, gpu_users, maps_cuda
from tests.own import named
from weightsync import push_weights
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.adapters.reference.oracle import expected_checksums
from weightsync.config import EngineConfig
from weightsync.fleet import Daemon, Engine, Fleet
from weightsync.keeper.memory import LockedMemory
from weightsync.operator import change_engines, fetch_status
from weightsync.sources.tensors import TensorSource
from weightsync.testing import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.timeout(120), pytest.mark.e2e]

DEVICE = "cuda"
ARENA = {"slot_bytes": "192KiB", "slots": 2}  # less than the embedding, which is cut over two buckets
_LONG = 30.0  # seconds for what other processes do in their own time


class Hooked(TensorSource):
    """Weights in host memory; before one of the reads something happens."""

    def __init__(self, weights: dict[str, torch.Tensor], at: int, hook: Callable[[], None]) -> None:
        super().__init__(weights)
        self._left, self._hook = at, hook

    def read_into(self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...], out: torch.Tensor) -> None:
        if self._left == 0:
            self._hook()
        self._left -= 1
        super().read_into(shard, src_offset, shape, out)


@dataclass
class Node:
    """A daemon that keeps what is pushed, and two engines."""

    fleet: Fleet
    daemon: Daemon
    engines: list[Engine]
    versions: Iterator[int]

    @property
    def kept(self) -> int | None:
        version: int | None = fetch_status(self.daemon.endpoint).kept.get("default")
        return version

    @property
    def keeper(self) -> int | None:
        (keeper,) = fetch_status(self.daemon.endpoint).keepers
        return keeper.pid

    def wait_keeper(self, *, other: int | None = None) -> None:
        """Return once one runs and is ready, another than that one."""

        def ready() -> bool:
            return self.keeper != other and f"keeper.ready pid={self.keeper}" in self.daemon.log.read_text()

        assert eventually(ready, seconds=_LONG), self.daemon.tail(40)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.fleet.root / name / "model.safetensors")

    def on_device(self, name: str) -> dict[str, torch.Tensor]:
        return {tensor: value.to(DEVICE) for tensor, value in self.weights(name).items()}

    def push(self, weights: Any, *, drawn: bool = False, keeps: bool = True, **options: Any) -> int:
        version = next(self.versions)
        report = push_weights(weights, version=version, daemon=self.daemon.endpoint, timeout=60, **options)
        assert report.complete, str(report)
        assert {engine.engine for engine in report.engines} == {engine.name for engine in self.engines}
        assert {engine.drawn for engine in report.engines} == {drawn}
        if keeps:
            assert eventually(lambda: self.kept == version, seconds=_LONG), self.daemon.tail(40)
        return version

    def wait_serves(self, engine: Engine, name: str, version: int) -> None:
        """Return once it serves that version, and holds these weights bit for bit on every rank."""

        def serves() -> bool:
            info = httpx.get(f"{engine.url}/info", trust_env=False, timeout=30).raise_for_status().json()
            return (info["weight_version"], info["paused"], info["torn"]) == (version, False, False)

        assert eventually(serves, seconds=_LONG), self.daemon.tail(40)
        found = httpx.get(f"{engine.url}/checksums", trust_env=False, timeout=30).raise_for_status().json()
        assert found == expected_checksums(DENSE, self.weights(name), engine.tp), engine.name

    def restart(self, engine: Engine) -> None:
        """It dies, workers first, and comes back with what it was started on."""
        for process in reversed([front := psutil.Process(engine.pid), *front.children(recursive=True)]):
            process.kill()
        engine.wait(10)
        self.fleet.restart_engine(engine)

    @contextmanager
    def young(self) -> Iterator[Engine]:
        """An engine that joins now."""
        engine = self.fleet.start_engine("young", self.fleet.root / "A", tp=2, device=DEVICE)
        added = EngineConfig(name="young", kind="reference", url=engine.url)
        try:
            (status,) = change_engines(self.daemon.endpoint, add=(added,))
            assert status.state in ("blank", "serving"), "it may have been brought up already"
            yield engine
        finally:
            change_engines(self.daemon.endpoint, remove=("young",))
            self.fleet.end(engine)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Fleet() as fleet:
        for seed, name in enumerate("AB"):
            random_checkpoint(DENSE, fleet.root / name, seed)
        engines = [fleet.start_engine(f"e{tp}", fleet.root / "A", tp=tp, device=DEVICE, wait=False) for tp in (1, 2)]
        for engine in engines:
            fleet.wait_engine(engine)
        daemon = fleet.start_daemon(
            named("retain"), engines, arena=ARENA, node={"retain": "host"}, timeouts={"probe_every": 0.5}
        )
        made = Node(fleet, daemon, engines, itertools.count(1))
        made.wait_keeper()
        yield made
        assert "Traceback" not in daemon.log.read_text()


def test_engines_that_restart_get_what_was_pushed_last(node):
    """And the second time the keeper's GPU is left as it was the first time."""
    version = node.push(node.on_device("B"))
    taken = []
    for engine in node.engines:
        node.restart(engine)
        for each in node.engines:
            node.wait_serves(each, "B", version)
        assert eventually(lambda: fetch_status(node.daemon.endpoint).push is None, seconds=_LONG)
        taken.append(gpu_users().get(node.keeper, 0))
    assert eventually(lambda: gpu_users().get(node.keeper, 0) <= taken[0], seconds=_LONG), taken


def test_an_engine_that_joins_gets_what_was_pushed_last(node):
    version = node.push(node.on_device("B"))
    with node.young() as young:
        node.wait_serves(young, "B", version)


def test_what_was_read_in_place_is_kept_through_slots(node):
    version = node.push(node.on_device("B"), in_place=True, drawn=True)
    node.restart(node.engines[0])
    node.wait_serves(node.engines[0], "B", version)


def test_a_push_of_some_tensors_is_laid_over_what_was_kept(node):
    node.push(node.on_device("A"))
    some = {name for name in node.weights("B") if "mlp" in name}
    version = node.push({name: tensor for name, tensor in node.on_device("B").items() if name in some})
    node.restart(node.engines[1])
    both = node.weights("A") | {name: tensor for name, tensor in node.weights("B").items() if name in some}
    found: Any = None

    def serves() -> bool:
        nonlocal found
        info = httpx.get(f"{node.engines[1].url}/info", trust_env=False, timeout=30).json()
        found = httpx.get(f"{node.engines[1].url}/checksums", trust_env=False, timeout=30).json()
        return info["weight_version"] == version and not info["paused"]

    assert eventually(serves, seconds=_LONG), node.daemon.tail(40)
    assert found == expected_checksums(DENSE, both, node.engines[1].tp)


def test_a_keeper_that_is_killed_in_a_push_costs_nobody_the_push(node):
    node.push(node.on_device("A"))
    keeper = node.keeper
    assert keeper is not None
    sent = node.weights("B")
    source = Hooked(sent, len(sent) * 2 // 3, lambda: os.kill(keeper, signal.SIGKILL))
    version = node.push(source, keeps=False)
    for engine in node.engines:
        node.wait_serves(engine, "B", version)
    assert eventually(lambda: keeper not in gpu_users(), seconds=_LONG), "its GPU memory is given back"
    assert node.kept is None
    node.wait_keeper(other=keeper)
    node.push(node.on_device("B"))  # which the new one keeps


def test_the_keeper_has_one_cuda_context_and_the_daemon_none(node, gpus):
    node.push(node.on_device("A"))
    assert maps_cuda(node.keeper), "else this test shows nothing"
    assert not maps_cuda(node.daemon.pid)
    visible = psutil.Process(node.keeper).environ()["CUDA_VISIBLE_DEVICES"]
    assert visible == f"GPU-{torch.cuda.get_device_properties(gpus - 1).uuid}"


def test_pushes_leave_nothing_behind(node, gpus):
    """GPU memory of every process after push 23 is what it was after push 3, host memory of the keeper too, and the
    ledger is even.
    """

    def free() -> list[int]:
        return [torch.cuda.mem_get_info(gpu)[0] for gpu in range(gpus)]

    free()  # which takes a context on each
    weights = [node.on_device(name) for name in "AB"]
    for push in range(3):
        node.push(weights[push % 2])
    torch.cuda.synchronize()
    before, there, allocated = gpu_users(), free(), torch.cuda.memory_allocated()
    resident = psutil.Process(node.keeper).memory_info().rss
    shm = sorted(path.name for path in Path("/dev/shm").iterdir())
    for push in range(20):
        node.push(weights[push % 2])
    assert gpu_users() == before
    assert all(now > then - (16 << 20) for now, then in zip(free(), there, strict=True))
    assert torch.cuda.memory_allocated() == allocated
    grown = psutil.Process(node.keeper).memory_info().rss - resident
    assert grown < 64 << 20, "what one push takes, a huge page for each bucket, would be more after twenty"
    assert sorted(path.name for path in Path("/dev/shm").iterdir()) == shm
    assert sum(bridge.outstanding for bridge in fetch_status(node.daemon.endpoint).bridges) == 0


def test_memory_of_the_keeper_is_locked_as_far_as_cuda_knows():
    memory = LockedMemory(0)
    taken = memory.take(5 << 20)
    assert taken.is_pinned()
    ones = torch.arange(5 << 20, device="cuda").to(torch.uint8)
    taken.copy_(ones, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(taken, ones.cpu())
    address = taken.data_ptr()
    del taken
    assert memory.spare == 6 << 20
    assert memory.take(6 << 20).data_ptr() == address
    other = memory.take(1 << 20)  # for which the other was given back
    assert memory.spare == 0
    assert other.is_pinned()
