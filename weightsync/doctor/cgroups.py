"""Limits that a container, a systemd unit or Slurm sets, in either version of cgroups."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Limit", "tightest"]

_NONE = 2**60  # version 1 shows a number near 2**63 if there is no limit


class Limit(NamedTuple):
    """One limit and its use. Use of memory leaves out what the kernel can reclaim at once."""

    limit: int
    used: int
    where: str  # the file

    @property
    def left(self) -> int:
        return max(0, self.limit - self.used)


def tightest(
    proc: Path, root: Path, second: tuple[str, str], first: tuple[str, str], *, controller: str = "memory"
) -> Limit | None:
    """Return the limit on this process with the least left, of its own group or a group around it. None: no limit.

    `second` and `first` name the files of the limit and of its use, in version 2 and version 1.
    """
    found = []
    for line in _lines(proc / "self" / "cgroup"):
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0":
            mounts, files = [root, root / "unified"], second
        elif controller in controllers.split(","):
            mounts, files = [root / controller], first
        else:
            continue
        for mount in mounts:
            # in a container the path may be the host's and not visible: then the mount itself is the process's group
            group = mount / path.strip("/")
            for folder in (group, *group.parents):
                if (limit := _read(folder, files)) is not None:
                    found.append(limit)
                if folder == mount:
                    break
    return min(found, key=lambda limit: limit.left, default=None)


def _lines(path: Path) -> list[str]:
    with suppress(OSError):
        return path.read_text().splitlines()
    return []


def _read(folder: Path, files: tuple[str, str]) -> Limit | None:
    with suppress(OSError, ValueError):  # "max" is no number, and no limit
        limit, used = (int((folder / name).read_text()) for name in files)
        if limit < _NONE:
            if files[1].startswith("memory."):
                used = max(0, used - _reclaimable(folder))
            return Limit(limit, used, str(folder / files[0]))
    return None


def _reclaimable(folder: Path) -> int:
    """Return the bytes of cached files that the kernel gives up before it refuses memory."""
    stat = dict(line.split() for line in _lines(folder / "memory.stat") if line.count(" ") == 1)
    found = stat.get("total_inactive_file", stat.get("inactive_file", "0"))  # version 1: "total_" includes subgroups
    return int(found) if found.isdecimal() else 0
