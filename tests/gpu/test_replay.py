"""What a worker learns of its loader and does without it, with weights and buckets on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.replay_kit import Model, read_buckets, same
from weightsync.replay.model import ModelState
from weightsync.replay.state import ModelReplay
from weightsync.replay.sums import HostSums, tensor_checksum

pytestmark = pytest.mark.timeout(120)

H, EXPERTS = 96, 6


def parameters() -> dict[str, torch.Tensor]:
    """As engines hold them: fused, stacked, padded, transposed, and one that the loader computes."""
    return {
        "embed.weight": torch.zeros(128, H, dtype=torch.bfloat16),
        "qkv.weight": torch.zeros(3 * H, H, dtype=torch.bfloat16),
        "experts.w13": torch.zeros(EXPERTS, 2 * 40, H, dtype=torch.bfloat16),
        "experts.w2": torch.zeros(EXPERTS, H, 40, dtype=torch.bfloat16),
        "head.weight": torch.zeros(H, 100),
        "norm.weight": torch.zeros(H, dtype=torch.bfloat16),
        "scaled.weight": torch.zeros(33),
    }


def load(held, tensors):
    for name, tensor in tensors:
        kind, _, rest = name.partition(".")
        if kind == "embed":
            held["embed.weight"][: tensor.shape[0]].copy_(tensor)
            held["embed.weight"][tensor.shape[0] :].fill_(0)
        elif kind in "qkv":
            held["qkv.weight"].narrow(0, "qkv".index(kind) * H, H).copy_(tensor)
        elif kind == "experts":
            number, _, which = rest.partition(".")
            home = held["experts.w2" if which == "down" else "experts.w13"][int(number)]
            home.narrow(0, 40 if which == "up" else 0, 40).copy_(tensor) if which != "down" else home.copy_(tensor)
        elif kind == "head":
            held["head.weight"].copy_(tensor.t())  # and wider on its way
        elif kind == "norm":
            held["norm.weight"].copy_(tensor)
        else:
            held["scaled.weight"].copy_(tensor * 2)


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    found = {"embed.weight": some(101, H), **{f"{kind}.weight": some(H, H) for kind in "qkv"}}
    for expert in range(EXPERTS):
        found |= {f"experts.{expert}.{which}": some(40, H) for which in ("gate", "up")}
        found[f"experts.{expert}.down"] = some(H, 40)
    return found | {"head.weight": some(100, H), "norm.weight": some(H), "scaled.weight": some(33).float()}


@pytest.mark.parametrize("slot_bytes", [1 << 20, 32 << 10, 8 << 10])
def test_replay_on_a_gpu_is_what_the_loader_does(slot_bytes):
    model, replay = Model(parameters(), load).cuda(), ModelReplay({})
    for seed in range(5):
        model.push(replay, weights(seed), slot_bytes, pull=seed > 3)
        torch.cuda.synchronize()
        found = {name: tensor.cpu() for name, tensor in ModelState.of(model).tensors.items()}
        wanted = Model(parameters(), load).loaded(weights(seed))
        assert all(same(found[name], wanted[name]) for name in wanted), seed
    facts = replay.facts()
    assert (facts.phase, facts.by_loader) == ("replay", 1), facts
    assert set(model.heard) == {"scaled.weight"}


def test_fingerprints_of_a_gpu_are_those_of_the_host():
    model, replay = Model(parameters(), load).cuda(), ModelReplay({})
    for seed in range(3):
        model.push(replay, weights(seed))
    manifest, _ = read_buckets(weights(0), 1 << 20)
    state = ModelState.tensors_of(model)
    residents = replay.residents(manifest.digest, state)
    assert residents is not None
    told = replay.fingerprints(residents, state)
    assert told == HostSums(residents).fingerprints({name: tensor.cpu() for name, tensor in state.tensors.items()})
    assert np.count_nonzero(np.frombuffer(told, "<u8")) == len(residents.held)
    before = tensor_checksum(state.tensors["qkv.weight"])
    with torch.no_grad():
        model.get_parameter("qkv.weight")[5, 7] += 1
    assert tensor_checksum(state.tensors["qkv.weight"]) != before
    assert replay.fingerprints(residents, state) != told
