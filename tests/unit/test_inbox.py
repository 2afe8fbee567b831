"""What a trainer rank waits for its daemon's words with."""

from __future__ import annotations

import random
import signal
import threading
import time

import pytest

from weightsync.wire.inbox import Inbox


def test_what_is_put_comes_out_in_order():
    inbox: Inbox[int] = Inbox()
    inbox.put(1)
    inbox.put(2)
    assert [inbox.get(0.0), inbox.get(0.0), inbox.get(0.0)] == [1, 2, None]
    inbox.put(3)
    inbox.put(4)
    inbox.clear()
    assert inbox.get(time.monotonic() + 0.001) is None


def test_a_reader_that_waits_is_woken_for_every_one():
    """Two threads put as fast as they can, and what each puts comes out in its order."""
    inbox: Inbox[tuple[int, int]] = Inbox()
    each = 20_000

    def write(number: int) -> None:
        for i in range(each):
            inbox.put((number, i))

    writers = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for writer in writers:
        writer.start()
    got = [inbox.get(time.monotonic() + 10) for _ in range(2 * each)]
    for writer in writers:
        writer.join()
    for number in range(2):
        assert [item[1] for item in got if item is not None and item[0] == number] == list(range(each))
    assert inbox.get(0.0) is None


def test_a_short_wait_ends():
    """A rank that fills looks for messages between looks at its GPU. CPython's SimpleQueue (3.11, 3.12) may never
    return from such a look: where nobody had to wait for the message before, and the thread is held up for longer
    than it was to wait, it goes on with a negative timeout, which means none.
    """
    inbox: Inbox[int] = Inbox()
    looks: list[int | None] = []

    def look():
        for number in range(20_000):
            inbox.put(number)
            assert inbox.get(time.monotonic() + 10) == number
            looks.append(inbox.get(time.monotonic() + 1e-6))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(20)
    assert looks == [None] * 20_000


def test_an_interrupt_in_a_wait_is_an_interrupt_and_harms_nothing(monkeypatch):
    """With `queue.Queue` it becomes "release unlocked lock" now and then, or leaves the lock held for good."""
    inbox: Inbox[str] = Inbox()
    monkeypatch.setattr("weightsync.wire.inbox._NAP", 0.005)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    moments = random.Random(0)
    try:
        for _ in range(3_000):
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it may come as soon as the timer runs
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + moments.random() * 6e-5)
                inbox.get(time.monotonic() + 20)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    threading.Thread(target=inbox.put, args=("still here",)).start()
    assert inbox.get(time.monotonic() + 10) == "still here"
