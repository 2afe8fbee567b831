from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest

from weightsync.errors import TransportBroken
from weightsync.ipc.fences import CELL_BYTES, MAX_SEQUENCE, FenceTable, State


@pytest.fixture
def table():
    return FenceTable(memoryview(bytearray(2 * 3 * CELL_BYTES)), 2, 3)


def test_an_export_is_opened_and_closed(table):
    assert table.read(1, 2) == (0, State.EMPTY)
    table.export(1, 2, 7)
    assert table.read(1, 2) == (7, State.EXPORTED)
    table.open(1, 2, 7)
    assert table.read(1, 2) == (7, State.OPENED)
    assert table.close(1, 2, 7)
    assert table.read(1, 2) == (7, State.CLOSED)
    assert {table.read(slot, cell) for slot in range(2) for cell in range(3) if (slot, cell) != (1, 2)} == {
        (0, State.EMPTY)
    }


@pytest.mark.parametrize(
    ("before", "why"),
    [
        ((), "not exported"),
        (("export", 6), "not exported"),
        (("export", 8), "overtaken"),
        (("export", 7, "open", 7), "opened before"),
        (("export", 7, "open", 7, "close", 7), "opened and closed"),
        (("export", 7, "revoke", 7), "revoked"),
    ],
)
def test_only_a_fresh_export_is_opened(table, before, why):
    for step, sequence in zip(before[::2], before[1::2], strict=True):
        getattr(table, step)(0, 0, sequence)
    was = table.read(0, 0)
    with pytest.raises(TransportBroken, match=why):
        table.open(0, 0, 7)
    assert table.read(0, 0) == was


def test_a_reader_tells_what_it_read_back(table):
    for sequence, found in ((7, 2**64 - 1), (8, 0)):
        table.export(1, 2, sequence)
        table.open(1, 2, sequence)
        assert table.close(1, 2, sequence, found)
        assert table.read_back(1, 2) == found
        assert table.read(1, 2) == (sequence, State.CLOSED)


def test_a_stale_release_changes_nothing(table):
    table.export(0, 0, 7)
    table.open(0, 0, 7)
    table.export(0, 0, 8)
    assert not table.close(0, 0, 7)
    assert table.read(0, 0) == (8, State.EXPORTED)
    assert not table.close(0, 0, 8), "closed without having been opened"


def test_the_greatest_sequence_fits(table):
    table.export(0, 0, MAX_SEQUENCE - 1)
    assert table.read(0, 0) == (MAX_SEQUENCE - 1, State.EXPORTED)
    with pytest.raises(ValueError, match="sequence"):
        table.export(0, 0, MAX_SEQUENCE)


def test_a_cell_nobody_here_wrote_is_no_state():
    memory = bytearray(b"\xff" * CELL_BYTES)
    assert FenceTable(memoryview(memory), 1, 1).read(0, 0) == (0, State.EMPTY)


@pytest.mark.parametrize(("slot", "cell"), [(2, 0), (-1, 0), (0, 3), (0, -1)])
def test_there_is_no_cell_outside_the_table(table, slot, cell):
    with pytest.raises(ValueError, match="no cell"):
        table.read(slot, cell)


def test_the_table_fits_its_memory():
    with pytest.raises(ValueError, match="no table"):
        FenceTable(memoryview(bytearray(8)), 1, 2)


_WRITER = """
import mmap, sys
from weightsync.ipc.fences import CELL_BYTES, FenceTable
memory = mmap.mmap(int(sys.argv[1]), 4096)
table = FenceTable(memoryview(memory)[:CELL_BYTES], 1, 1)
for _ in range(50_000):
    table.export(0, 0, 0)
    table.revoke(0, 0, 2**60 - 1)
table.export(0, 0, 1)
"""


def test_no_cell_is_ever_seen_half_written(tmp_path):
    """Another process alternates between two values that differ in nearly every byte."""
    fd = os.open(tmp_path / "cells", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 4096)
    with mmap.mmap(fd, 4096) as memory:
        view = memoryview(memory)[:CELL_BYTES]
        table = FenceTable(view, 1, 1)
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(fd)], pass_fds=(fd,), env=os.environ | {"PYTHONPATH": os.getcwd()}
        )
        allowed = {(0, State.EMPTY), (0, State.EXPORTED), (2**60 - 1, State.REVOKED)}
        while (seen := table.read(0, 0)) != (1, State.EXPORTED):
            assert seen in allowed
            assert writer.poll() in (None, 0)
        assert writer.wait(30) == 0
        del table
        view.release()
    os.close(fd)
