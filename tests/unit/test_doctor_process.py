"""What an engine's process shares with weightsyncd: looked at on real processes, in namespaces of their own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests.nvidia_smi import GPUS, FakeNvidiaSmi
from weightsync import doctor, processes
from weightsync.config import EngineConfig, parse_node_config
from weightsync.doctor import process as module
from weightsync.doctor.node import Node
from weightsync.doctor.process import examine_process
from weightsync.gpus import Gpu

SERVER = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
SHM = "mount -t tmpfs -o size=16m tmpfs /dev/shm"
CONTAINER = ["unshare", "--ipc", "--pid", "--mount", "--fork", "--kill-child"]


def node(device: str = "cuda", *, mig: bool = False) -> Node:
    text = f'[arena]\ndevice = "{device}"\n[node]\ngpus = ["{GPUS[0]}"]'
    return Node(parse_node_config(text), (Gpu(GPUS[0], 2**37, mig=False), Gpu(GPUS[1], 2**37, mig=mig)))


@pytest.fixture(scope="module")
def namespaces():
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here")
    tried = subprocess.run([*CONTAINER, "sh", "-c", SHM], capture_output=True, text=True, timeout=30, check=False)
    if tried.returncode:
        pytest.skip(f"this user may not make namespaces and mount a tmpfs: {tried.stderr.strip()}")


@contextmanager
def listening(*wrapped: str, env: dict[str, str] | None = None, shell: str = "true", server: str = SERVER):
    """The URL of a process that listens, started by `wrapped`, after `shell` has run."""
    command = [*wrapped, "sh", "-c", f'{shell} && exec "$0" -c "$1"', sys.executable, server]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | (env or {})
    )
    try:
        assert child.stdout is not None
        yield f"http://127.0.0.1:{int(child.stdout.readline())}"
    finally:
        child.communicate("\n", timeout=10)


def findings(url: str, where: Node, level: str):
    return [f for f in examine_process(url, where) if f.level == level]


@pytest.mark.usefixtures("no_leaks")
def test_a_process_like_ours():
    with listening() as url:
        shared, namespaces = examine_process(url, node())
        assert (shared.level, namespaces.level) == ("ok", "ok")
        assert "/dev/shm is shared" in shared.what
        assert len(examine_process(url, node("cpu"))) == 1


@pytest.mark.usefixtures("namespaces", "no_leaks")
def test_a_container_with_namespaces_of_its_own():
    with listening(*CONTAINER, shell=SHM) as url:
        shm, ipc, pid = findings(url, node(), "fail")
        assert "has a /dev/shm of its own, of 16 MiB" in shm.what
        assert "--ipc=host" in shm.fix
        assert "an IPC namespace of its own" in ipc.what
        assert "--ipc=host" in ipc.fix
        assert "a PID namespace of its own" in pid.what
        assert "--pid=host" in pid.fix
        (shm,) = examine_process(url, node("cpu"))
        assert shm.level == "fail"


@pytest.mark.usefixtures("namespaces", "no_leaks")
@pytest.mark.parametrize("kind", ["ipc", "pid"])
def test_one_namespace_of_its_own(kind):
    with listening("unshare", f"--{kind}", "--fork", "--kill-child") as url:
        (bad,) = findings(url, node(), "fail")
        assert f"docker run --{kind}=host" in bad.fix
        assert [f.level for f in examine_process(url, node("cpu"))] == ["ok"]


@pytest.mark.usefixtures("namespaces", "no_leaks")
def test_a_container_seen_by_the_whole_doctor(tmp_path, monkeypatch):
    smi = FakeNvidiaSmi(tmp_path).install(monkeypatch)
    with listening(*CONTAINER, shell=SHM) as url:
        found = doctor.examine(EngineConfig(name="e", kind="vllm", url=url), timeout=0.2)
    bad = [f.what for f in found if f.level == "fail"]
    assert sum("of its own" in what for what in bad) == 3
    assert len(smi.calls) == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to start a process as another user")
@pytest.mark.usefixtures("no_leaks")
def test_another_user():
    with listening(server=SERVER.replace("import socket;", "import os, socket; os.setuid(65534);")) as url:
        (bad,) = findings(url, node(), "fail")
    assert "runs as user 65534, you are 0" in bad.what


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize(
    ("visible", "level", "says"),
    [
        ("1", None, ""),
        ("1,0", None, ""),
        (f"GPU-{GPUS[1][:8]}", None, ""),
        ("GPU-ffff", "warn", "names GPUs that are not visible here"),
        ("0,5", "warn", "CUDA_VISIBLE_DEVICES=0,5"),
        ("MIG-cc", "fail", "MIG-cc: memory cannot be shared"),
    ],
)
def test_gpus_of_the_engine(visible, level, says):
    with listening(env={"CUDA_VISIBLE_DEVICES": visible}) as url:
        bad = [f for f in examine_process(url, node()) if f.level != "ok"]
        assert [f.level for f in bad] == [level] * len(bad)
        assert bool(bad) == bool(says)
        assert all(says in f.what and f.fix for f in bad)
        assert all(f.level == "ok" for f in examine_process(url, node("cpu")))


def test_an_engine_on_a_divided_gpu():
    (bad,) = module._visible_gpus({"CUDA_VISIBLE_DEVICES": "1"}, node(mig=True))
    assert bad.level == "fail"
    assert GPUS[1] in bad.what
    assert module._visible_gpus({"CUDA_VISIBLE_DEVICES": "0"}, node(mig=True)) == []


@pytest.mark.usefixtures("no_leaks")
def test_a_containers_port_that_is_passed_on(tmp_path):
    """What listens for `docker run -p` is a proxy, which shares everything: not the engine."""
    proxy = tmp_path / "docker-proxy"
    proxy.symlink_to(sys.executable)
    home = {"PYTHONHOME": sys.base_prefix}
    child = subprocess.Popen(
        [str(proxy), "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | home,
    )
    try:
        assert child.stdout is not None
        (found,) = examine_process(f"http://127.0.0.1:{int(child.stdout.readline())}", node())
    finally:
        child.communicate("\n", timeout=10)
    assert "passed on to a container by docker-proxy" in found.what
    assert "--network=host" in found.fix


def test_nobody_that_can_be_seen(unused_port, monkeypatch):
    (found,) = examine_process(f"http://127.0.0.1:{unused_port}", node())
    assert "cannot be seen" in found.what
    with listening() as url:
        monkeypatch.setattr(module, "same_namespace", lambda pid, kind: None)
        ipc, pid = findings(url, node(), "warn")
    assert "whether the engine" in ipc.what
    assert "--pid=host" in pid.fix


def test_what_proc_tells():
    with socket.create_server(("127.0.0.1", 0)) as mine:
        assert processes.listener(mine.getsockname()[1]) == os.getpid()
    assert processes.listener(1) is None
    assert int(processes.started(os.getpid())) > 0
    assert processes.environment(os.getpid()).keys() <= os.environ.keys() | {"LINES", "COLUMNS", "_"}
    assert processes.environment(4194305) == {}
    assert processes.command(4194305) == ""
    assert processes.command(os.getpid())
    assert processes.same_namespace(os.getpid(), "pid")
    assert processes.same_namespace(4194305, "pid") is None
