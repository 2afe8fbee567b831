"""Another process writes into a worker's parameters on a GPU, where the worker shows that they are."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from tests.hand_push import Tensors, as_bytes, manifest_of, soon
from tests.places_kit import write_elsewhere
from weightsync.adapters.worker import SlotReader
from weightsync.plan.draws import Wanted, Wants
from weightsync.plan.exposure import Exposure

pytestmark = pytest.mark.timeout(180)

H = 96
NAMES = ("big", "k", "q", "scale", "turned")


class Parameters:
    """Fused, transposed, one by itself in an allocation, and a scalar; this rank has the lower half of `big`."""

    def __init__(self) -> None:
        self.fused = torch.zeros(2 * H, H, dtype=torch.bfloat16, device="cuda")
        self.turned = torch.zeros(H, 100, device="cuda")
        self.big = torch.zeros(6 << 20, dtype=torch.uint8, device="cuda")
        self.scale = torch.zeros((), device="cuda")

    @property
    def targets(self) -> list[int]:
        return [one.data_ptr() for one in (self.fused, self.turned, self.big, self.scale)]

    def holds(self, weights: dict[str, torch.Tensor]) -> bool:
        return (
            torch.equal(self.fused.cpu(), torch.cat([weights["q"], weights["k"]]))
            and torch.equal(self.turned.cpu(), weights["turned"].t())
            and torch.equal(self.big.cpu(), weights["big"][6 << 20 :])
            and torch.equal(self.scale.cpu(), weights["scale"])
        )


BOXES = (
    Wanted(NAMES.index("q"), (0, 0), (H, H), 2, 0, 0, (2 * H, 2)),
    Wanted(NAMES.index("k"), (0, 0), (H, H), 2, 0, 2 * H * H, (2 * H, 2)),
    Wanted(NAMES.index("turned"), (0, 0), (100, H), 4, 1, 0, (4, 400)),
    Wanted(NAMES.index("big"), (6 << 20,), (6 << 20,), 1, 2, 0, (1,)),
    Wanted(NAMES.index("scale"), (), (), 4, 3, 0, ()),
)


def weights(seed: int) -> dict[str, torch.Tensor]:
    some = torch.Generator().manual_seed(seed)
    return {
        "big": torch.randint(256, (12 << 20,), generator=some, dtype=torch.uint8),
        "k": torch.randn(H, H, generator=some).to(torch.bfloat16),
        "q": torch.randn(H, H, generator=some).to(torch.bfloat16),
        "scale": torch.randn((), generator=some),
        "turned": torch.randn(100, H, generator=some),
    }


def test_what_another_process_writes_is_in_the_parameters(gpus):
    held, digests = Parameters(), []
    with closing(SlotReader("cuda:0")) as slots:
        for seed, writer in enumerate((0, gpus - 1, 0)):
            sent = weights(seed)
            tensors: Tensors = as_bytes(sent.items())
            manifest = manifest_of(tensors, slot_bytes=16 << 20)
            assert manifest.tensors.names == NAMES
            if seed == 2:  # it moves
                kept = held.big
                held.big = torch.zeros_like(kept)
                assert held.big.data_ptr() != kept.data_ptr()
            slots.begin(manifest, [], deadline=soon())
            told = slots.places(Wants(BOXES, held.targets), ())
            assert told.why_not == ""
            digests.append(Exposure.unpack(told.places, manifest.tensors).digest)
            assert slots.places(Wants(BOXES, held.targets), digests).places == digests[-1]
            write_elsewhere([told.places], manifest, tensors, writer)
            assert slots.finish()
            assert held.holds(sent), seed
    assert digests[0] == digests[1] != digests[2]
