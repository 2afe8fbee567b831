"""Facts from /proc about other processes of this machine: which one listens, when it began, its environment."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["at_work", "command", "environment", "listener", "same_namespace", "started"]

_LISTEN = "0A"
_AT_WORK = ("R", "S", "D")  # running, waiting, waiting for a disk; others are stopped, traced or dead


def listener(port: int) -> int | None:
    """Return the process that listens on TCP `port`, as far as this user may see; the eldest of several."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
    holders = [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _holds(int(entry), sockets)]
    return min(holders, key=lambda pid: (int(started(pid) or 0), pid), default=None)


def _holds(pid: int, sockets: set[str]) -> bool:
    with suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{fd}") in sockets:
                    return True
    return False


def started(pid: int) -> str:
    """Return when the process began, in the kernel's ticks, or "" if there is none.

    Pid and start together name one process for ever.
    """
    fields = _status(pid)
    return fields[19] if fields else ""


def at_work(pid: int, since: str) -> bool:
    """Whether the process that `started` at `since` still exists, and is neither stopped nor dead."""
    fields = _status(pid)
    return bool(fields) and fields[19] == since and fields[0] in _AT_WORK


def _status(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the process's name, its state first; none if there is no process."""
    with suppress(OSError):
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return status.rpartition(")")[2].split()
    return []


def environment(pid: int) -> dict[str, str]:
    """Return the environment that the process was started with; none if it may not be read."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace").split("\0")
        return dict(line.partition("=")[::2] for line in lines if "=" in line)
    return {}


def command(pid: int) -> str:
    """Return the name of the process's program, cut to 15 characters by the kernel; "" if there is no process."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    return ""


def same_namespace(pid: int, kind: str) -> bool | None:
    """Whether `pid` shares this process's namespace of `kind` ("pid", "ipc", "net"); None if that may not be seen."""
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/{kind}") == os.readlink(f"/proc/self/ns/{kind}")
    return None
