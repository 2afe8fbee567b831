"""A source whose measuring fails: every rank hears of it from the daemon, whatever it was."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from weightsync.errors import CodecError, PushAborted, SourceError, WeightSyncError
from weightsync.sources.tensors import TensorSource
from weightsync.trainer.place import TrainerPlace
from weightsync.trainer.rank import RankPush
from weightsync.trainer.rank_memory import RankMemory
from weightsync.wire import messages as msg


class Unmeasurable(TensorSource):
    error: Exception

    def measure(self) -> None:
        raise self.error


class Daemon:
    """A line to a daemon that asks for the layout, and ends the push with the error that a rank told it."""

    endpoint, patience = "ipc:///nobody", 0.0

    def __init__(self, *, answers: bool) -> None:
        self.heard: list[msg.Message] = []
        self._answers = answers
        self._to_say: list[msg.Message] = []

    def start(self) -> None:
        pass

    def rest(self) -> None:
        pass

    def send(self, message: Any) -> None:
        self.heard.append(message)
        if isinstance(message, msg.Open):
            self._to_say.append(msg.AskDescription(id=message.id))
        elif isinstance(message, msg.Failed) and self._answers:
            self._to_say.append(msg.Ended(id=message.id, error=message.error))

    def receive(self, deadline: float) -> msg.Message | None:
        return self._to_say.pop(0) if self._to_say else None


class Older(Daemon):
    """That cannot read what it is sent."""

    patience = 10.0

    def send(self, message: Any) -> None:
        self._to_say.append(msg.ErrorReply(error=CodecError("open: unknown field").record()))

    def receive(self, deadline: float) -> msg.Message | None:
        assert self._to_say, "nothing more is to be heard"
        return super().receive(deadline)


def test_where_the_call_itself_is_refused_nothing_more_is_waited_for(monkeypatch):
    memory = RankMemory()
    memory.give_link(Older(answers=True))  # type: ignore[arg-type]
    monkeypatch.setattr("weightsync.trainer.rank.memory", lambda: memory)
    with pytest.raises(CodecError, match="unknown field"):
        push_of(TensorSource({"a.weight": torch.ones(2, 2)})).run()


def push_of(source: TensorSource) -> RankPush:
    now = time.monotonic()
    return RankPush(
        source,
        place=TrainerPlace("trainer", 1, 2),
        version=3,
        model="default",
        endpoint=Daemon.endpoint,
        pause="keep",
        started=now,
        deadline=now + 30,
    )


@pytest.mark.parametrize("answers", [True, False], ids=["heard", "not heard"])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("no room"), "rank 1 failed: MemoryError('no room')"),
        (RuntimeError("all_gather: Connection closed by peer"), "Connection closed by peer"),
        (SourceError("a NaN"), "a NaN"),
        (PushAborted("trainer rank 0 failed: a NaN", rank=0), "trainer rank 0 failed: a NaN"),
    ],
    ids=["MemoryError", "RuntimeError", "SourceError", "PushAborted"],
)
def test_what_fails_as_values_are_measured_is_told_to_all(monkeypatch, error, words, answers):
    memory, daemon = RankMemory(), Daemon(answers=answers)
    memory.give_link(daemon)  # type: ignore[arg-type]
    monkeypatch.setattr("weightsync.trainer.rank.memory", lambda: memory)
    source = Unmeasurable({"a.weight": torch.ones(2, 2)})
    source.error = error
    push = push_of(source)
    with pytest.raises(WeightSyncError) as caught:
        push.run()
    opened, failed = daemon.heard
    assert isinstance(opened, msg.Open)
    assert opened.layout != source.layout().digest  # a daemon that knows that layout would not ask
    assert isinstance(failed, msg.Failed)
    assert words in failed.error.message
    assert failed.error.rank == (0 if isinstance(error, PushAborted) else 1)
    assert words in caught.value.message
    assert caught.value is error or caught.value.__cause__ is error
