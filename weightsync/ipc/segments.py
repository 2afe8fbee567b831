"""The files that bridges have in shared memory: their names, and how files whose bridge is gone are removed."""

from __future__ import annotations

import mmap
import os
import re
import stat
from contextlib import suppress

from weightsync.errors import ConfigError

__all__ = ["DIRECTORY", "SEGMENT", "discard", "discard_exports", "remove_stale", "segment_name", "unlink"]

DIRECTORY = "/dev/shm"

SEGMENT = (
    r"weightsync-(?P<uid>\d{1,10})-(?P<node>[A-Za-z0-9._-]{1,128})-(?P<bridge>\d{1,6})-(?P<incarnation>[0-9a-f]{16})"
)
_NAME_PATTERN = re.compile(SEGMENT)
_FILE_PATTERN = re.compile(rf"{SEGMENT}(?:-x\d{{1,18}})?")  # arenas, and files that a bridge exports beside its arena


def segment_name(node: str, bridge: int, incarnation: str) -> str:
    """The file name of an arena. Raises `ConfigError` for a node name that does not fit into one."""
    name = f"weightsync-{os.geteuid()}-{node}-{bridge}-{incarnation}"
    if not _NAME_PATTERN.fullmatch(name):
        raise ConfigError(
            f"no arena can be called {name!r}",
            hint="node names have letters, digits, '.', '_' and '-'; incarnations are 16 hexadecimal digits",
        )
    return name


def remove_stale(
    directory: str, node: str, *, bridge: int | None = None, keep: frozenset[str] = frozenset()
) -> tuple[str, ...]:
    """Remove this user's arenas of `node` (or of one bridge of it), and exports beside them, except those in `keep`.

    `keep` has incarnations. The bridges of all others must have ended. Returns the names removed.
    """
    removed = []
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            found = _FILE_PATTERN.fullmatch(entry.name)
            if found is None or found["node"] != node or found["incarnation"] in keep:
                continue
            if bridge is not None and int(found["bridge"]) != bridge:
                continue
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                    discard(directory, entry.name)
                    removed.append(entry.name)
    return tuple(removed)


def discard(directory: str, name: str) -> None:
    """Remove the arena of a bridge that is gone, and give its pages back at once.

    Trainers and engines unmap an arena only when they are offered its successor, and there may be no room for that
    until then. So the file is emptied first. Processes that have it mapped read zeros from now on, which fences and
    checksums detect, and they get no SIGBUS.
    """
    try:
        fd = os.open(os.path.join(directory, name), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        size = os.fstat(fd).st_size
        if size:
            whole = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            with whole, suppress(OSError):  # some file systems cannot; pages then go with the last mapping
                whole.madvise(mmap.MADV_REMOVE)
    finally:
        os.close(fd)
        unlink(directory, name)


def discard_exports(name: str) -> None:
    """Remove the files that a bridge, now gone, had exported for stock engines beside its arena `name`."""
    with suppress(FileNotFoundError), os.scandir(DIRECTORY) as entries:
        for entry in entries:
            if entry.name.startswith(f"{name}-x") and _FILE_PATTERN.fullmatch(entry.name):
                discard(DIRECTORY, entry.name)


def unlink(directory: str, name: str) -> None:
    """Remove the file of that name, if it is there."""
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, name))
