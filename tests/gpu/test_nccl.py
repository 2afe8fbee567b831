"""NCCL between nodes, each a daemon with GPUs of its own: the communicator, the conformance suite, whole pushes, and
what becomes of them when somebody dies or stands still.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from tests.gpu.test_cuda_ipc import gpu_arena, write
from tests.gpu.test_push import MODELS, gpu_users
from weightsync import push_weights
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.adapters.reference.oracle import expected_checksums
from weightsync.config import EngineConfig
from weightsync.device.buckets import copied
from weightsync.errors import ConfigError, TransportBroken, TransportClosed, TransportTimeout, WeightSyncError
from weightsync.fleet import Daemon, Engine, Fleet
from weightsync.nccl_bridge.nccl import NcclCommunicator
from weightsync.nccl_bridge.rendezvous import Rendezvous
from weightsync.operator import change_engines, fetch_status
from weightsync.testing import check_transport, eventually, transport_checks
from weightsync.transports.nccl import NcclReceiver, NcclSender, Piece

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightsync.transports.base import Lease

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL joins different GPUs: two are needed"),
]


def _soon(seconds: float = 30) -> float:
    return time.monotonic() + seconds


def _both(world: int, work: Any) -> list[Any]:
    with ThreadPoolExecutor(world) as pool:
        return [future.result() for future in [pool.submit(work, rank) for rank in range(world)]]


@contextmanager
def joined(world: int = 2) -> Iterator[list[NcclCommunicator]]:
    """Members in this process, each on a GPU."""
    hosted = Rendezvous.host("127.0.0.1", deadline=_soon())
    members = [
        NcclCommunicator(generation=5, rank=rank, world=world, address="127.0.0.1", device=rank)
        for rank in range(world)
    ]

    def join(rank: int) -> None:
        meeting = hosted if rank == 0 else Rendezvous.connect("127.0.0.1", hosted.port, deadline=_soon())
        members[rank].join(meeting, "key", deadline=_soon(60))

    _both(world, join)
    try:
        yield members
    finally:
        for member in members:
            member.close(deadline=_soon(5))


def filled(value: int, device: int, nbytes: int = 100_001) -> torch.Tensor:
    return torch.full((nbytes,), value, dtype=torch.uint8, device=f"cuda:{device}")


def piece(root: int, tensor: torch.Tensor, first: int = 0, nbytes: int | None = None) -> Piece:
    return Piece(root, tensor.data_ptr() + first, len(tensor) - first if nbytes is None else nbytes)


# --- the communicator -------------------------------------------------------------------------------------------------


def test_a_broadcast_from_either_root():
    with joined() as members:
        for root in (0, 1):
            data = [filled(10 + rank, rank) for rank in (0, 1)]
            torch.cuda.synchronize(0)
            torch.cuda.synchronize(1)

            def take(rank: int, root: int = root, data: list[torch.Tensor] = data) -> None:
                members[rank].broadcast([piece(root, data[rank])], root, deadline=_soon())

            _both(2, take)
            assert all(bool((tensor == 10 + root).all()) for tensor in data)


def test_many_pieces_of_both_at_once():
    """As in an exchange: every other run of bytes is the other's; more runs than are launched together."""
    with joined() as members:
        data = [filled(10 + rank, rank, 64 * 2000) for rank in (0, 1)]
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        parts = [[piece(run % 2, data[rank], 64 * run, 64) for run in range(2000)] for rank in (0, 1)]
        _both(2, lambda rank: members[rank].broadcast(parts[rank], 77, deadline=_soon()))
        wanted = torch.tensor([10, 11], dtype=torch.uint8).repeat_interleave(64).repeat(1000)
        assert all(bool((tensor.cpu() == wanted).all()) for tensor in data)


def test_members_in_different_broadcasts_find_it_out():
    with joined() as members:
        data = [filled(rank, rank) for rank in (0, 1)]

        def take(rank: int) -> str:
            try:
                members[rank].broadcast([piece(0, data[rank])], token=100 + rank, deadline=_soon())
            except TransportBroken as error:
                return error.message
            return ""

        told = _both(2, take)
        assert told[0] == ""
        assert "rank 0 is in another one" in told[1]
        with pytest.raises(TransportBroken, match="is broken since"):
            members[1].broadcast([piece(0, data[1])], 1, deadline=_soon())


@pytest.mark.parametrize("way", ["deadline", "abort"])
def test_a_peer_that_takes_no_part_is_not_waited_for(way):
    """Its kernel spins on the GPU until the communicator is aborted; then nothing of it is left there."""
    with joined() as members:
        data = filled(1, 0, 2**26)
        start = time.monotonic()
        if way == "abort":
            threading.Timer(0.5, members[0].abort).start()
        with pytest.raises(TransportClosed if way == "abort" else TransportTimeout):
            members[0].broadcast([piece(0, data)], 1, deadline=_soon(0.5 if way == "deadline" else 30))
        assert time.monotonic() - start < 3
        torch.cuda.synchronize(0)


def test_joining_alone_ends_at_its_deadline():
    hosted = Rendezvous.host("127.0.0.1", deadline=_soon())
    member = NcclCommunicator(generation=6, rank=0, world=2, address="127.0.0.1")
    start = time.monotonic()
    with pytest.raises(TransportTimeout, match="joining generation 6 as rank 0 of 2"):
        member.join(hosted, "key", deadline=_soon(2))
    assert time.monotonic() - start < 5
    member.close(deadline=_soon(5))


def test_other_settings_are_refused_with_both_values(monkeypatch):
    hosted = Rendezvous.host("127.0.0.1", deadline=_soon())
    one, other = (
        NcclCommunicator(generation=7, rank=rank, world=2, address="127.0.0.1", device=rank) for rank in (0, 1)
    )

    def wait() -> None:
        with pytest.raises(TransportClosed):
            one.join(hosted, "k", deadline=_soon())

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert eventually(lambda: hosted.store("k", 7).check(["settings"]))
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "0")
    meeting = Rendezvous.connect("127.0.0.1", hosted.port, deadline=_soon())
    with pytest.raises(ConfigError, match="NCCL_CUMEM_ENABLE is 0 here, unset at rank 0"):
        other.join(meeting, "k", deadline=_soon())
    one.abort()
    waiting.join(20)
    assert not waiting.is_alive()
    one.close(deadline=_soon(5))


# --- the transport ----------------------------------------------------------------------------------------------------


class Pair:
    def __init__(self, members: list[NcclCommunicator], places: list[Any]) -> None:
        self._places = places
        self.readers = [f"node-{rank}/0" for rank in range(1, len(members))]
        (arena, slots), *others = places
        self.sender = NcclSender(members[0], arena, slots)
        self.receivers = [
            NcclReceiver(member, theirs, memory, name)
            for member, (theirs, memory), name in zip(members[1:], others, self.readers, strict=True)
        ]

    def fill(self, slot: int, data: bytes) -> None:
        write(self._places[0][1].slot(slot), data)

    def read(self, lease: Lease) -> bytes:
        for number, (_, memory) in enumerate(self._places[1:], start=1):
            if lease.address in range(memory.slot(0), memory.slot(memory._slots - 1) + 1):
                return copied(lease.address, lease.nbytes, torch.device("cuda", number)).cpu().numpy().tobytes()
        raise AssertionError("the lease lies nowhere")


@contextmanager
def pairs(readers: int, slots: int, slot_bytes: int) -> Iterator[Pair]:
    if readers + 1 > torch.cuda.device_count():
        pytest.skip(f"{readers} readers and a sender need {readers + 1} GPUs")
    with ExitStack() as stack:
        places = [stack.enter_context(gpu_arena(slots, slot_bytes, rank)) for rank in range(readers + 1)]
        pair = Pair(stack.enter_context(joined(readers + 1)), places)
        try:
            yield pair
        finally:
            pair.sender.close()
            for receiver in pair.receivers:
                receiver.close()


@pytest.mark.parametrize("check", transport_checks())
def test_conformance(check):
    with joined(min(3, torch.cuda.device_count())):  # what NCCL and a GPU's first use keep open for good is no leak
        pass
    check_transport(pairs, only=check)


# --- nodes ------------------------------------------------------------------------------------------------------------


class Nodes:
    """Two daemons of one GPU each, the first of which has the other for a peer; an engine on each."""

    def __init__(self, fleet: Fleet, *, trial: str = "", **env: str) -> None:
        self.fleet = fleet
        self.versions = itertools.count(1)
        for seed, name in enumerate("AB"):
            random_checkpoint(MODELS["moe"], fleet.root / name, seed)
        self.engines: list[Engine] = []
        self.daemons: list[Daemon] = []
        uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(2)]
        for number in (1, 0):
            flags = ["--trial", trial] if trial and number == 1 else []
            engine = fleet.start_engine(
                f"e{number}",
                fleet.root / "A",
                tp=2,
                device="cuda",
                flags=flags,
                env={"CUDA_VISIBLE_DEVICES": str(number)},
            )
            name = f"n{number}{secrets.token_hex(2)}"
            daemon = fleet.start_daemon(
                name,
                [engine],
                peers=self.daemons,
                node={"gpus": [uuids[number]]},
                arena={"slots": 2, "slot_bytes": "128KiB"},
                timeouts={"operation": 6.0, "liveness": 2.0},
                log={"level": "debug"},
                env={name: value or name_of(number) for name, value in env.items()},
            )
            self.engines.insert(0, engine)
            self.daemons.insert(0, daemon)
        self.push("A")

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(f"{self.fleet.root}/{name}/model.safetensors")

    def push(self, name: str, **options: Any) -> Any:
        weights = {key: tensor.cuda(0) for key, tensor in self.weights(name).items()}
        self.version = next(self.versions)
        return push_weights(
            weights, version=self.version, daemon=self.daemons[0].endpoint, **{"timeout": 60, **options}
        )

    def assert_hold(self, name: str, engines: list[Engine] | None = None) -> None:
        for engine in self.engines if engines is None else engines:
            found = httpx.get(f"{engine.url}/checksums", trust_env=False, timeout=30).raise_for_status().json()
            assert found == expected_checksums(MODELS["moe"], self.weights(name), engine.tp), engine.name
            info = httpx.get(f"{engine.url}/info", trust_env=False, timeout=30).raise_for_status().json()
            assert (info["weight_version"], info["paused"], info["torn"]) == (self.version, False, False)

    def bridge(self, number: int) -> int:
        pid = fetch_status(self.daemons[number].endpoint).bridges[0].pid
        assert pid is not None
        return pid

    def logs(self) -> str:
        return "\n".join(daemon.tail(40) for daemon in self.daemons)


def name_of(number: int) -> str:
    return f"host{number}"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with Fleet() as fleet:
        yield Nodes(fleet, trial=json.dumps({"slow": 0.02}))


def test_one_push_reaches_the_engines_of_both_nodes(nodes):
    for name in "BAB":
        report = nodes.push(name)
        assert report.complete, f"{report}\n{nodes.logs()}"
        nodes.assert_hold(name)


def test_no_bytes_are_left_on_a_gpu_by_pushes_between_nodes(nodes):
    for _ in range(2):
        assert nodes.push("A").complete
    before = gpu_users()
    for _ in range(10):
        assert nodes.push("B").complete
    assert gpu_users() == before
    for daemon in nodes.daemons:
        assert sum(bridge.outstanding for bridge in fetch_status(daemon.endpoint).bridges) == 0


def test_ranks_of_one_trainer_on_both_nodes(nodes, tmp_path):
    """Each has half of every layer; the bridges exchange them."""
    first, nodes.version = next(nodes.versions), next(nodes.versions)
    where = ",".join(daemon.endpoint for daemon in nodes.daemons)
    arguments = [str(nodes.fleet.root / "A"), where, str(first), str(tmp_path), "2", "", "default"]
    trainer = nodes.fleet.torchrun("spread", Path(__file__).with_name("fsdp2_push.py"), 2, arguments)
    assert trainer.wait(120) == 0, f"{trainer.tail(60)}\n{nodes.logs()}"
    told = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1)]
    assert told[0] == told[1], "every rank gets the same report"
    assert [report["complete"] for report in told[0]] == [True, True], told[0]
    assert "exchange.complete" in nodes.daemons[0].log.read_text()
    nodes.assert_hold("A")


@pytest.mark.parametrize("by", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("whose", ["home", "away"])
def test_a_bridge_that_ends_or_stands_still_in_a_push(nodes, whose, by):
    """The push ends before its deadline and says who it was; survivors go on; the next push works."""
    daemon = nodes.daemons[0 if whose == "home" else 1]
    victim = nodes.bridge(nodes.daemons.index(daemon))
    with ThreadPoolExecutor(1) as pool:
        pushing = pool.submit(nodes.push, "B", timeout=20)

        def under_way() -> bool:
            push = fetch_status(nodes.daemons[0].endpoint).push
            return push is not None and push.filled_bytes > push.nbytes // 10

        assert eventually(under_way, seconds=20)
        start = time.monotonic()
        os.kill(victim, getattr(signal, by))
        error = pushing.exception(30)
        if error is not None:
            assert isinstance(error, WeightSyncError)
            assert daemon.name in str(error), f"{error}\n{nodes.logs()}"
        else:  # it went on without the engine behind that bridge, or was over already
            outcomes = {engine.node: engine.outcome for engine in pushing.result().engines}
            assert [outcome for node, outcome in outcomes.items() if node != daemon.name] == ["committed"], outcomes
        assert time.monotonic() - start < 22
    assert eventually(lambda: not Path(f"/proc/{victim}").exists(), seconds=20), "it was not replaced"
    assert eventually(lambda: fetch_status(daemon.endpoint).bridges[0].pid is not None, seconds=20)

    def again() -> bool:
        try:
            return bool(nodes.push("A").complete)
        except WeightSyncError:
            return False

    assert eventually(again, seconds=60), nodes.logs()
    nodes.assert_hold("A")


def delivered(report):
    return [engine.drawn for engine in report.engines]


def test_weights_go_straight_into_the_engine_of_the_other_node(nodes):
    for name in "BAB":
        report = nodes.push(name, in_place=True)
        assert report.complete, f"{report}\n{nodes.logs()}"
        assert delivered(report) == [True, True], nodes.logs()
        nodes.assert_hold(name)


def test_several_engines_of_the_other_node_share_what_travels(nodes):
    other = nodes.fleet.start_engine("e2", nodes.fleet.root / "A", device="cuda", env={"CUDA_VISIBLE_DEVICES": "1"})
    change_engines(nodes.daemons[1].endpoint, add=[EngineConfig(name="e2", kind="reference", url=other.url)])
    home = nodes.daemons[0].endpoint
    assert eventually(lambda: "e2" in {engine.name for engine in fetch_status(home).engines})
    try:
        for name in "BAB":
            report = nodes.push(name, in_place=True)
            assert delivered(report) == [True, True, True], f"{report}\n{nodes.logs()}"
            nodes.assert_hold(name, [*nodes.engines, other])
    finally:
        change_engines(nodes.daemons[1].endpoint, remove=["e2"])
        nodes.fleet.end(other)
    assert eventually(lambda: "e2" not in {engine.name for engine in fetch_status(home).engines})


def test_no_bytes_are_left_on_a_gpu_by_deliveries(nodes):
    weights = {key: tensor.cuda(0) for key, tensor in nodes.weights("A").items()}
    for times in (3, 10):
        for _ in range(times):
            nodes.version = next(nodes.versions)
            options = {"version": nodes.version, "daemon": nodes.daemons[0].endpoint, "timeout": 60}
            assert delivered(push_weights(weights, in_place=True, **options)) == [True, True]
        if times == 3:
            before = gpu_users()
    assert gpu_users() == before


@pytest.mark.parametrize("by", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("whose", ["home", "away"])
def test_a_bridge_that_ends_or_stands_still_in_a_delivery(nodes, whose, by):
    """The engine elsewhere is given buckets, or misses the push; nothing is written into it later."""
    assert delivered(nodes.push("A", in_place=True)) == [True, True], nodes.logs()
    held, victim = nodes.bridge(1), nodes.bridge(0 if whose == "home" else 1)
    os.kill(held, signal.SIGSTOP)  # so that the delivery does not end meanwhile
    with ThreadPoolExecutor(1) as pool:
        pushing = pool.submit(nodes.push, "B", timeout=20, in_place=True)

        def delivering() -> bool:
            push = fetch_status(nodes.daemons[0].endpoint).push
            return push is not None and "(deliver)" in push.waiting_for

        assert eventually(delivering, seconds=15), nodes.logs()
        os.kill(victim, getattr(signal, by))
        if victim != held:
            os.kill(held, signal.SIGCONT)
        error = pushing.exception(30)
    name = nodes.daemons[0 if whose == "home" else 1].name
    if error is not None:
        assert isinstance(error, WeightSyncError)
        assert name in str(error), f"{error}\n{nodes.logs()}"
    else:
        outcomes = {engine.node: engine.outcome for engine in pushing.result().engines}
        assert outcomes.pop(nodes.daemons[0].name) == "committed", nodes.logs()
    assert eventually(lambda: not Path(f"/proc/{victim}").exists(), seconds=20), "it was not replaced"

    def again() -> bool:
        try:
            return bool(nodes.push("A", in_place=True).complete)
        except WeightSyncError:
            return False

    assert eventually(again, seconds=60), nodes.logs()
    nodes.assert_hold("A")


def test_a_trainer_with_collectives_of_its_own_is_not_disturbed(nodes, tmp_path):
    """Its NCCL works on the same GPUs all the while: no deadlock, and both go on."""
    first, nodes.version = next(nodes.versions), max(next(nodes.versions) for _ in range(29))
    where = ",".join(daemon.endpoint for daemon in nodes.daemons)
    arguments = [str(nodes.fleet.root / "B"), where, str(first), str(tmp_path), "30", "busy", "default"]
    trainer = nodes.fleet.torchrun("busy", Path(__file__).with_name("fsdp2_push.py"), 2, arguments)
    assert trainer.wait(150) == 0, f"{trainer.tail(60)}\n{nodes.logs()}"
    told = json.loads((tmp_path / "rank0.json").read_text())
    assert [report["complete"] for report in told] == [True] * 30
    assert all(report["collectives"] > 0 for report in told), "the trainer's own work stood still"
    nodes.assert_hold("B")


def test_over_sockets_alone(tmp_path):
    """As between hosts: two host ids, and neither NVLink nor shared memory."""
    log = tmp_path / "nccl.log"
    env = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(log)}
    with Fleet() as fleet:
        nodes = Nodes(fleet, NCCL_HOSTID="", **env)
        report = nodes.push("B")
        assert report.complete, f"{report}\n{nodes.logs()}"
        nodes.assert_hold("B")
        assert "via NET/Socket" in log.read_text(), "it took another way"
