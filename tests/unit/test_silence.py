"""Ranks that have fallen silent: which are lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import msgspec
import pytest

from tests.wire_examples import EXAMPLES
from weightsync.processes import started
from weightsync.testing import eventually
from weightsync.wire import messages as msg
from weightsyncd.ranks import is_lost


def call(pid: int, since: str) -> msg.Open:
    (example,) = (one for one in EXAMPLES if isinstance(one, msg.Open))
    return msgspec.structs.replace(example, pid=pid, started=since)


def lost(pid: int, since: str) -> list[bool]:
    return [is_lost(silent, 5.0, call(pid, since)) for silent in (4.9, 5.1, 14.9, 15.1)]


HAS_LONGER, HAS_NOT = [False, False, False, True], [False, True, True, True]


def test_one_whose_process_is_there_has_longer():
    """An import from a slow disk, say, holds up its heartbeats."""
    assert lost(os.getpid(), started(os.getpid())) == HAS_LONGER


@pytest.mark.parametrize("how", ["not told", "another process", "gone", "stopped", "dead"])
def test_silence_tells_of_one_whose_process_is_not(how):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        pid, since = child.pid, started(child.pid)
        match how:
            case "not told":
                pid, since = 0, ""
            case "another process":
                since = "1"
            case "gone":
                child.kill()
                child.wait(10)
            case "stopped":
                child.send_signal(signal.SIGSTOP)
            case "dead":
                child.kill()  # and not waited for
        assert eventually(lambda: lost(pid, since) == HAS_NOT)
    finally:
        child.kill()
        child.communicate()
