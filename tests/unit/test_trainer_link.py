"""A trainer rank's line to its daemon."""

from __future__ import annotations

import threading

import zmq

from weightsync.wire.trainer_link import TrainerLink


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
