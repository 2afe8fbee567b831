"""Helpers of all measurements: seconds and their spread, the ceiling of this machine's memory, the printed table, the
JSON with its circumstances, and the command line of a suite.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = [
    "JsonOption",
    "LayersOption",
    "PushesOption",
    "RoundsOption",
    "SlotOption",
    "SlotsOption",
    "Spread",
    "Timing",
    "circumstances",
    "command",
    "copy_ceiling",
    "hardware",
    "peak_bytes",
    "report",
    "size",
    "suite",
    "timed",
]

LayersOption = Annotated[int | None, typer.Option(help="Of its layers, so many.", show_default="all")]
PushesOption = Annotated[int, typer.Option(min=1, help="Measured pushes of each way, after 2 that warm up.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Start each way so often, in turn, for so many pushes.")]
SlotOption = Annotated[str, typer.Option(help="arena.slot_bytes")]
SlotsOption = Annotated[int, typer.Option(min=1, help="arena.slots")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures there.", show_default=False)]
_PACKAGES = ("weightsync", "torch", "numpy", "msgspec", "msgpack", "pyzmq")
_LOAD = os.getloadavg()  # when this process began: shows what else the machine was doing


@dataclass(frozen=True)
class Spread:
    """How long each of several runs of one thing took, in seconds."""

    p50: float
    p99: float  # of fewer than a hundred runs: the longest
    max: float
    runs: int
    all: tuple[float, ...]  # in the order in which they ran

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Spread:
        """Summarise the seconds of one run or more."""
        every = tuple(seconds)
        ordered = sorted(every)
        nearest = ordered[math.ceil(0.99 * len(ordered)) - 1]
        return cls(statistics.median(ordered), nearest, ordered[-1], len(every), every)


@dataclass(frozen=True)
class Timing:
    """Seconds of several runs of one thing."""

    best: float
    median: float
    worst: float
    runs: int


def timed(job: Callable[[], object], *, runs: int = 5, warmup: int = 1) -> Timing:
    """Measure the seconds that `job` takes, over `runs` runs after `warmup` runs that do not count."""
    for _ in range(warmup):
        job()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - start)
    return Timing(best=min(seconds), median=statistics.median(seconds), worst=max(seconds), runs=runs)


def copy_ceiling(nbytes: int = 2**28, *, runs: int = 7) -> float:
    """Return the bytes per second (of the source) that one core copies from memory to memory, in the best run."""
    source = np.ones(nbytes, np.uint8)
    target = np.ones(nbytes, np.uint8)  # written once here, so that no page fault is measured
    return nbytes / timed(lambda: np.copyto(target, source), runs=runs).best


def size(text: str) -> int:
    """Return the bytes that a text such as "64MiB" or "1.5GB" means. Raises `typer.BadParameter`."""
    number = text.rstrip("BKMGTi")
    unit = text[len(number) :]
    powers = {"": 1, "B": 1} | {
        f"{letter}{i}B": (1024 if i else 1000) ** (power + 1) for power, letter in enumerate("KMGT") for i in ("", "i")
    }
    try:
        return int(float(number) * powers[unit])
    except (ValueError, KeyError) as error:
        raise typer.BadParameter(f"{text!r} is no size; say 64MiB or 1.5GB") from error


def peak_bytes(pid: int | str = "self") -> int:
    """Return the most bytes that a process has had resident at a time, mapped shared memory included."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def hardware() -> dict[str, Any]:
    """Describe the machine that this is measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def report(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    figures: Any,
    json_path: Path | None,
    footer: str = "",
) -> None:
    """Print `rows` as a table; write `figures` (plain data or dataclasses) to `json_path` if one is given."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)  # a log has room for every column
    console.print(table)
    if footer:
        console.print(footer)
    if json_path is not None:
        document = {"title": title, **circumstances(), "figures": figures}
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(document, indent=2, default=_plain) + "\n")


def circumstances() -> dict[str, Any]:
    """Return the exact command, the hardware, the versions, and the machine's load at the start and now.

    Load is the average number of processes that wanted a core in the last 1, 5 and 15 minutes.
    """
    return {
        "command": command(),
        "hardware": hardware(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "load": {"before": [round(x, 2) for x in _LOAD], "after": [round(x, 2) for x in os.getloadavg()]},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # but on the path


def command() -> str:
    """Return the command line of this process, without the folder of the program or script."""
    first, *rest = sys.orig_argv[1:]
    if first == "-m":
        return "python -m " + shlex.join(rest)
    return shlex.join([Path(first).name, *rest])


def suite(main: Callable[..., None]) -> typer.Typer:
    """Make a command line of this one function, for `python -m bench NAME` or the module by itself."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(help=sys.modules[main.__module__].__doc__)(main)
    return app


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{value!r} is no plain data")
