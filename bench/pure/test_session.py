"""The session's share of a push: all of its events are handled, and its promises checked after each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.session_world import World

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


def _push(**world: int) -> int:
    """Run a push from beginning to end. Returns how many events the session heard."""
    one = World(**world)  # type: ignore[arg-type]  # only parameters that are numbers
    one.open_all()
    one.run()
    assert one.session.ended
    return len(one.history)


def test_a_push_of_60_buckets(benchmark: BenchmarkFixture) -> None:
    assert benchmark(lambda: _push(world=2, buckets=60, slots=3, owners=2)) > 240


def test_a_push_of_32_ranks(benchmark: BenchmarkFixture) -> None:
    assert benchmark(lambda: _push(world=32, buckets=60, slots=3, owners=8)) > 1000
