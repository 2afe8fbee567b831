"""Frames: what each bucket of a push costs in messages, and the largest that a push has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.bench_plan import published
from tests.wire_examples import EXAMPLES
from weightsync.wire.codec import decode_untrusted, encode
from weightsync.wire.messages import Describe, Filled, Lease

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


def test_a_lease_and_its_answer(benchmark: BenchmarkFixture) -> None:
    pair = (
        Lease(id=7, bucket=1, bridge=0, slot=2),
        Filled(id=7, bucket=1, nbytes=1 << 30, tensors=bytes(4 * 400), fingerprints=bytes(8 * 400)),
    )
    assert benchmark(lambda: tuple(decode_untrusted(encode(message)) for message in pair)) == pair


def test_one_of_every_message(benchmark: BenchmarkFixture) -> None:
    assert benchmark(lambda: tuple(decode_untrusted(encode(message)) for message in EXAMPLES)) == EXAMPLES


def test_the_description_of_a_rank(benchmark: BenchmarkFixture) -> None:
    message = Describe(id=7, layout=published("qwen3-30b-a3b", 8)[0].pack())
    assert benchmark(lambda: decode_untrusted(encode(message))) == message
