"""A hundred and fifty pushes through one daemon: nobody holds more after them than after the first thirty."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from tests.faults.kit import ARENA, TIMEOUTS, engine_processes, segments, until
from tests.own import free_port, named
from weightsync import push_weights
from weightsync.errors import PushAborted, PushRefused
from weightsync.operator import fetch_status

pytestmark = pytest.mark.faults

PUSHES, WARM = 150, 30
RSS = 4 << 20  # bytes a process may gain in the other 120 pushes: 35 KB for each would be a leak to find
FDS, THREADS = 3, 2  # connections and threads that happen to be there


@dataclass(frozen=True)
class Use:
    """What a process holds."""

    rss: int
    fds: int
    threads: int

    @staticmethod
    def of(process):
        with process.oneshot():
            return Use(process.memory_info().rss, process.num_fds(), process.num_threads())


@dataclass
class Weights:
    """Weights that are others for each push, in the same tensors."""

    tensors: dict[str, torch.Tensor]
    base: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.base = {name: tensor.clone() for name, tensor in self.tensors.items()}

    def change(self, number):
        for name, tensor in self.tensors.items():
            torch.mul(self.base[name], 1 + number / 1024, out=tensor)


def shm(name):
    """Entries and bytes of a daemon's arenas, as they are allocated."""
    names = segments(name)
    return len(names), sum(Path("/dev/shm", n).stat().st_blocks * 512 for n in names)


def gauges(port):
    """(name, reader) → value of the metrics that count exports."""
    page = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5, trust_env=False).raise_for_status().text
    return {
        (sample.name, sample.labels.get("reader", "")): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if "exports" in sample.name
    }


@pytest.fixture
def busy(node):
    """A daemon of its own on the node's engines, with a page of metrics; its port."""
    port = free_port()
    http = {"listen": f"127.0.0.1:{port}"}
    daemon = node.fleet.start_daemon(named("fault6"), node.engines, arena=ARENA, timeouts=TIMEOUTS, http=http)
    yield daemon, port
    node.fleet.end(daemon)
    node.fleet.children.remove(daemon)
    assert not segments(daemon.name)


def spoil(node, daemon, weights, number):
    """A push that is refused or aborted, or that one engine breaks: each in its turn."""
    match number // 10 % 4:
        case 0:  # before anything
            with pytest.raises(PushRefused, match="is not above version"):
                push_weights(weights, version=1, daemon=daemon.endpoint, timeout=20)
        case 1:  # when the engines look at it
            odd = {**weights, "model.normal.weight": torch.zeros(4)}
            with pytest.raises(PushRefused, match=r"model\.normal\.weight"):
                push_weights(odd, version=node.next_version(), daemon=daemon.endpoint, timeout=20)
        case 2:  # in the middle, on both
            for engine in node.engines:
                node.order(engine, fail={"endpoint": "/load", "after": 3})
            with pytest.raises(PushAborted, match="torn and paused: e1, e2"):
                push_weights(weights, version=node.next_version(), daemon=daemon.endpoint, timeout=20)
        case 3:  # in the middle, on one
            node.order(node.engines[1], fail={"endpoint": "/load", "after": 5})
            report = push_weights(weights, version=node.next_version(), daemon=daemon.endpoint, timeout=20)
            assert not report.complete


def test_nothing_grows(node, busy):
    daemon, port = busy
    weights = Weights({name: tensor.clone() for name, tensor in node.weights("C").items()})
    bridges = [psutil.Process(b.pid) for b in fetch_status(daemon.endpoint).bridges]
    processes = {
        "daemon": [psutil.Process(daemon.pid)],
        "bridge": bridges,
        "e1": engine_processes(node.engines[0]),
        "e2": engine_processes(node.engines[1]),
        "trainer": [psutil.Process(os.getpid())],
    }
    before: dict[str, list[Use]] = {}
    arenas = shm(daemon.name)
    for number in range(1, PUSHES + 1):
        weights.change(number)
        if number % 10 == 0:
            spoil(node, daemon, weights.tensors, number)
        else:
            report = push_weights(weights.tensors, version=node.next_version(), daemon=daemon.endpoint, timeout=20)
            assert report.complete, str(report)
            assert {e.checked for e in report.engines} == {len(weights.tensors)}
        if number == WARM:
            before = {name: [Use.of(p) for p in some] for name, some in processes.items()}
            arenas = shm(daemon.name)
    after = {name: [Use.of(p) for p in some] for name, some in processes.items()}

    grown = []
    for name, some in before.items():
        for was, now in zip(some, after[name], strict=True):
            if now.rss > was.rss + RSS or now.fds > was.fds + FDS or now.threads > was.threads + THREADS:
                grown.append(f"{name}: {was} → {now}")
    assert not grown, "\n".join(grown)
    assert shm(daemon.name) == arenas, "/dev/shm"
    status = fetch_status(daemon.endpoint)
    assert [b.pid for b in status.bridges] == [b.pid for b in bridges], "no bridge had to be replaced"
    assert [b.outstanding for b in status.bridges] == [0]

    readers = {"e1/0", "e2/0", "e2/1"}

    def balanced():  # gauges lag behind: those of the last pushes are waited for
        shown = gauges(port)
        counted = all(shown.get(("weightsync_exports", r), 0) > 8 * (PUSHES - PUSHES // 10) for r in readers)
        return counted and all(shown["weightsync_exports_outstanding", r] == 0 for r in readers)

    until(balanced, "every export was counted, and closed or revoked")
    assert gauges(port)["weightsync_exports_leaked", ""] == 0
