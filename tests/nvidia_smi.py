"""A fake nvidia-smi that records its calls. It answers as a real one did on two H200s, unless it is told otherwise."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

__all__ = ["GPUS", "FakeNvidiaSmi", "matrix"]

GPUS = ("4a8e9a0c-52f1-7d3e-9c10-8f5f0d1c2b3a", "b7d0c6e2-0f94-1a2b-63d8-41e7aa90cc5d")
FREE = 142_841  # MiB, of an idle H200

_LEGEND = """
Legend:

  X    = Self
  OK   = Status Ok
  CNS  = Chipset not supported
  GNS  = GPU not supported
  TNS  = Topology not supported
  NS   = Not supported
  DR   = Disabled by regkey
  U    = Unknown
"""


def matrix(*rows: str) -> str:
    """Return what `topo -p2p r` prints for these cells, with its tabs and spaces."""
    head = " \t" + "".join(f"GPU{i}\t" for i in range(len(rows)))
    lines = [f" GPU{i}\t" + "".join(f"{cell}\t" for cell in row.split()) for i, row in enumerate(rows)]
    return "\n".join([head, *lines]) + "\n" + _LEGEND


class FakeNvidiaSmi:
    """An nvidia-smi that `install` puts first on PATH. Each answer can be replaced before or after."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.gpus(*((gpu, f"{FREE}", "Disabled") for gpu in GPUS))
        self.peers("X OK", "OK X")
        self.links("X NV18", "NV18 X")
        self.cuda("13.0")
        script = directory / "nvidia-smi"
        script.write_text(
            f"""#!/bin/sh
cd {shlex.quote(str(directory))}
echo "$*" >> calls
case "$*" in
    "--query-gpu=uuid,memory.free,mig.mode.current --format=csv,noheader,nounits") cat gpus ;;
    "topo -p2p r") cat peers ;;
    "topo -m") cat links ;;
    --version) cat version ;;
    *) echo "unknown: $*"; exit 2 ;;
esac
exit $(cat status)
"""
        )
        script.chmod(0o755)
        self.status(0)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeNvidiaSmi:
        monkeypatch.setenv("PATH", f"{self._directory}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return self

    def gpus(self, *rows: tuple[str, str, str]) -> None:
        """Set the GPUs: UUID, free MiB and MIG mode of each."""
        self.says("".join(f"GPU-{uuid}, {free}, {mig}\n" for uuid, free, mig in rows))

    def says(self, text: str) -> None:
        """Set the answer to a query for GPUs."""
        (self._directory / "gpus").write_text(text)

    def peers(self, *rows: str) -> None:
        (self._directory / "peers").write_text(matrix(*rows))

    def links(self, *rows: str) -> None:
        """Set the links, as `topo -m` shows them beside a network adapter and the affinities."""
        columns = "".join(f"GPU{i}\t" for i in range(len(rows)))
        head = f"\t\x1b[4m{columns}NIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
        lines = [
            f"GPU{i}\t" + "".join(f"{cell:^4}\t" for cell in row.split()) + "NODE\t0-51\t0\t\tN/A\n"
            for i, row in enumerate(rows)
        ]
        adapter = "NIC0\t" + "NODE\t" * len(rows) + " X \t\t\t\t\n"
        legend = "\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
        (self._directory / "links").write_text("".join([head, *lines, adapter, legend]))

    def cuda(self, version: str, *, name: str = "CUDA Version        ") -> None:
        text = "NVIDIA-SMI version  : 580.159.04\nNVML version        : 580.159\nDRIVER version      : 580.159.04\n"
        (self._directory / "version").write_text(f"{text}{name}: {version}\n")

    def status(self, status: int) -> None:
        """Set the exit status."""
        (self._directory / "status").write_text(str(status))

    @property
    def calls(self) -> list[str]:
        path = self._directory / "calls"
        return path.read_text().splitlines() if path.exists() else []
