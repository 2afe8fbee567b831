"""Where arenas lie, by config, environment and what the machine has."""

from __future__ import annotations

import logging

import pytest

from tests.nvidia_smi import GPUS, FakeNvidiaSmi
from weightsync.config import parse_node_config
from weightsync.errors import ConfigError
from weightsync.gpus import Gpu
from weightsync.placement import placed

GIB = 2**30


@pytest.fixture
def smi(tmp_path, monkeypatch):
    return FakeNvidiaSmi(tmp_path).install(monkeypatch)


def place(text: str = "", *, visible: str | None = None):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    config = placed(parse_node_config(text), environment)
    return config.arena.device, config.node.bridges, config.node.gpus, config.arena.slot_bytes


def test_a_bridge_for_each_gpu_there_is(smi):
    assert place() == ("cuda", 2, GPUS, 2 * GIB)
    assert len(smi.calls) == 1
    assert place(visible="1,0") == ("cuda", 2, GPUS[::-1], 2 * GIB)
    assert place(visible="1") == ("cuda", 1, GPUS[1:], 2 * GIB)
    assert place(f'[node]\ngpus = ["GPU-{GPUS[1]}"]') == ("cuda", 1, GPUS[1:], 2 * GIB)
    assert place("[node]\nbridges = 2") == ("cuda", 2, GPUS, 2 * GIB)


def test_host_memory_where_there_is_none_or_none_is_wanted(smi, monkeypatch, tmp_path):
    assert place('[node]\nbridges = 3\n[arena]\ndevice = "cpu"') == ("cpu", 3, (), 128 * 2**20)
    assert smi.calls == []
    assert place(visible="") == ("cpu", 1, (), 128 * 2**20)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert place('[arena]\nslot_bytes = "1MiB"') == ("cpu", 1, (), 2**20)
    with pytest.raises(ConfigError, match="sees no GPU"):
        place('[arena]\ndevice = "cuda"')


def test_gpus_that_are_given_are_not_asked_for(smi):
    assert placed(parse_node_config(""), {}, [Gpu("aa", 100 * GIB, mig=False)]).node.gpus == ("aa",)
    assert placed(parse_node_config(""), {}, []).arena.device == "cpu"
    assert smi.calls == []


@pytest.mark.parametrize(
    ("free", "slots", "slot_bytes"),
    [
        (140 * GIB, 3, 2 * GIB),  # 6 GiB are less than 7
        (140 * GIB, 4, GIB),
        (40 * GIB, 3, GIB // 2),
        (GIB, 3, 64 * 2**20),  # no smaller, even if that is a larger share
        (None, 3, 64 * 2**20),
    ],
)
def test_slots_are_a_twentieth_of_the_least_that_is_free(free, slots, slot_bytes):
    gpus = [Gpu("aa", 1000 * GIB, mig=False), Gpu("bb", free, mig=False)]
    if free is None:
        gpus = gpus[1:]
    config = parse_node_config(f"[arena]\nslots = {slots}")
    assert placed(config, {}, gpus).arena.slot_bytes == slot_bytes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[node]\ngpus = ["GPU-none"]', "does not see GPU none"),
        (f'[node]\ngpus = ["{GPUS[0]}", "GPU-{GPUS[0]}"]', "names a GPU twice"),
        ("[node]\nbridges = 1", "one for each, 2 here"),
    ],
)
def test_what_cannot_be(smi, text, says):
    with pytest.raises(ConfigError, match=says):
        place(text)


def test_instances_are_refused(smi):
    with pytest.raises(ConfigError, match="MIG-x: memory cannot be shared"):
        place(visible="MIG-x")


def test_a_driver_that_fails_is_told(smi, caplog):
    smi.says("Failed to initialize NVML: Driver/library version mismatch\n")
    smi.status(18)
    with caplog.at_level(logging.WARNING, logger="weightsync.placement"):
        assert place()[0] == "cpu"
    assert "Driver/library version mismatch" in caplog.text
    for text in ('[arena]\ndevice = "cuda"', f'[node]\ngpus = ["{GPUS[0]}"]'):
        with pytest.raises(ConfigError, match="version mismatch"):
            place(text)


@pytest.mark.parametrize("key", ['listen = "tcp://127.0.0.1:29600"', 'peers = {n1 = "tcp://127.0.0.1:29601"}'])
def test_nodes_of_a_cluster_have_their_slots_on_gpus_too(smi, key):
    """Whichever of them coordinates: bytes go between nodes by NCCL then, or by gloo."""
    assert place(f"[cluster]\n{key}")[0] == "cuda"
    assert place(f'[cluster]\n{key}\n[arena]\ndevice = "cpu"')[0] == "cpu"
