"""What test processes have of their own while others run beside them, and what is left of one that is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import psutil
import pytest

from tests.own import free_port, named
from weightsync.testing import eventually

LIFE = """
import json, signal, subprocess, sys
from tests.own import free_port, guarded, named
with guarded():
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    child.send_signal(signal.SIGSTOP)
    print(json.dumps([named("node"), free_port(), child.pid]), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other():
    """Another test process, which has stopped a child of its own, and what it says of itself."""
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", LIFE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        yield process, *json.loads(process.stdout.readline())
        process.kill()


def gone(pid):
    def ended():
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return eventually(ended)


def test_two_that_live_at_one_time_share_no_name_and_no_port(other):
    _, name, port, _ = other
    assert name != named("node")
    assert abs(port - free_port()) > 100


@pytest.mark.parametrize("how", ["killed", "ends"])
def test_what_it_has_stopped_ends_with_it(other, how):
    process, _, _, child = other
    assert eventually(lambda: psutil.Process(child).status() == psutil.STATUS_STOPPED)
    if how == "killed":
        process.kill()
    else:
        process.stdin.close()
    process.wait(20)
    assert gone(child)
