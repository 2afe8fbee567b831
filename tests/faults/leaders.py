"""Two nodes, each the other's peer, on either of which trainers push: two models have engines on both nodes, two more
on one node alone.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.faults.kit import ARENA, TIMEOUTS, TRAINER, Node, Rank, segments, until
from tests.own import free_port, named
from weightsync.fleet import Daemon, Fleet
from weightsync.operator import fetch_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODELS = {"default": ("x1", "x2"), "other": ("y1", "y2")}  # the first engine of each on the first node
ALONE = {"near": "a1", "far": "a2"}  # each on one node alone


@contextmanager
def two_leaders(prepared: Callable[[Fleet], None], no_surprises: Callable[..., None]) -> Iterator[Node]:
    """Two nodes, each the other's peer, with an engine of each of two models on each."""
    with Fleet() as fleet:
        prepared(fleet)
        engines = [
            fleet.start_engine(
                name, fleet.root / "A", model=model, port=free_port(), flags=["--enable-faults"], wait=False
            )
            for i in range(2)
            for model, name in [*((model, names[i]) for model, names in MODELS.items()), list(ALONE.items())[i]]
        ]
        trainer = fleet.spawn("trainer", [str(TRAINER), str(fleet.root / "trainer.sock")])
        for engine in engines:
            fleet.wait_engine(engine)
        until((fleet.root / "trainer.sock").exists, "the trainer listens", 30)
        names = [named(f"lead{i}") for i in range(2)]
        daemons = [
            fleet.start_daemon(
                name,
                engines[3 * i : 3 * i + 3],
                peers={names[1 - i]: f"ipc://{fleet.root / names[1 - i]}.sock"},
                arena=ARENA,
                timeouts={**TIMEOUTS, "operation": 12},
                log={"level": "debug"},
                wait=False,
            )
            for i, name in enumerate(names)
        ]
        for daemon in daemons:
            fleet.wait_daemon(daemon, engines=3, peers=1)
        node = Node(fleet, daemons[0], engines, trainer, [daemons[1]])
        yield node
        no_surprises(*daemons)
    assert not any(segments(name) for name in names)


def daemons_of(node: Node) -> list[Daemon]:
    """Both."""
    return [node.daemon, *node.others]


def call(node: Node, rank: Rank, daemon: Daemon, model: str = "default", **terms: Any) -> Rank:
    """A rank that is alone in its trainer pushes on the node of this daemon."""
    terms = {"version": node.next_version(), "model": model, **terms}
    return rank.push(**node.terms(0, 1, **terms) | {"endpoint": daemon.endpoint})


def all_is_well(node: Node) -> None:
    """A push of each model that both have, from either node, reaches both engines, and nothing is left."""
    while node.ranks:
        node.ranks.pop().close()
    until(lambda: all(fetch_status(d.endpoint).push is None for d in daemons_of(node)), "no push is under way")
    for daemon in daemons_of(node):
        for model in MODELS:
            (rank,) = node.start_ranks(1)
            report = call(node, rank, daemon, model, group="after").report()
            assert report["complete"], report
    while node.ranks:
        node.ranks.pop().close()
    node.nothing_left()
