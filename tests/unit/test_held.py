"""What an engine with our plugin says it holds, compared with what was sent."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from tests.replay_kit import Model, read_buckets
from weightsync.adapters.held import HeldCheck, HeldSums, packed_boxes, sums_of
from weightsync.errors import EngineError
from weightsync.fingerprint import fingerprint
from weightsync.replay.model import ModelState
from weightsync.replay.residents import resident_box
from weightsync.replay.state import ModelReplay
from weightsync.replay.strided import Box

SHAPES = {"q": (8, 6), "k": (4, 6), "norm": (6,), "odd": (6, 4)}


def load(rank):
    """As rank `rank` of two: halves of q and k fused, the norm whole, and every other row of the last."""

    def loader(targets, tensors):
        for name, tensor in tensors:
            if name in "qk":
                mine = tensor.chunk(2)[rank]
                targets["attn.qk"].narrow(0, 0 if name == "q" else 4, len(mine)).copy_(mine)
            elif name == "odd":
                targets["odd.weight"].copy_(tensor[rank::2])
            else:
                targets["norm.weight"].copy_(tensor)

    return loader


class Engine:
    """Workers, two if nothing else is said, and what the daemon has of them."""

    def __init__(self, models=None):
        parameters = {"attn.qk": torch.zeros(6, 6), "norm.weight": torch.zeros(6), "odd.weight": torch.zeros(3, 4)}
        self.models = models or [Model(parameters, load(rank)) for rank in range(2)]
        self.replays = [ModelReplay({}) for _ in self.models]
        self.check = HeldCheck("e0")
        self.asked = 0  # for boxes

    def push(self, seed, shapes=SHAPES, *, slot_bytes=1 << 20, pull=False):
        generator = torch.Generator().manual_seed(seed)
        self.weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for model, replay in zip(self.models, self.replays, strict=True):
            model.push(replay, self.weights, slot_bytes, pull=pull)

    def verify(self, boxes=packed_boxes, slot_bytes=1 << 20, **how):
        manifest, _ = read_buckets(self.weights, slot_bytes)
        workers = [
            (r, manifest.digest, ModelState.tensors_of(m)) for r, m in zip(self.replays, self.models, strict=True)
        ]
        expected = [
            fingerprint(
                self.weights[name].numpy().reshape(-1).view(np.uint8),
                itemsize=4,
                global_shape=shape,
                offset=(0,) * len(shape),
                shape=shape,
            )
            for name, shape in zip(manifest.tensors.names, manifest.tensors.shapes, strict=True)
        ]

        class Asked:
            async def sums(_, manifest, *, deadline):
                return [sums_of(*worker) for worker in workers]

            async def boxes(_, manifest, *, deadline):
                self.asked += 1
                return [boxes(*worker) for worker in workers]

        return asyncio.run(self.check.verify(Asked(), manifest, np.array(expected, np.uint64), deadline=0.0, **how))


@pytest.fixture
def engine():
    return Engine()


def test_what_is_proved_is_compared_after_every_push(engine):
    engine.push(0)
    assert engine.verify() is None, "it was only recorded"
    for seed in (1, 2, 3):
        engine.push(seed)
        assert engine.verify() == 3, "every other row of a tensor is no box of it"
    assert engine.asked == 1
    assert [model.heard for model in engine.models] == [[], []]


def test_what_a_whole_comparison_allows(engine):
    def covers():
        return engine.check.covers(read_buckets(engine.weights, 1 << 20)[0])

    for seed in range(3):
        engine.push(seed)
        engine.verify()
    assert not covers(), "one tensor cannot be compared"
    fewer = {name: shape for name, shape in SHAPES.items() if name != "odd"}
    for seed, equal in ((0, False), (1, True), (2, True)):
        engine.push(seed, fewer)
        engine.verify()
        assert covers() == equal
    engine.models[0].get_parameter("norm.weight").data[0] = 7
    with pytest.raises(EngineError):
        engine.verify()
    assert not covers()


def test_a_byte_that_is_wrong_is_found_in_any_worker(engine):
    for seed in range(3):
        engine.push(seed)
    weight = engine.models[1].get_parameter("attn.qk")
    weight.data[5, 2] += 1
    with pytest.raises(EngineError, match=r"^'k' in the engine differs from what the trainer sent"):
        engine.verify()
    assert engine.check.doubtful
    weight.data[5, 2] -= 1
    engine.push(4)
    assert engine.verify() == 3
    assert not engine.check.doubtful
    engine.models[0].get_parameter("norm.weight").data[0] = 7
    with pytest.raises(EngineError, match="tp ranks 0 and 1 hold different bytes of 'norm'"):
        engine.verify()


def test_a_worker_that_cannot_tell_ends_the_comparison(engine):
    for seed in range(2):
        engine.push(seed)
    engine.replays[1].turn_off("as was asked")
    assert engine.verify() is None
    engine.models[0]._parameters.clear()
    assert sums_of(engine.replays[0], b"another manifest", ModelState.of(engine.models[0])) == HeldSums()


def test_what_was_pulled_has_to_be_compared(engine):
    fewer = {name: shape for name, shape in SHAPES.items() if name != "odd"}
    for seed in range(3):
        engine.push(seed, fewer)
        engine.verify()
    engine.push(3, fewer, pull=True)
    assert [replay.facts().pulled for replay in engine.replays] == [1, 1]
    assert engine.verify() == 3
    engine.push(4, fewer, pull=True)
    engine.replays[1].turn_off("as was asked")
    with pytest.raises(
        EngineError, match=r"pulled its weights unchecked.* cannot tell what lies in its memory"
    ) as told:
        engine.verify()
    assert "read and checked bucket by bucket" in str(told.value.hint)


def test_what_was_drawn_has_to_be_compared_even_if_the_workers_know_of_no_push(engine):
    engine.push(0)
    engine.replays = [None, None]  # they restarted since
    assert engine.verify() is None
    with pytest.raises(EngineError, match="cannot tell what lies in its memory"):
        engine.verify(drawn=True)


def test_a_tensor_that_one_workers_loader_keeps_is_compared_in_none():
    def computes(targets, tensors):
        for name, tensor in tensors:
            targets[f"{name}.weight"].copy_(tensor * 1.0 if name == "big" else tensor)

    def copies(targets, tensors):
        for name, tensor in tensors:
            targets[f"{name}.weight"].copy_(tensor)

    parameters = {"big.weight": torch.zeros(64, 8), "norm.weight": torch.zeros(6)}
    shapes = {"big": (64, 8), "norm": (6,)}
    engine = Engine([Model(parameters, load) for load in (copies, computes)])
    for seed in range(3):
        engine.push(seed, shapes, slot_bytes=512)
    assert engine.verify(slot_bytes=512) == 1, "the norm; the other is not looked at in the second worker"
    manifest, _ = read_buckets(engine.weights, 512)
    assert not engine.check.covers(manifest)
    engine.replays[1].begin(manifest, engine.models[1])
    names = [manifest.tensors.names[int(manifest.piece_tensor[p])] for p in range(manifest.pieces)]
    takes = [engine.replays[1].takes(bucket) for bucket in range(manifest.buckets)]
    assert takes == [names[manifest.bucket_pieces(b).start] != "big" for b in range(manifest.buckets)]


def test_a_worker_with_two_copies_that_differ_is_named():
    def twice(targets, tensors):
        for target in targets.values():
            target.copy_(tensors[0][1])

    engine = Engine([Model({"a.weight": torch.zeros(4), "b.weight": torch.zeros(4)}, twice)])
    for seed in range(2):
        engine.push(seed, {"w": (4,)})
    engine.models[0].get_parameter("b.weight").data[0] = 7
    with pytest.raises(EngineError, match="tp rank 0 holds twice, with different bytes of 'w'"):
        engine.verify()


def test_parameters_that_moved_since_are_not_spoken_of(engine):
    for seed in range(3):
        engine.push(seed)
    norm = engine.models[0].get_submodule("norm")
    norm.weight = torch.nn.Parameter(norm.weight.detach().clone(), requires_grad=False)
    assert engine.verify() is None


@pytest.mark.parametrize(
    ("boxes", "why"),
    [
        (lambda *worker: packed_boxes(*worker) + b"?", "contradict themselves about what they hold"),
        (lambda *worker: b"", "contradict themselves about what they hold"),
    ],
)
def test_answers_that_do_not_belong_together(engine, boxes, why):
    for seed in range(2):
        engine.push(seed)
    with pytest.raises(EngineError, match=why):
        engine.verify(boxes)


@pytest.mark.parametrize(
    ("source", "target", "offset", "box"),
    [
        # one run over two whole rows; a row's end; a column; transposed; one element; what goes over a row's end
        (Box(12, (6,), (2,)), Box(0, (6,), (2,)), (2, 0), Box(0, (2, 3), (6, 2))),
        (Box(8, (2,), (2,)), Box(4, (2,), (2,)), (1, 1), Box(4, (1, 2), (2, 2))),
        (Box(2, (4,), (6,)), Box(0, (4,), (2,)), (0, 1), Box(0, (4, 1), (2, 2))),
        (Box(0, (3, 4), (2, 6)), Box(0, (3, 4), (8, 2)), (0, 0), Box(0, (4, 3), (2, 8))),
        (Box(22, (), ()), Box(2, (), ()), (3, 2), Box(2, (1, 1), (2, 2))),
        (Box(4, (2,), (2,)), Box(0, (2,), (2,)), None, None),
        (Box(0, (2,), (12,)), Box(0, (2,), (2,)), None, None),
        (Box(1, (2,), (2,)), Box(0, (2,), (2,)), None, None),
        (Box(0, (3,), (0,)), Box(0, (3,), (2,)), None, None),
    ],
)
def test_which_box_of_a_tensor_a_run_of_its_bytes_is(source, target, offset, box):
    found = resident_box((4, 3), 2, source, target)
    assert found == ((offset, box) if offset is not None else None)
