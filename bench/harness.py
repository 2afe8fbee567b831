"""What every measurement shares: the ceiling of this machine's memory, the table, the JSON with its circumstances."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["Timing", "copy_ceiling", "hardware", "report", "timed"]


@dataclass(frozen=True)
class Timing:
    """Seconds of several runs of one thing."""

    best: float
    median: float
    worst: float
    runs: int


def timed(job: Callable[[], object], *, runs: int = 5, warmup: int = 1) -> Timing:
    """Seconds that `job` takes, over `runs` runs after `warmup` that do not count."""
    for _ in range(warmup):
        job()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - start)
    return Timing(best=min(seconds), median=statistics.median(seconds), worst=max(seconds), runs=runs)


def copy_ceiling(nbytes: int = 2**28, *, runs: int = 7) -> float:
    """Bytes per second (of the source) that one core copies from memory to memory; the best run."""
    source = np.ones(nbytes, np.uint8)
    target = np.ones(nbytes, np.uint8)  # written once here, so that no page fault is measured
    return nbytes / timed(lambda: np.copyto(target, source), runs=runs).best


def hardware() -> dict[str, Any]:
    """What this was measured on."""
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
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], figures: Any, json_path: Path | None
) -> None:
    """Print `rows` as a table; write `figures` (plain data or dataclasses) to `json_path` if one is given."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)  # a log is wide enough for every column
    if json_path is not None:
        document: Mapping[str, Any] = {
            "title": title,
            "command": "python -m " + shlex.join([_module(), *sys.argv[1:]]),
            "hardware": hardware(),
            "figures": figures,
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(document, indent=2, default=_plain) + "\n")


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).name


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{value!r} is no plain data")
