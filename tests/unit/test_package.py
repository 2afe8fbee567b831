"""What importing costs, and what is exported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import weightsync
import weightsyncd
from weightsync import errors

HEAVY = ("torch", "zmq", "cupy", "sglang", "vllm", "numpy", "httpx", "rich", "xxhash", "prometheus_client")


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_importing_loads_nothing_heavy():
    assert not loaded_by("import weightsync").intersection(HEAVY)
    assert not loaded_by("from weightsync import push_weights, PushReport").intersection(HEAVY)


def test_messages_and_what_asks_for_a_status_load_no_numpy():
    """Half of what `weightsync status` would take."""
    assert "numpy" not in loaded_by("import weightsync.operator, weightsync.wire.codec")


def test_a_daemon_loads_no_torch():
    assert "torch" not in loaded_by("import weightsyncd.server, weightsyncd.__main__")


def test_a_bridge_loads_no_torch_before_it_joins():
    assert "torch" not in loaded_by("import weightsync.nccl_bridge.process")


def test_every_module_of_the_daemon_is_in_its_map_and_nothing_else():
    mapped = re.findall(r"^    (\w+)  ", weightsyncd.__doc__ or "", re.MULTILINE)
    there = {file.stem for file in Path(weightsyncd.__file__).parent.glob("*.py")} - {"__init__"}
    assert len(mapped) == len(set(mapped))
    assert set(mapped) == there


def test_every_exported_name_is_there():
    for name in weightsync.__all__:
        assert getattr(weightsync, name) is not None
    assert set(weightsync.__all__) <= set(dir(weightsync))


def test_errors_are_one_tree_and_survive_the_wire():
    for name in errors.__all__:
        kind = getattr(errors, name)
        if not (isinstance(kind, type) and issubclass(kind, errors.WeightSyncError)):
            continue
        error = kind("it broke", model="m", version=1, rank=2, engine="e", bucket=3, phase="load", hint="mend it")
        again = error.record().error()
        assert type(again) is kind
        assert str(again) == str(error)
        assert str(error) == ("it broke [model=m version=1 rank=2 engine=e bucket=3 phase=load]\n  hint: mend it")


def test_an_error_of_a_later_version_becomes_the_root():
    assert type(errors.ErrorRecord(kind="FromTheFuture", message="x").error()) is errors.WeightSyncError
