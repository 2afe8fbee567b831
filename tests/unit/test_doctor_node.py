"""What the doctor finds out about a node before weightsyncd is started on it."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.nvidia_smi import GPUS, FakeNvidiaSmi
from weightsync.config import parse_node_config
from weightsync.doctor import packages
from weightsync.doctor.node import examine_node, room
from weightsync.doctor.packages import Cupy, Torch
from weightsync.doctor.sizes import size
from weightsync.ipc.arena import Arena, DeviceMemory
from weightsync.transports.torch_cuda import Counters

NODE = "doctored"  # no other test's: arenas that it has in /dev/shm count as its own
ON_CPU = '[arena]\ndevice = "cpu"\n'


@pytest.fixture
def smi(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "installed_cupys", lambda: [Cupy("cupy-cuda13x", "14.0.1", 13)])
    monkeypatch.setattr(packages, "installed_torch", lambda: Torch("2.11.0+cu130", (13, 0)))
    return FakeNvidiaSmi(tmp_path).install(monkeypatch)


def look(text: str = "", **environment: str):
    return examine_node(parse_node_config(text, changes=[f"node.name={NODE}"]), environment)


def only(found, level: str):
    (finding,) = [f for f in found if f.level == level]
    return finding


def test_a_healthy_node_of_two_gpus(smi):
    node, found = look()
    assert node.on_gpus
    assert [f.level for f in found] == ["ok"] * 6
    first, second, peers, links, cupy, files = (f.what for f in found)
    assert first == f"slots lie on GPU {GPUS[0]}: 3 × 2 GiB take 6 GiB of 139.5 GiB free"
    assert GPUS[1] in second
    assert peers == "the 2 GPUs here reach each other's memory"
    assert links == "the 2 GPUs are linked by NV18"
    assert cupy == "cupy-cuda13x 14.0.1 beside torch for CUDA 13.0; the driver runs CUDA up to 13.0"
    assert files.startswith("fences and reference counters need 512 KiB of /dev/shm")
    assert len(smi.calls) == 4


def test_host_memory_asks_little(smi):
    node, found = look(ON_CPU)
    assert not node.on_gpus
    assert "1 × 3 slots of 128 MiB, in host memory" in only(found, "ok").what
    assert len(smi.calls) == 1


def test_no_room_on_a_gpu(smi):
    smi.gpus((GPUS[0], "142841", "Disabled"), (GPUS[1], "900", "Disabled"))
    _, found = look('[arena]\nslot_bytes = "256MiB"')
    bad = only(found, "fail")
    assert GPUS[1] in bad.what
    assert "3 × 256 MiB take 768 MiB and a CUDA context 512 MiB, and 900 MiB are free" in bad.what
    assert "arena.slot_bytes" in bad.fix


def test_what_reads_slots_for_late_engines_takes_room_on_the_last_gpu(smi):
    text = '[node]\nretain = "host"\n[arena]\nslot_bytes = "256MiB"\n[[engines]]\nname = "e"\nkind = "reference"\n'
    text += 'url = "http://127.0.0.1:1"'
    smi.gpus((GPUS[0], "142841", "Disabled"), (GPUS[1], "1900", "Disabled"))
    _, found = look(text)
    bad = only(found, "fail").what
    assert bad.startswith(f"slots lie on GPU {GPUS[1]}")
    assert "take 768 MiB, and reading them for late engines (node.retain) 768 MiB and a CUDA context" in bad
    assert any(f.what.startswith(f"slots lie on GPU {GPUS[0]}") and "retain" not in f.what for f in found)


def test_arenas_of_a_running_weightsyncd_are_not_counted_twice(smi, tmp_path):
    smi.gpus((GPUS[0], "900", "Disabled"))
    text = f'[node]\nshm_dir = "{tmp_path}"\n[arena]\nslot_bytes = "256MiB"'
    memory = DeviceMemory(gpu=GPUS[0], handle=bytes(64))
    with Arena.create(
        node=NODE,
        bridge=0,
        incarnation="0" * 16,
        slots=3,
        slot_bytes=2**28,
        directory=str(tmp_path),
        memory=memory,
    ) as arena:
        _, found = look(text)
        arena.unlink()
    assert any("runs and has them" in f.what for f in found if f.level == "ok")
    assert only(look(text)[1], "fail").what.startswith(f"slots lie on GPU {GPUS[0]}")


def test_memory_that_the_driver_does_not_tell(smi):
    smi.gpus((GPUS[0], "[N/A]", "Disabled"))
    assert "cannot be told" in only(look()[1], "warn").what


def test_instances(smi):
    smi.gpus((GPUS[0], "142841", "Disabled"), (GPUS[1], "142841", "Enabled"))
    bad = only(look()[1], "fail")
    assert f"GPU {GPUS[1]} is in MIG mode" in bad.what
    assert f"nvidia-smi -i GPU-{GPUS[1]} -mig 0" in bad.fix
    assert all(f.level == "ok" for f in look(f'[node]\ngpus = ["{GPUS[0]}"]')[1])
    assert "MIG-7" in only(look(CUDA_VISIBLE_DEVICES="MIG-7", text=f'[node]\ngpus = ["{GPUS[0]}"]')[1], "fail").what


def test_gpus_apart(smi):
    smi.gpus(*((name, "142841", "Disabled") for name in ("aa", "bb", "cc")))
    smi.peers("X OK GNS", "OK X GNS", "OK GNS X")
    apart = only(look()[1], "warn")
    assert "GNS (this kind of GPU cannot): aa and cc; bb and cc." in apart.what
    assert "node.gpus" in apart.fix
    smi.peers("X OK CNS", "OK X TNS", "CNS TNS X")
    assert [f.what.partition(":")[2].partition(".")[0] for f in look()[1] if f.level == "warn"] == [
        " aa and cc",
        " bb and cc",
    ]
    assert only(look('[node]\ngpus = ["aa"]')[1], "warn").what.count("aa and cc") == 1  # an engine may work there
    smi.gpus(("aa", "142841", "Disabled"))
    before = len(smi.calls)
    assert "ok" in {f.level for f in look()[1]}
    assert not any("topo" in call for call in smi.calls[before:])


def test_links_between_gpus(smi):
    smi.gpus(*((name, "142841", "Disabled") for name in ("aa", "bb", "cc")))
    smi.peers("X OK OK", "OK X OK", "OK OK X")
    smi.links("X NV18 SYS", "NV18 X SYS", "SYS SYS X")
    apart = only(look()[1], "warn")
    assert "some are not: GPU0-GPU2, GPU1-GPU2 SYS." in apart.what
    assert "nvidia-smi nvlink --status" in apart.fix
    smi.links("X PHB SYS", "PHB X SYS", "SYS SYS X")  # a machine without NVLink is as it was bought
    assert any(f.what == "the 3 GPUs are linked by PHB, SYS" for f in look()[1] if f.level == "ok")


def test_a_driver_that_fails(smi):
    smi.says("Failed to initialize NVML: Driver/library version mismatch")
    smi.status(18)
    node, found = look()
    assert not node.on_gpus
    assert "version mismatch" in only(found, "warn").what
    _, found = look('[arena]\ndevice = "cuda"')
    assert "sees no GPU" in only(found, "fail").what
    assert sum("fails with status 18" in f.what for f in found) == 2  # asked for its GPUs, and for its CUDA version


def test_gpus_that_are_not_there(smi):
    node, found = look('[node]\ngpus = ["GPU-none"]')
    assert node.on_gpus
    assert "does not see GPU none" in only(found, "fail").what


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_are_no_harm(smi, name):
    _, found = look(**{name: "max_split_size_mb:64, expandable_segments: True"})
    assert "may stay" in next(f.what for f in found if name in f.what)
    assert {f.level for f in found} == {"ok"}
    assert not any(name in f.what for f in look(**{name: "max_split_size_mb:64"})[1])


@pytest.mark.parametrize("slots", [1, 3, 40])
@pytest.mark.parametrize("on_gpus", [False, True])
def test_files_are_as_large_as_is_said(tmp_path, slots, on_gpus, monkeypatch):
    """What is said to be needed is what an arena and its counters allocate, to the rounding."""
    config = look(f'{ON_CPU}slots = {slots}\nslot_bytes = "1MiB"\n[node]\nshm_dir = "{tmp_path}"')[0].config
    memory = DeviceMemory(gpu="aa", handle=bytes(64)) if on_gpus else None
    with Arena.create(
        node="n",
        bridge=0,
        incarnation="0" * 16,
        slots=slots,
        slot_bytes=2**20,
        directory=str(tmp_path),
        memory=memory,
    ) as arena:
        (file,) = tmp_path.glob("weightsync-*")
        need = file.stat().st_size
        arena.unlink()
    if on_gpus:
        monkeypatch.setattr("weightsync.transports.torch_cuda.DIRECTORY", str(tmp_path))
        counters = Counters("counters")
        need += -(-(tmp_path / "counters").stat().st_size // 2**16) * 2**16
        counters.close()
        config = parse_node_config(f'[arena]\ndevice = "cuda"\nslots = {slots}\n[node]\nshm_dir = "{tmp_path}"')
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need))
    assert room(config).level == "warn"  # it is not /dev/shm
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    assert room(config).level == "fail"
    assert f"--shm-size={-(-need // 2**20)}m" in room(config).fix


def test_a_directory_that_is_not_there():
    _, found = look(f'{ON_CPU}[node]\nshm_dir = "/nowhere"')
    assert "node.shm_dir = /nowhere: No such file" in only(found, "fail").what
    assert os.path.isdir("/dev/shm")


def test_sizes():
    assert [size(n) for n in (512 * 2**10, 2**20, 3 * 2**29, 150 * 2**30)] == ["512 KiB", "1 MiB", "1.5 GiB", "150 GiB"]
