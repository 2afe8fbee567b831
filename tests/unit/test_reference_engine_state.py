"""What an engine may do when: pausing, tearing, mending. Its workers are fakes that answer at once or when told."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.hand_push import Tensors, manifest_of, soon
from weightsync.adapters.reference import engine as engine_module
from weightsync.adapters.reference.commands import Accept, Begin, Command, Finish, Load, Reply, Step
from weightsync.adapters.reference.config import ModelConfig
from weightsync.adapters.reference.engine import Engine, Generated
from weightsync.adapters.reference.gate import RequestError
from weightsync.adapters.reference.sharding import checkpoint_tensors
from weightsync.adapters.reference.turns import Turns
from weightsync.errors import EngineLost
from weightsync.testing import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.plan.manifest import Manifest

CONFIG = ModelConfig(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=4,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=2,
    max_position_embeddings=64,
    eos_token_id=(9,),
)
TENSORS: Tensors = {name: ("float32", shape, b"") for name, shape in checkpoint_tensors(CONFIG).items()}
WHOLE = manifest_of(TENSORS, slot_bytes=1 << 16)
NORMS = manifest_of({name: TENSORS[name] for name in TENSORS if "norm" in name}, slot_bytes=1 << 16)
EMPTY = manifest_of({}, slot_bytes=1 << 16)


class Workers:
    """Two ranks. A step answers token 1; `reply` decides about anything else; `hold` stops steps until it is set."""

    tp_size = 2
    processes = ()

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.reply: Callable[[int, Command], Reply] = lambda rank, command: Reply(token=1)
        self.stepping = threading.Semaphore(0)  # released at each step
        self.hold = threading.Event()
        self.hold.set()

    def call(self, command: Command, *, deadline: float) -> list[Reply]:
        return self.call_each(lambda rank: command, deadline=deadline)

    def call_each(self, command: Callable[[int], Command], *, deadline: float) -> list[Reply]:
        self.commands.append(command(0))
        if isinstance(command(0), Step):
            self.stepping.release()
            assert self.hold.wait(20)
        return [self.reply(rank, command(rank)) for rank in range(self.tp_size)]


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
def engine(workers: Workers) -> Engine:
    return make(workers)


def make(workers: Workers, *, blank: bool = False, on_lost: Callable[[], None] = lambda: None) -> Engine:
    return Engine(CONFIG, workers, name="e", blank=blank, on_lost=on_lost)  # type: ignore[arg-type]


def accept(engine: Engine, manifest: Manifest) -> tuple[str, ...]:
    return engine.accept(manifest.digest, manifest.pack(), deadline=soon()).problems


def begin(engine: Engine, version: int, manifest: Manifest) -> None:
    engine.begin(version, manifest.digest, [[b"a"], [b"b"]], deadline=soon())


def push(engine: Engine, version: int, manifest: Manifest) -> None:
    assert accept(engine, manifest) == ()
    begin(engine, version, manifest)
    for bucket in range(manifest.buckets):
        engine.load(bucket, [b"a", b"b"], deadline=soon())
    engine.finish(version, deadline=soon())


class Request(threading.Thread):
    """A request in flight."""

    def __init__(self, engine: Engine, max_tokens: int, seconds: float = 20.0) -> None:
        super().__init__(daemon=True)
        self.answer: Generated | RequestError | None = None
        self._ask = lambda: engine.generate([1, 2], max_tokens, deadline=soon(seconds))
        self.start()

    def run(self) -> None:
        try:
            self.answer = self._ask()
        except RequestError as error:
            self.answer = error

    def result(self) -> Generated:
        self.join(timeout=20)
        assert isinstance(self.answer, Generated), self.answer
        return self.answer


def refused(status: int, words: str) -> pytest.RaisesExc[RequestError]:
    return pytest.raises(RequestError, match=words, check=lambda error: error.status == status)


def test_a_push_and_what_the_workers_are_told(engine: Engine, workers: Workers) -> None:
    push(engine, 3, WHOLE)
    assert [type(command) for command in workers.commands] == [Accept, Begin, Load, Finish]
    assert (engine.version, engine.torn, engine.info()["updating"]) == (3, True, None)  # nobody has found it right yet
    engine.resume(deadline=soon())
    assert (engine.version, engine.torn) == (3, False)
    tickets: list[bytes] = []

    def reply(rank: int, command: Command) -> Reply:
        tickets.append(getattr(command, "ticket", b""))
        return Reply()

    workers.reply = reply
    begin(engine, 4, WHOLE)
    engine.load(0, [b"for 0", b"for 1"], deadline=soon())
    assert tickets[-2:] == [b"for 0", b"for 1"]


def test_torn_from_begin_to_finish(engine: Engine) -> None:
    accept(engine, WHOLE)
    begin(engine, 1, WHOLE)
    assert engine.torn
    assert engine.info()["updating"] == 1
    with refused(409, "torn"):
        engine.resume(deadline=soon())
    with refused(409, "the open update is to 1"):
        engine.finish(2, deadline=soon())
    engine.finish(1, deadline=soon())
    engine.resume(deadline=soon())
    assert not engine.torn


def test_an_empty_update_is_an_update(engine: Engine) -> None:
    push(engine, 5, EMPTY)
    assert engine.version == 5
    begin(engine, 6, EMPTY)
    assert engine.torn
    begin(engine, 7, EMPTY)
    engine.finish(7, deadline=soon())
    assert not engine.torn


def test_commands_out_of_order(engine: Engine) -> None:
    with refused(409, "no such manifest"):
        begin(engine, 1, WHOLE)
    with refused(409, "begin first"):
        engine.load(0, [b"", b""], deadline=soon())
    with refused(409, "no update is open"):
        engine.finish(1, deadline=soon())
    with refused(400, "offers for 1 ranks, not 2"):
        engine.begin(1, WHOLE.digest, [[]], deadline=soon())
    with refused(400, "tickets for 3 ranks, not 2"):
        engine.load(0, [b""] * 3, deadline=soon())
    assert not engine.torn


def test_a_torn_engine_is_mended_by_what_the_broken_update_touched(engine: Engine) -> None:
    """A push of part of the model that broke is mended by the same part; less than it is not enough."""
    accept(engine, WHOLE)
    accept(engine, NORMS)
    begin(engine, 1, NORMS)
    push(engine, 2, NORMS)
    engine.resume(deadline=soon())
    assert not engine.torn
    begin(engine, 3, WHOLE)
    with refused(409, "no whole version of"):
        begin(engine, 4, NORMS)
    assert engine.info()["updating"] == 3  # a refused begin changes nothing
    problems = accept(engine, manifest_of({"model.norm.weight": TENSORS["model.norm.weight"]}, slot_bytes=1 << 16))
    assert len(problems) == len(TENSORS) - 1
    push(engine, 5, WHOLE)
    with refused(409, "no whole version of"):  # finished, but nobody has found it right: it may have arrived wrong
        begin(engine, 6, NORMS)
    engine.resume(deadline=soon())
    push(engine, 6, NORMS)


def test_a_blank_engine_needs_everything(workers: Workers) -> None:
    engine = make(workers, blank=True)
    with refused(503, "no weights yet"):
        engine.generate([1], 1, deadline=soon())
    assert len(accept(engine, NORMS)) == len(TENSORS) - len(NORMS.tensors)
    push(engine, 1, WHOLE)
    assert not engine.blank
    assert engine.generate([1], 2, deadline=soon()).token_ids == [1, 1]


def test_a_worker_error_ends_the_update_and_closes_the_gate(engine: Engine, workers: Workers) -> None:
    accept(engine, WHOLE)
    begin(engine, 1, WHOLE)
    workers.reply = lambda rank, command: Reply(status=500, error="checksum") if rank else Reply(status=409, error="no")
    with refused(500, "tp_rank 1: checksum"):
        engine.load(0, [b"", b""], deadline=soon())
    workers.reply = lambda rank, command: Reply(token=1)
    assert (engine.torn, engine.paused, engine.info()["updating"]) == (True, True, None)
    with refused(409, "begin first"):
        engine.load(0, [b"", b""], deadline=soon())
    push(engine, 2, WHOLE)
    assert engine.paused
    engine.resume(deadline=soon())


def test_a_command_out_of_order_does_not_end_the_update(engine: Engine, workers: Workers) -> None:
    accept(engine, WHOLE)
    begin(engine, 1, WHOLE)
    workers.reply = lambda rank, command: Reply(status=409, error="loaded before")
    with refused(409, "loaded before"):
        engine.load(0, [b"", b""], deadline=soon())
    assert not engine.paused
    workers.reply = lambda rank, command: Reply()
    engine.finish(1, deadline=soon())


def test_keep_holds_requests_and_they_go_on_with_new_weights(engine: Engine, workers: Workers) -> None:
    workers.hold.clear()
    request = Request(engine, 3)
    assert workers.stepping.acquire(timeout=20)
    pausing = threading.Thread(target=lambda: engine.pause("keep", deadline=soon()))
    pausing.start()
    workers.hold.set()
    pausing.join(timeout=20)
    steps = [command for command in workers.commands if isinstance(command, Step)]
    assert engine.paused
    push(engine, 8, WHOLE)
    engine.resume(deadline=soon())
    answer = request.result()
    assert (answer.token_ids, answer.finish_reason, answer.weight_version) == ([1, 1, 1], "length", 8)
    later = [command for command in workers.commands if isinstance(command, Step)][len(steps) :]
    assert later[0].start == 0  # all of it again: what was cached came from other weights
    assert len(later[0].tokens) == 2 + len(steps)
    assert all(step.start > 0 and len(step.tokens) == 1 for step in later[1:])


def test_a_kept_request_gives_up_at_its_deadline(engine: Engine) -> None:
    engine.pause("keep", deadline=soon())
    with refused(503, "not resumed in time"):
        engine.generate([1], 1, deadline=soon(0.05))


def test_wait_lets_requests_in_flight_end_and_refuses_new_ones(engine: Engine, workers: Workers) -> None:
    workers.hold.clear()
    request = Request(engine, 3)
    assert workers.stepping.acquire(timeout=20)
    pausing = threading.Thread(target=lambda: engine.pause("wait", deadline=soon()))
    pausing.start()
    workers.hold.set()
    pausing.join(timeout=20)
    assert request.result().finish_reason == "length"
    assert engine.paused
    with refused(503, "paused"):
        engine.generate([1], 1, deadline=soon())
    engine.pause("wait", deadline=soon())  # again
    engine.resume(deadline=soon())
    assert engine.generate([1], 1, deadline=soon()).token_ids == [1]


def test_wait_that_takes_too_long_leaves_the_engine_serving(engine: Engine, workers: Workers) -> None:
    go_on = threading.Event()

    def slow(rank: int, command: Command) -> Reply:
        go_on.wait(0.02)
        return Reply(token=1)

    workers.reply = slow
    request = Request(engine, 60)
    assert workers.stepping.acquire(timeout=20)
    with refused(504, "1 requests did not end in time"):
        engine.pause("wait", deadline=soon(1.0))
    go_on.set()
    assert request.result().finish_reason == "length"
    assert not engine.paused


@pytest.mark.parametrize("first", ["open", "keep"])
def test_abort_ends_requests_with_what_they_have(engine: Engine, workers: Workers, first: str) -> None:
    workers.hold.clear()
    request = Request(engine, 50)
    assert workers.stepping.acquire(timeout=20)
    pausing = threading.Thread(target=lambda: engine.pause("keep" if first == "keep" else "none", deadline=soon()))
    pausing.start()
    workers.hold.set()
    pausing.join(timeout=20)
    engine.pause("abort", deadline=soon())
    answer = request.result()
    assert answer.finish_reason == "abort"
    assert 1 <= len(answer.token_ids) < 50
    with refused(503, "paused"):
        engine.generate([1], 1, deadline=soon())
    engine.resume(deadline=soon())


def test_no_pause_is_no_pause(engine: Engine) -> None:
    engine.pause("none", deadline=soon())
    assert not engine.paused
    engine.pause("keep", deadline=soon())
    engine.pause("none", deadline=soon())
    assert engine.paused


def test_an_update_that_nobody_carries_on_stops_a_serving_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(engine, WHOLE)
    begin(engine, 1, WHOLE)
    assert engine.generate([1], 1, deadline=soon()).token_ids == [1]  # pause="none": that is what was asked for
    monkeypatch.setattr(engine_module, "_STALLED_SECONDS", -1.0)
    with refused(503, "not resumed in time"):
        engine.generate([1], 1, deadline=soon(0.05))
    assert engine.paused


def test_a_lost_worker_is_the_end(workers: Workers) -> None:
    lost = threading.Event()
    engine = make(workers, on_lost=lost.set)

    def reply(rank: int, command: Command) -> Reply:
        raise EngineLost("a worker is lost")

    workers.reply = reply
    with refused(500, "a worker is lost"):
        engine.generate([1], 1, deadline=soon())
    assert lost.is_set()


def test_generation_ends_at_an_end_token_and_caches_are_given_back(engine: Engine, workers: Workers) -> None:
    tokens = iter([4, 4, 9, 9, 5])
    workers.reply = lambda rank, command: Reply(token=next(tokens) if rank == 0 else 0)
    assert engine.generate([1], 10, deadline=soon()).token_ids == [4, 4, 9]
    assert engine.generate([1], 10, deadline=soon()) == Generated([9], [0.0], "stop", None)
    engine.generate([1], 1, deadline=soon())
    steps = [command for command in workers.commands if isinstance(command, Step)]
    assert [step.ended for step in steps] == [(), (), (), (steps[0].sequence,), (steps[3].sequence,)]


@pytest.mark.parametrize(("prompt", "count"), [([], 1), ([10], 1), ([-1], 1), ([1], 0), ([1], 64)])
def test_requests_are_checked(engine: Engine, workers: Workers, prompt: list[int], count: int) -> None:
    with refused(400, r"prompt_ids|max_tokens"):
        engine.generate(prompt, count, deadline=soon())
    assert not workers.commands


def test_hostile_manifests_are_refused(engine: Engine, workers: Workers) -> None:
    with refused(400, "."):
        engine.accept(WHOLE.digest, b"\x00" * 40, deadline=soon())
    with refused(400, "digest is"):
        engine.accept(NORMS.digest, WHOLE.pack(), deadline=soon())
    assert not workers.commands


def test_turns_come_in_the_order_of_asking() -> None:
    turns, order, waiting = Turns(), [], []

    def more_than(number: int) -> bool:
        return len(turns._waiting) > number

    with turns.take(deadline=soon()):

        def ask(number: int) -> None:
            with turns.take(deadline=soon()):
                order.append(number)

        for number in range(5):
            waiting.append(threading.Thread(target=ask, args=(number,)))
            waiting[-1].start()
            assert eventually(partial(more_than, number))
        with pytest.raises(TimeoutError), turns.take(deadline=soon(0.01)):
            pass
    for thread in waiting:
        thread.join(timeout=20)
    assert order == [0, 1, 2, 3, 4]
    with turns.take(deadline=soon(0)):
        pass
