"""What a machine has of GPUs, and what a process sees of them."""

from __future__ import annotations

import subprocess

import pytest

from tests.nvidia_smi import FREE, GPUS, FakeNvidiaSmi
from weightsync.errors import ConfigError
from weightsync.gpus import Gpu, all_gpus, driver_cuda, peer_states, seen_by, survey

THREE = ["aa11", "aa22", "bb33"]


@pytest.fixture
def smi(tmp_path, monkeypatch):
    return FakeNvidiaSmi(tmp_path).install(monkeypatch)


@pytest.mark.parametrize(
    ("wanted", "seen"),
    [
        (None, THREE),
        ("", []),
        ("2,0", ["bb33", "aa11"]),
        ("GPU-bb33", ["bb33"]),
        ("GPU-bb,1", ["bb33", "aa22"]),
        ("0,7,1", ["aa11"]),
        ("GPU-aa", []),
        ("-1", []),
    ],
)
def test_by_cudas_rules(wanted, seen):
    environment = {} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted}
    assert seen_by(environment, THREE) == seen


def test_instances_of_a_gpu_are_refused():
    with pytest.raises(ConfigError, match="MIG-1"):
        seen_by({"CUDA_VISIBLE_DEVICES": "MIG-1"}, THREE)


def test_one_call_tells_all_of_each(smi):
    assert survey() == [Gpu(gpu, FREE * 2**20, mig=False) for gpu in GPUS]
    assert len(smi.calls) == 1
    assert all_gpus() == list(GPUS)


def test_what_the_driver_does_not_say(smi):
    smi.gpus(("aa", "[N/A]", "[N/A]"), ("bb", "[Insufficient Permissions]", "Enabled"))
    assert survey() == [Gpu("aa", None, mig=False), Gpu("bb", None, mig=True)]


def test_no_gpus(smi, monkeypatch, tmp_path):
    smi.says("No devices were found\n")
    for status in (0, 6):
        smi.status(status)
        assert survey() == []
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert survey() == []


def test_a_driver_that_does_not_answer_is_no_machine_without_gpus(smi, monkeypatch):
    smi.says("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n\n")
    smi.status(9)
    with pytest.raises(ConfigError, match=r"status 9: .*couldn't communicate with the NVIDIA driver"):
        survey()

    def late(command, **kwargs):
        raise subprocess.TimeoutExpired(command, kwargs["timeout"])

    monkeypatch.setattr(subprocess, "run", late)
    with pytest.raises(ConfigError, match="timed out after 10 seconds"):
        all_gpus()


@pytest.mark.parametrize("name", ["CUDA Version        ", "CUDA UMD version    "])  # before and from driver 610 on
def test_the_cuda_of_the_driver(smi, name):
    smi.cuda("12.8", name=name)
    assert driver_cuda() == (12, 8)
    smi.cuda("Not Found", name=name)
    with pytest.raises(ConfigError, match="names no CUDA version"):
        driver_cuda()


def test_who_reaches_whom(smi):
    assert peer_states() == {(0, 1): "OK", (1, 0): "OK"}
    smi.peers("X OK GNS", "OK X CNS", "GNS OK X")
    assert {pair for pair, state in peer_states().items() if state != "OK"} == {(0, 2), (1, 2), (2, 0)}
    smi.peers("X")
    assert peer_states() == {}


def test_underlined_heads_are_read_too(smi, tmp_path):
    (tmp_path / "peers").write_text("\t\x1b[4mGPU0\tGPU1\x1b[0m\nGPU0\t X \tTNS\nGPU1\tTNS\t X \n")
    assert peer_states() == {(0, 1): "TNS", (1, 0): "TNS"}
