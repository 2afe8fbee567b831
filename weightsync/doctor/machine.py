"""This machine or container: open files, memory, processes, namespaces, and the sockets that weightsyncd would open."""

from __future__ import annotations

import errno
import os
import resource
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from weightsync.adapters.base import Finding
from weightsync.doctor.arenas import held
from weightsync.doctor.cgroups import tightest
from weightsync.doctor.sizes import size
from weightsync.endpoints import private_directory, runtime_dir
from weightsync.errors import ConfigError
from weightsync.ipc.arena import stride
from weightsync.processes import command, listener

if TYPE_CHECKING:
    from weightsync.config import NodeConfig

__all__ = ["examine_machine", "holder"]

_DESCRIPTORS = 1024  # weightsyncd has one for each rank and bridge, and a few for each engine and peer
_PROCESSES = 256  # threads of weightsyncd, its bridges and keepers: about 20 each, and torch's
_FIRST = {"ipc": 0xEFFFFFFF, "pid": 0xEFFFFFFC}  # the kernel's numbers of its initial namespaces
_ADAPTERS = Path("/sys/class/infiniband")
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_ADDRESS = "an address of this machine: ip address"
_FIXES = {  # for errors of binding a port
    errno.EADDRINUSE: "another port",
    errno.EACCES: "a port from 1024 on, or sysctl net.ipv4.ip_unprivileged_port_start",
}
_LIMITS = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")  # cgroups 2, and 1


def examine_machine(config: NodeConfig, proc: Path = _PROC, cgroups: Path = _CGROUPS) -> list[Finding]:
    """Examine this machine for a weightsyncd with this config, GPUs aside. Binds ports briefly; changes nothing."""
    found = [_descriptors(), _memory(config, proc, cgroups)]
    found += _processes(proc, cgroups)
    found += _locked_memory(config)
    found += _namespaces(proc)
    return found + _sockets(config, proc)


def _descriptors() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    what = f"a process may have {'any number of' if soft == resource.RLIM_INFINITY else soft} open files"
    if soft == resource.RLIM_INFINITY or soft >= _DESCRIPTORS:
        return Finding(level="ok", what=what)
    what += ": too few for many ranks and engines"
    fix = "ulimit -n 65536; systemd: LimitNOFILE=65536; docker run --ulimit nofile=65536"
    return Finding(level="warn", what=what, fix=fix)


def _memory(config: NodeConfig, proc: Path, cgroups: Path) -> Finding:
    """Judge available memory. Arenas in host memory count towards the limit of the container that writes them."""
    arena = config.arena
    need = max(config.node.bridges, 1) * arena.slots * stride(arena.slot_bytes) if arena.device == "cpu" else 0
    there = held(config) if need else 0  # a new weightsyncd can use this memory
    free, where = _available(proc) + there, "of memory are available"
    limit = tightest(proc, cgroups, *_LIMITS)
    if limit is not None and (left := min(limit.left + there, limit.limit)) < free:
        free, where = left, f"of memory are left of the limit of {size(limit.limit)} in {limit.where}"
    what = f"{size(free)} {where}"
    if need:
        what += f"; slots in host memory take up to {size(need)} of that"
    if config.node.retain == "host":
        much = "twice the model" if arena.device == "cuda" else "once the model, twice during a push"
        what += f", and the copy for late engines (node.retain) {much}"
    if free < need:
        fix = "smaller arena.slots or arena.slot_bytes; docker run --memory=…, resources.limits.memory in Kubernetes"
        return Finding(level="fail", what=what, fix=fix)
    return Finding(level="ok", what=what)


def _available(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _processes(proc: Path, cgroups: Path) -> list[Finding]:
    limit = tightest(proc, cgroups, ("pids.max", "pids.current"), ("pids.max", "pids.current"), controller="pids")
    if limit is None or limit.left >= _PROCESSES:
        return []
    what = f"{limit.left} more processes and threads may be started, by the limit of {limit.limit} in {limit.where}"
    return [Finding(level="warn", what=what, fix="docker run --pids-limit=-1; systemd: TasksMax=infinity")]


def _locked_memory(config: NodeConfig) -> list[Finding]:
    """Judge how much memory a process may lock: NCCL locks the memory that it registers with InfiniBand adapters."""
    cluster = config.cluster
    joined = bool(cluster.peers or cluster.listen or cluster.seed)
    with suppress(OSError):
        if config.arena.device == "cuda" and joined and any(_ADAPTERS.iterdir()):
            soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
            if soft != resource.RLIM_INFINITY:
                what = (
                    f"a process may lock {size(soft)} of memory: too little for NCCL over the InfiniBand that is here"
                )
                fix = "ulimit -l unlimited; systemd: LimitMEMLOCK=infinity; docker run --ulimit memlock=-1"
                return [Finding(level="warn", what=what, fix=fix)]
    return []


def _namespaces(proc: Path) -> list[Finding]:
    own = []
    for kind, first in _FIRST.items():
        with suppress(OSError):
            if os.readlink(proc / "self" / "ns" / kind) != f"{kind}:[{first}]":
                own.append(kind)
    if not own:
        return []
    names = " and ".join(kind.upper() for kind in own)
    flags = " ".join(f"--{kind}=host" for kind in own)
    what = f"this is a container with a namespace of its own for {names}: trainers and engines outside it share no "
    what += f"memory with it. Well if all are in it; else: docker run {flags} for each"
    return [Finding(level="ok", what=what)]


def holder(lock: Path, proc: Path = _PROC) -> int | None:
    """Return the process that holds this file's lock, from the kernel's list; None if none is seen."""
    with suppress(OSError):
        wanted = lock.stat()
        for line in (proc / "locks").read_text().splitlines():
            fields = line.split()  # inode numbers repeat across file systems, so the holder's open files decide
            if "FLOCK" in fields and fields[-3].rpartition(":")[2] == str(wanted.st_ino):
                for opened in (proc / fields[-4] / "fd").iterdir():
                    with suppress(OSError):
                        if os.path.samestat(opened.stat(), wanted):
                            return int(fields[-4])
    return None


def _sockets(config: NodeConfig, proc: Path) -> list[Finding]:
    directory, found = runtime_dir(), []
    if directory.exists():
        try:
            private_directory(directory)
        except ConfigError as error:
            return [Finding(level="fail", what=error.message, fix=error.hint or "")]
    pid = holder(directory / f"{config.node.name}.lock", proc)
    if pid is not None:
        found.append(Finding(level="ok", what=f"weightsyncd of {config.node.name} runs, pid {pid}"))
    ports = {"node.listen": config.node.listen, "cluster.listen": config.cluster.listen}
    ports |= {"http.listen": f"tcp://{config.http.listen}" if config.http.listen else ""}
    for key, endpoint in ports.items():
        if endpoint.startswith("tcp://") and (problem := _port(key, endpoint, pid)) is not None:
            found.append(problem)
    return found


def _port(key: str, endpoint: str, daemon: int | None) -> Finding | None:
    """Return why weightsyncd could not listen there, or None."""
    parts = urlsplit(endpoint)
    host, port = parts.hostname or "", parts.port or 0
    host = "" if host == "*" else host  # "*" is zmq's name for every address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            pid = listener(port) if error.errno == errno.EADDRINUSE else None
            if pid is not None and pid == daemon:
                return None
            who = f"taken by {command(pid)}, pid {pid}" if pid is not None else (error.strerror or str(error)).lower()
            return Finding(level="fail", what=f"{key} = {endpoint}: {who}", fix=_FIXES.get(error.errno or 0, _ADDRESS))
    return None
