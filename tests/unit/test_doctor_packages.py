"""cupy, torch and the driver: which go together."""

from __future__ import annotations

import subprocess
import sys

import pytest

from weightsync.doctor.packages import Cupy, Torch, installed_cupys, installed_torch, judge_packages

CUPY12, CUPY13 = Cupy("cupy-cuda12x", "13.6.0", 12), Cupy("cupy-cuda13x", "14.0.1", 13)
TORCH12, TORCH13, TORCH_CPU = Torch("2.9.0+cu128", (12, 8)), Torch("2.11.0", (13, 0)), Torch("2.13.0+cpu", None)


@pytest.mark.parametrize(
    ("cupys", "torch", "driver", "levels", "says", "mends"),
    [
        ([CUPY13], TORCH13, (13, 0), ["ok"], "cupy-cuda13x 14.0.1 beside torch for CUDA 13.0", ""),
        ([CUPY12], TORCH12, (13, 0), ["ok"], "the driver runs CUDA up to 13.0", ""),
        ([CUPY12], None, None, ["ok"], "cupy-cuda12x 13.6.0", ""),
        ([Cupy("cupy", "14.0.1", None)], TORCH13, (13, 0), ["ok"], "built from source", ""),
        ([], TORCH13, (13, 0), ["fail"], "no cupy is installed", 'pip install ".[cuda13]" in a clone'),
        ([], TORCH12, (13, 0), ["fail"], "no cupy is installed", 'pip install ".[cuda12]" in a clone'),
        ([], None, (12, 8), ["fail"], "no cupy is installed", 'pip install ".[cuda12]" in a clone'),
        ([], None, (14, 0), ["fail"], "no cupy is installed", 'pip install ".[cuda13]" in a clone'),
        (
            [CUPY12, CUPY13],
            TORCH13,
            (13, 0),
            ["fail"],
            "one over the other: cupy-cuda12x cupy-cuda13x",
            'pip uninstall -y cupy-cuda12x cupy-cuda13x; then pip install ".[cuda13]" in a clone of weightsync',
        ),
        ([CUPY13], TORCH12, (12, 8), ["fail"], "needs CUDA 13, and the driver runs CUDA up to 12.8", "[cuda12]"),
        ([CUPY12], TORCH13, (13, 0), ["warn"], "which that torch does not bring along", "[cuda13]"),
        ([CUPY12], TORCH13, (12, 8), ["warn", "warn"], "torch 2.11.0 is for CUDA 13.0", "torch for CUDA 12"),
        ([CUPY13], TORCH_CPU, (13, 0), ["warn", "ok"], "torch 2.13.0+cpu is built for a CPU", "torch for CUDA"),
    ],
)
def test_which_go_together(cupys, torch, driver, levels, says, mends):
    found = judge_packages(cupys, torch, driver)
    assert [f.level for f in found] == levels
    assert says in found[0].what
    assert mends in found[0].fix


def test_what_is_installed(tmp_path, monkeypatch):
    for name, version in (
        ("cupy_cuda12x", "13.6.0"),
        ("Cupy-CUDA13x", "14.0.1"),
        ("cupy_xarray", "0.1"),
        ("cupy", "1"),
    ):
        directory = tmp_path / f"{name}-{version}.dist-info"
        directory.mkdir()
        (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed_cupys() == [Cupy("cupy", "1", None), CUPY12, CUPY13]


@pytest.mark.parametrize(("cuda", "read"), [("Optional[str] = '13.0'", (13, 0)), ("Optional[str] = None", None)])
def test_torch_is_read_and_not_imported(tmp_path, cuda, read):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.11.0'\ndebug = False\ncuda: {cuda}\n")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    script += "from weightsync.doctor.packages import installed_torch\nprint(installed_torch())"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout
    assert told.strip() == str(Torch("2.11.0", read))


def test_the_torch_of_this_python():
    import torch

    here = installed_torch()
    assert here is not None
    assert here.version == torch.__version__
    assert (here.cuda is None) == (torch.version.cuda is None)
