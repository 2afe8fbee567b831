"""Limits, namespaces and sockets of a machine, most of them made of files in a directory."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import msgspec
import pytest

from weightsync.config import parse_node_config
from weightsync.doctor import machine
from weightsync.doctor.cgroups import Limit, tightest
from weightsync.doctor.environments import examine_environment, installed, packages_of
from weightsync.doctor.machine import examine_machine, holder
from weightsync.wire.keys import make_key_file

if TYPE_CHECKING:
    from pathlib import Path

MEMORY = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
ON_CPU = '[arena]\ndevice = "cpu"\nslots = 3\nslot_bytes = "1GiB"\n[node]\nbridges = 1\n'


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A /proc and a cgroup file system, of a machine with 100 GiB free, and a private runtime directory."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "proc" / "self" / "ns").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {100 * 2**20} kB\n")
    (tmp_path / "proc" / "locks").write_text("")
    for kind, first in (("ipc", 4026531839), ("pid", 4026531836)):
        (tmp_path / "proc" / "self" / "ns" / kind).symlink_to(f"{kind}:[{first}]")
    write(tmp_path / "proc" / "self" / "cgroup", "0::/\n")
    (tmp_path / "cg").mkdir()
    return tmp_path


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def look(root: Path, text: str = ON_CPU):
    config = parse_node_config(text)
    config = msgspec.structs.replace(config, node=msgspec.structs.replace(config.node, shm_dir=str(root / "shm")))
    return examine_machine(config, root / "proc", root / "cg")


def about(found, words: str):
    (finding,) = [f for f in found if words in f.what]
    return finding


def test_a_machine_without_limits(root):
    found = look(root)
    assert {f.level for f in found} == {"ok"}
    assert (
        about(found, "memory").what == "100 GiB of memory are available; slots in host memory take up to 3 GiB of that"
    )


def test_the_limit_of_a_container(root):
    write(root / "cg" / "memory.max", 4 * 2**30)
    write(root / "cg" / "memory.current", 3 * 2**30)
    bad = about(look(root), "memory")
    assert bad.level == "fail"
    assert bad.what.startswith(f"1 GiB of memory are left of the limit of 4 GiB in {root}/cg/memory.max")
    assert "docker run --memory" in bad.fix
    write(root / "cg" / "memory.current", 2**30)
    assert about(look(root), "memory").level == "ok"


def test_what_the_kernel_keeps_of_files_is_not_in_the_way(root):
    """It gives that back to whoever needs the memory."""
    write(root / "cg" / "memory.max", 64 * 2**30)
    write(root / "cg" / "memory.current", 63 * 2**30)
    write(root / "cg" / "memory.stat", f"anon {2**30}\nfile {62 * 2**30}\ninactive_file {60 * 2**30}")
    well = about(look(root), "memory")
    assert well.level == "ok"
    assert well.what.startswith("61 GiB of memory are left of the limit of 64 GiB")


def test_slots_that_are_there_already_are_not_needed_twice(root):
    """Those of the weightsyncd that runs, which its successor replaces."""
    write(root / "cg" / "memory.max", 4 * 2**30)
    write(root / "cg" / "memory.current", 2 * 2**30)
    assert about(look(root), "memory").level == "fail"
    (root / "shm").mkdir()
    arena = root / "shm" / f"weightsync-{os.geteuid()}-node0-0-ab"
    with arena.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2**21)
    write(root / "cg" / "memory.current", 2**30 + 2**20)
    text = about(look(root), "memory")
    assert (text.level, text.what.partition(" of memory")[0]) == ("ok", "3 GiB")
    write(root / "cg" / "memory.current", 0)
    assert about(look(root), "memory").what.startswith("4 GiB")  # more than its limit it cannot have
    on_gpus = about(look(root, '[arena]\ndevice = "cuda"'), "memory").what
    assert on_gpus.startswith("4 GiB of memory are left")


def test_slots_on_gpus_take_no_host_memory_but_a_kept_copy_is_told_of(root):
    found = look(root, '[arena]\ndevice = "cuda"')
    assert about(found, "memory").what == "100 GiB of memory are available"
    found = look(root, f'{ON_CPU}retain = "host"')
    assert "the copy for late engines (node.retain) once the model, twice during a push" in about(found, "memory").what
    found = look(root, '[arena]\ndevice = "cuda"\n[node]\nretain = "host"')
    assert about(found, "memory").what.endswith("the copy for late engines (node.retain) twice the model")


def test_the_tightest_of_groups_around_a_process(root):
    write(root / "proc" / "self" / "cgroup", "0::/slurm/job/step")
    for group, limit in (("slurm", 900), ("slurm/job", 500), ("slurm/job/step", "max")):
        write(root / "cg" / group / "memory.max", limit)
        write(root / "cg" / group / "memory.current", 100)
    found = tightest(root / "proc", root / "cg", *MEMORY)
    assert found == Limit(500, 100, f"{root}/cg/slurm/job/memory.max")
    assert found.left == 400


def test_version_1_of_cgroups(root):
    write(root / "proc" / "self" / "cgroup", "9:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/")
    write(root / "cg" / "memory" / "memory.limit_in_bytes", 9223372036854771712)  # none
    write(root / "cg" / "memory" / "memory.usage_in_bytes", 5)
    assert tightest(root / "proc", root / "cg", *MEMORY) is None
    write(root / "cg" / "memory" / "memory.stat", "cache 4\ninactive_file 1\ntotal_cache 4\ntotal_inactive_file 3")
    write(root / "cg" / "memory" / "memory.limit_in_bytes", 50)  # the path of its group is the host's, and not here
    assert tightest(root / "proc", root / "cg", *MEMORY) == Limit(50, 2, f"{root}/cg/memory/memory.limit_in_bytes")


def test_a_machine_that_tells_nothing(root):
    (root / "proc" / "self" / "cgroup").unlink()
    (root / "proc" / "locks").unlink()
    assert {f.level for f in look(root)} == {"ok"}


def test_few_processes_are_left(root):
    write(root / "cg" / "pids.max", 1000)
    write(root / "cg" / "pids.current", 990)
    write(root / "cg" / "memory.stat", "inactive_file 4096")  # of another controller, in the same directory
    few = about(look(root), "processes and threads")
    assert (few.level, few.what.split()[0]) == ("warn", "10")
    assert "--pids-limit" in few.fix
    write(root / "cg" / "pids.current", 9)
    assert not any("threads" in f.what for f in look(root))


def test_few_open_files(root, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    few = about(look(root), "open files")
    assert few.level == "warn"
    assert few.what.startswith("a process may have 256 open files: too few")
    assert "LimitNOFILE" in few.fix
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert about(look(root), "open files").level == "ok"


def test_memory_that_may_be_locked(root, monkeypatch, tmp_path):
    key = tmp_path / "key"
    make_key_file(key)
    joined = f'[arena]\ndevice = "cuda"\n[cluster]\nkey_file = "{key}"\n[cluster.peers]\nn1 = "tcp://10.0.0.2:29600"'
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**26, 2**26))
    monkeypatch.setattr(machine, "_ADAPTERS", tmp_path / "infiniband")
    assert not any("may lock" in f.what for f in look(root, joined))  # there are no adapters
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    little = about(look(root, joined), "may lock 64 MiB")
    assert (little.level, "LimitMEMLOCK=infinity" in little.fix) == ("warn", True)
    assert not any("may lock" in f.what for f in look(root, '[arena]\ndevice = "cuda"'))  # nor other nodes


def test_a_container_with_namespaces(root):
    (root / "proc" / "self" / "ns" / "ipc").unlink()
    (root / "proc" / "self" / "ns" / "ipc").symlink_to("ipc:[4026532000]")
    said = about(look(root), "namespace of its own for IPC")
    assert said.level == "ok"  # all may be in it
    assert "docker run --ipc=host" in said.what


def test_a_runtime_directory_that_others_may_write_to(root):
    (root / "run" / "weightsync").mkdir(parents=True)
    (root / "run" / "weightsync").chmod(0o755)
    bad = about(look(root), "is not a directory of yours alone")
    assert (bad.level, "chmod 700" in bad.fix) == ("fail", True)


def test_ports_that_are_taken(root, unused_port):
    text = f'{ON_CPU}[http]\nlisten = "127.0.0.1:{unused_port}"'
    assert not any("http.listen" in f.what for f in look(root, text))
    with socket.create_server(("127.0.0.1", unused_port)):
        bad = about(look(root, text), "http.listen")
    assert bad.level == "fail"
    assert f"pid {os.getpid()}" in bad.what
    assert bad.fix == "another port"


def test_an_address_that_is_another_machine_s(root, unused_port, tmp_path):
    make_key_file(tmp_path / "key")
    text = f'[cluster]\nlisten = "tcp://192.0.2.1:{unused_port}"\nkey_file = "{tmp_path / "key"}"'
    bad = about(look(root, text), "cluster.listen")
    assert (bad.level, bad.fix) == ("fail", "an address of this machine: ip address")


def test_every_address_of_this_machine_is_one_of_its_own(root, unused_port, tmp_path):
    make_key_file(tmp_path / "key")
    text = f'[cluster]\nlisten = "tcp://*:{unused_port}"\nkey_file = "{tmp_path / "key"}"'
    assert not any("cluster.listen" in f.what for f in look(root, text))
    with socket.create_server(("127.0.0.1", unused_port)):
        assert about(look(root, text), "cluster.listen").fix == "another port"


def test_a_port_that_is_root_s(root, monkeypatch):
    def refused(self: socket.socket, address: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refused)
    bad = about(look(root, f'{ON_CPU}[http]\nlisten = "127.0.0.1:80"'), "http.listen")
    assert (bad.level, bad.what) == ("fail", "http.listen = tcp://127.0.0.1:80: permission denied")
    assert bad.fix.startswith("a port from 1024 on")


def test_a_weightsyncd_that_runs_has_its_ports(root, unused_port):
    """Here it is this process that holds the node's lock."""
    lock = root / "run" / "weightsync" / "node0.lock"
    lock.parent.mkdir(parents=True, mode=0o700)
    config = parse_node_config(f'{ON_CPU}[http]\nlisten = "127.0.0.1:{unused_port}"')
    with lock.open("w") as held, socket.create_server(("127.0.0.1", unused_port)):
        assert holder(lock) is None
        fcntl.flock(held, fcntl.LOCK_EX)
        if holder(lock) is None:
            pytest.skip("this kernel does not list locks")
        found = examine_machine(config)
        assert about(found, "weightsyncd of node0 runs").what.endswith(f"pid {os.getpid()}")
        assert not any("http.listen" in f.what for f in found)
    assert holder(lock) is None


def distribution(folder: Path, name: str, version: str) -> None:
    write(
        folder / f"{name}-{version}.dist-info" / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"
    )


def test_what_an_engine_runs_with(tmp_path):
    """A process that has loaded a torch of its own, in an environment with another weightsync."""
    packages = tmp_path / "lib" / "python3.12" / "site-packages"
    for name, version in (("weightsync", "0.0.1"), ("torch", "2.0.0"), ("nvidia_nccl_cu13", "2.28.3"), ("pytest", "1")):
        distribution(packages, name, version)
    library = packages / "torch" / "lib" / "libtorch_cpu.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(bytes(4096))
    script = (
        "import mmap, sys; file = open(sys.argv[1], 'rb'); held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "print(flush=True); input()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, library], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        folder = packages_of(child.pid)
        assert folder is not None
        assert folder.samefile(packages)
        differs, all_of_it = examine_environment(child.pid)
    finally:
        child.communicate("\n", timeout=10)
    ours = installed()
    assert differs.level == "warn"
    assert f"has weightsync 0.0.1, and this is {ours['weightsync']}" in differs.what
    assert all_of_it.level == "ok"
    assert "nvidia-nccl-cu13 2.28.3, torch 2.0.0, weightsync 0.0.1" in all_of_it.what
    assert f"torch {ours['torch']}" in all_of_it.what.partition("; here: ")[2]


def test_a_process_without_torch_says_nothing():
    assert examine_environment(os.getppid()) == []
    assert examine_environment(2**22 + 1) == []
