"""Memory that a keeper's GPU copies to, locked by a driver that is made here."""

from __future__ import annotations

import gc

import pytest
import torch

from weightsync.keeper.memory import LockedMemory

PAGE = 2 << 20


class Driver:
    """Notes what is locked; refuses where it is told to."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.locks = 0
        self.refusal = ""

    def lock(self, address: int, nbytes: int, device: int) -> str:
        assert (address % 4096, nbytes % PAGE, device) == (0, 0, 3)
        self.locks += 1
        if not self.refusal:
            self.locked[address] = nbytes
        return self.refusal

    def unlock(self, address: int, device: int) -> None:
        assert device == 3
        del self.locked[address]


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def memory(driver):
    return LockedMemory(3, driver.lock, driver.unlock)


def test_what_is_taken_is_locked_and_holds_what_is_put_there(memory, driver):
    one, two = memory.take(1000), memory.take(3 << 20)
    assert (one.shape, one.dtype) == ((1000,), torch.uint8)
    assert driver.locked == {one.data_ptr(): PAGE, two.data_ptr(): 2 * PAGE}
    one.fill_(1)
    two.fill_(2)
    assert int(one.sum()) == 1000
    assert memory.spare == 0


def test_what_nothing_looks_at_is_used_again(memory, driver):
    taken = memory.take(1000)
    view = taken[512:].view(torch.bfloat16)
    address = taken.data_ptr()
    del taken
    gc.collect()
    assert memory.spare == 0, "a view is left"
    view.fill_(1)
    del view
    gc.collect()
    assert memory.spare == PAGE
    again = memory.take(2000)
    assert again.data_ptr() == address
    assert (memory.spare, driver.locks) == (0, 1)


def test_another_layout_takes_no_more_than_the_last(memory, driver):
    taken = [memory.take(PAGE * 3) for _ in range(4)]
    del taken
    gc.collect()
    assert memory.spare == 12 * PAGE
    other = [memory.take(PAGE * 2) for _ in range(6)]
    assert sum(driver.locked.values()) == 12 * PAGE
    assert memory.spare == 0
    assert {t.data_ptr() for t in other} == driver.locked.keys()


def test_memory_that_cannot_be_locked_is_used_all_the_same(memory, driver, caplog):
    driver.refusal = "cudaErrorMemoryAllocation: out of memory"
    several = [memory.take(PAGE) for _ in range(3)]
    several[0].fill_(7)
    assert [r.getMessage() for r in caplog.records] == [
        f"host memory cannot be locked, and is copied to more slowly: {driver.refusal}"
    ]
    del several
    gc.collect()
    memory.take(5 * PAGE)  # nothing is unlocked that was not locked
    assert driver.locked == {}
