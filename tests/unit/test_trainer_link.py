"""A trainer rank's line to its daemon."""

from __future__ import annotations

import threading
import time

import zmq

from weightsync.wire import messages as msg
from weightsync.wire.trainer_link import TrainerLink


def test_a_short_wait_ends(tmp_path):
    """A rank that fills looks for messages between looks at its GPU. CPython's SimpleQueue (3.11, 3.12) may never
    return from such a look: where nobody had to wait for the message before, and the thread is held up for longer
    than it was to wait, it goes on with a negative timeout, which means none.
    """
    link = TrainerLink(f"ipc://{tmp_path}/d.sock")
    looks = []

    def look():
        for _ in range(20_000):
            link._inbox.put(msg.Drawn())
            assert link.receive(time.monotonic() + 10) == msg.Drawn()
            looks.append(link.receive(time.monotonic() + 1e-6))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(20)
    assert len(looks) == 20_000
    assert not any(looks)
    link.close()


def test_its_thread_can_be_roused_from_the_first_moment_on(tmp_path, monkeypatch):
    """A call that comes before the thread runs would else be noticed a minute later, when it looks anyway."""

    class Late(threading.Thread):
        def start(self):
            pass

    with monkeypatch.context() as patched:
        patched.setattr(threading, "Thread", Late)
        link = TrainerLink(f"ipc://{tmp_path}/d.sock")
    try:
        link._wake.send(b"", zmq.DONTWAIT)  # raises `zmq.Again` where it is for nobody
    finally:
        threading.Thread.start(link._thread)
        link.close(flush=0)
