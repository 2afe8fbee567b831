"""What is recorded of a loader, what is proved of it, and what stays with it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import StringIO
from typing import Any

import msgspec
import pytest
import torch
from rich.console import Console

from tests.replay_kit import Model, read_buckets, same
from weightsync.cli.views import replay_details
from weightsync.plan.replay_facts import LAYOUTS, ReplayFacts, least
from weightsync.replay import state
from weightsync.replay.kernel import HostMoves
from weightsync.replay.model import ModelState
from weightsync.replay.moves import lay_out
from weightsync.replay.state import SWITCH, ModelReplay
from weightsync.wire.codec import decode_untrusted, encode
from weightsync.wire.messages import EngineStatus, Status


def weights(seed, **shapes):
    generator = torch.Generator().manual_seed(seed)
    return {name.replace("__", "."): torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def pushed(model, make, times=4, slot_bytes=1 << 20):
    """After so many pushes of weights of different seeds, each of which leaves what the loader would."""
    replay = ModelReplay({})
    for seed in range(times):
        now = make(seed)
        model.push(replay, now, slot_bytes)
        got = {name: tensor.clone() for name, tensor in ModelState.of(model).tensors.items()}
        heard = list(model.heard)
        wanted = model.loaded(now)
        model.heard = heard
        for name, tensor in wanted.items():
            assert same(tensor, got[name]), f"{name} in push {seed}"
    return replay


# --- what is replayed -----------------------------------------------------------------------------------------------


def load_layer(targets, tensors):
    """As the loaders of decoders do: rank 1 of 2, stacked projections, experts, a padded vocabulary."""
    for name, tensor in tensors:
        if name == "embed":
            targets["embed.weight"][: len(tensor)].copy_(tensor)
            targets["embed.weight"][len(tensor) :].fill_(0)
        elif name in "qkv":
            at = {"q": 0, "k": 8, "v": 12}[name]
            mine = tensor.chunk(2)[1]
            targets["attn.qkv"].narrow(0, at, len(mine)).copy_(mine)
        elif name == "o":
            targets["attn.o"].copy_(tensor.narrow(1, 8, 8))
        elif name.startswith("e"):
            expert, part = name[1:].split(".")
            if part == "down":
                targets["experts.w2"][int(expert)].copy_(tensor.t())
            else:
                targets["experts.w13"][int(expert)].chunk(2)[part == "up"].copy_(tensor)
        else:
            targets["norm.weight"].copy_(tensor)


LAYER = {
    "embed.weight": torch.zeros(12, 8),
    "attn.qkv": torch.zeros(16, 16),
    "attn.o": torch.zeros(16, 8),
    "experts.w13": torch.zeros(3, 8, 16),
    "experts.w2": torch.zeros(3, 4, 16),
    "norm.weight": torch.zeros(16, dtype=torch.bfloat16),
}


def layer(seed):
    found = weights(seed, embed=(10, 8), q=(16, 16), k=(8, 16), v=(8, 16), o=(16, 16), norm=(16,))
    for expert in range(3):
        found |= weights(
            seed + 10 * expert, **{f"e{expert}__gate": (4, 16), f"e{expert}__up": (4, 16), f"e{expert}__down": (16, 4)}
        )
    return found


@pytest.mark.parametrize("slot_bytes", [1 << 20, 1024, 512])
def test_a_layer_is_replayed_from_the_third_push_on(slot_bytes):
    model: Any = Model(LAYER, load_layer)
    replay = ModelReplay({})
    phases = []
    for seed in range(4):
        now = layer(seed)
        model.push(replay, now, slot_bytes)
        phases.append((replay.facts().phase, len(model.heard)))
        got = {name: tensor.clone() for name, tensor in ModelState.of(model).tensors.items()}
        assert all(same(tensor, got[name]) for name, tensor in model.loaded(now).items())
        del now
    assert phases == [("record", 15), ("prove", 15), ("replay", 0), ("replay", 0)]
    facts = replay.facts()
    assert (facts.replayed, facts.by_loader, facts.why) == (15, 0, {})
    assert facts.replayed_bytes == sum(w.nbytes for w in layer(0).values())
    assert set(facts.seconds) == {"record", "prove", "replay"}


def test_neighbours_are_joined():
    model: Any = Model(
        {"attn.qkv": torch.zeros(64, 64)}, lambda t, ws: [t["attn.qkv"][16 * int(n) :][:16].copy_(w) for n, w in ws]
    )
    replay = pushed(model, lambda seed: weights(seed, **{str(i): (16, 64) for i in range(4)}))
    assert replay.facts().moves == 1


def test_a_layer_that_is_put_together_apart():
    """vLLM keeps what comes until a layer is whole, loads it into memory of its own, and copies that over the layer."""
    kept: Any = {}

    def load(targets, tensors):
        for name, tensor in tensors:
            kept[name] = tensor
        if len(kept) == 2:
            apart = torch.empty(12, 8)
            apart[:6].copy_(kept["a"])
            apart[6:10].copy_(kept["b"])
            apart[10:].fill_(0)
            targets["fused.weight"].data.copy_(apart)
            kept.clear()

    model: Any = Model({"fused.weight": torch.ones(12, 8)}, load)
    replay = pushed(model, lambda seed: weights(seed, a=(6, 8), b=(4, 8)), slot_bytes=256)
    assert (replay.facts().why, model.heard) == ({}, [])


@pytest.mark.parametrize(
    "convert",
    [
        lambda w: w.t().reshape(-1).view(8, 4).contiguous(),
        lambda w: w.to(torch.bfloat16).view(4, 8).t(),
        lambda w: w.clone().unsqueeze(0).transpose(1, 2)[0],
        lambda w: w.reshape(2, 2, 8).permute(2, 0, 1).reshape(8, 4),
    ],
)
def test_copies_on_the_way_are_followed(convert):
    model: Any = Model({"w": torch.zeros(8, 4, dtype=torch.bfloat16)}, lambda t, ws: t["w"].copy_(convert(ws[0][1])))
    replay = pushed(model, lambda seed: weights(seed, w=(4, 8)))
    assert (replay.facts().why, model.heard) == ({}, [])


# --- what stays with the loader -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "why"),
    [
        (lambda t, ws: t["a.w"].copy_(ws[0][1] * 2), "copying (mul.Tensor)"),
        (lambda t, ws: t["a.w"].copy_(ws[0][1]).mul_(3), "a.w: the loader computes it (mul_.Tensor)"),
        (lambda t, ws: t["a.w"].copy_(ws[0][1].repeat(1, 1)), "copying (repeat)"),
        (lambda t, ws: t["a.w"].copy_(ws[0][1].double().to(torch.float16)), "copying (a copy that cannot be followed)"),
        (lambda t, ws: t["a.w"].copy_(ws[0][1]) if ws[0][1][0, 0].item() else None, "copying (_local_scalar"),
        (lambda t, ws: t["a.w"][:2].copy_(ws[0][1][:2]), "32 of its bytes are not seen written"),
        (lambda t, ws: t["a.w"].copy_(ws[0][1]).fill_(1), "it is filled after it was loaded"),
        (lambda t, ws: (t["a.w"].copy_(ws[0][1]), t["a.w"].abs()), "the loader computes with it (abs)"),
        (lambda t, ws: [t["a.w"][0].copy_(ws[0][1][0]), t["a.w"].copy_(ws[0][1].clone())], "written more than once"),
    ],
)
def test_what_is_more_than_copied_stays_with_the_loader(load, why):
    model: Any = Model({"a.w": torch.zeros(4, 4), "b.w": torch.zeros(3)}, lambda t, ws: both(t, ws, load))
    replay = pushed(model, lambda seed: weights(seed, w=(4, 4), z=(3,)))
    assert model.heard == ["w"], "b.w is replayed none the less"
    told = replay.facts().why
    assert replay.facts().replayed == 1
    assert any(why in reason for reason in told), told


def both(targets, tensors, load):
    for name, tensor in tensors:
        if name == "z":
            targets["b.w"].copy_(tensor)
        else:
            load(targets, [(name, tensor)])


def test_memory_that_is_loaded_in_part_only_is_not_taken_for_loaded():
    def load(targets, tensors):
        for name, tensor in tensors:
            if name == "a":
                targets["w"].copy_(tensor)
            else:
                apart = targets["b.w"] * 2
                apart[:2].copy_(tensor)
                targets["w"].copy_(apart)

    model: Any = Model({"w": torch.zeros(4), "b.w": torch.ones(4)}, load)
    replay = pushed(model, lambda seed: weights(seed, a=(4,), b=(2,)))
    assert sorted(model.heard) == ["a", "b"]
    assert replay.facts().replayed == 0


def test_a_layer_is_replayed_as_a_whole_or_not_at_all():
    def load(targets, tensors):
        for name, tensor in tensors:
            targets[name].copy_(tensor if name != "a.scale" else tensor.reciprocal())

    model: Any = Model({"a.w": torch.zeros(4), "a.scale": torch.zeros(1), "b.w": torch.zeros(4)}, load)
    replay = pushed(model, lambda seed: weights(seed, a__w=(4,), a__scale=(1,), b__w=(4,)))
    assert sorted(model.heard) == ["a.scale", "a.w"]
    assert replay.facts().why == {
        "more is done with it than copying (reciprocal)": ["a.scale"],
        "a.w: its layer has a.scale, which is by the loader: the loader computes it (reciprocal)": ["a.w"],
    }


def test_a_layer_whose_kernel_has_a_weight_in_another_form_stays_with_the_loader():
    def load(targets, tensors):
        for name, tensor in tensors:
            if name != "a.w":
                targets[name].copy_(tensor)

    model: Any = Model({"a.w": torch.zeros(0), "a.bias": torch.zeros(4), "b.w": torch.zeros(4)}, load)
    replay = pushed(model, lambda seed: weights(seed, a__w=(4, 4), a__bias=(4,), b__w=(4,)))
    assert sorted(model.heard) == ["a.bias", "a.w"]
    assert any("its layer has a.w" in why for why in replay.facts().why)


def test_what_the_model_keeps_elsewhere_stays_with_the_loader():
    kept: list[Any] = []

    def load(targets, tensors):
        kept[:] = [tensors[0][1].t().clone()]
        targets["w"].copy_(tensors[0][1])

    model: Any = Model({"w": torch.zeros(4, 4)}, load)
    replay = pushed(model, lambda seed: weights(seed, w=(4, 4)))
    assert replay.facts().why == {"more is done with it than copying (the model keeps it elsewhere too)": ["w"]}


def test_a_parameter_that_gets_other_memory_stays_with_the_loader():
    model: Any = Model({"w": torch.zeros(4)}, lambda t, ws: setattr(model.w, "data", ws[0][1].clone()))
    replay = ModelReplay({})
    for seed in range(3):
        model.push(replay, weights(seed, w=(4,)))
        assert replay.facts().phase == "record"
        assert same(model.w, weights(seed, w=(4,))["w"])


def test_a_layer_that_gets_something_else_to_compute_with_stays_with_the_loader():
    """vLLM on a CPU: the kernel's own form of a weight is in a function that is made when the weight is loaded."""

    def load(targets, tensors):
        for name, tensor in tensors:
            targets[name].copy_(tensor)
        model.a.linear = lambda x: x

    model: Any = Model({"a.w": torch.zeros(4), "b.w": torch.zeros(4)}, load)
    replay = pushed(model, lambda seed: weights(seed, a__w=(4,), b__w=(4,)))
    assert replay.facts().why == {"a.w: loading its layer replaces linear": ["a.w"]}
    assert model.heard == ["a.w"]


def test_what_plain_data_says_may_be_said_anew():
    def load(targets, tensors):
        for name, tensor in tensors:
            targets[name].copy_(tensor)
        model.a.scale = float("1.5")
        model.a.names = ("x", "y")

    model: Any = Model({"a.w": torch.zeros(4)}, load)
    model.a.scale, model.a.names = 1.5, ("x", "y")
    assert pushed(model, lambda seed: weights(seed, a__w=(4,))).facts().phase == "replay"


def test_operations_of_an_engines_own_are_seen():
    """Some are registered so that torch's dispatcher calls them without asking anybody."""
    library = torch.library.Library("weightsync_test", "FRAGMENT")
    library.define("pack(Tensor w) -> int")
    library.impl("pack", lambda w: 7, "CompositeImplicitAutograd")

    def load(targets, tensors):
        for name, tensor in tensors:
            apart = tensor.clone()
            if name == "a.w":
                torch.ops.weightsync_test.pack(apart)
            targets[name].copy_(apart)

    model: Any = Model({"a.w": torch.zeros(4), "b.w": torch.zeros(4)}, load)
    replay = pushed(model, lambda seed: weights(seed, a__w=(4,), b__w=(4,)))
    assert replay.facts().why == {"more is done with it than copying (weightsync_test.pack)": ["a.w"]}


def test_tied_parameters_and_tensors_that_nobody_wants():
    def load(targets, tensors):
        for name, tensor in tensors:
            if name == "embed":
                targets["embed.weight"].copy_(tensor)

    model: Any = Model({"embed.weight": torch.zeros(4, 4)}, load)
    model.head = torch.nn.Module()
    model.head.weight = model.embed.weight
    replay = pushed(model, lambda seed: weights(seed, embed=(4, 4), rotary=(2,)))
    assert replay.facts().why == {"the loader was not seen to copy any of it": ["rotary"]}
    assert model.heard == ["rotary"], "what nothing was seen of is the loader's to judge"


# --- the proof ------------------------------------------------------------------------------------------------------


def proving(model, make):
    replay = ModelReplay({})
    model.push(replay, make(0))
    return replay


@pytest.mark.parametrize("same_weights", [False, True])
@pytest.mark.parametrize("fault", ["dropped", "shifted", "swapped"])
def test_a_fault_in_a_plan_is_found_and_costs_that_layer_alone(fault, same_weights):
    model: Any = Model(LAYER, load_layer)
    replay = proving(model, layer)
    known = replay._known
    assert known is not None
    assert replay._manifest is not None
    copies = list(known.plan.copies)
    at = next(i for i, c in enumerate(copies) if c.source == "o")
    one = copies[at]
    if fault == "dropped":
        at = next(i for i, c in enumerate(copies) if c.source == "k")
        del copies[at]
    elif fault == "shifted":
        copies[at] = one._replace(source_box=one.source_box.shifted(-4))
    else:
        copies[at] = one._replace(source_box=one.source_box._replace(strides=one.source_box.strides[::-1]))
    known.plan = replace(known.plan, copies=tuple(copies))
    known.moves = lay_out(known.plan, replay._manifest)
    for seed in (0 if same_weights else 1, 2, 3):
        model.push(replay, layer(seed))
        got = {name: tensor.clone() for name, tensor in ModelState.of(model).tensors.items()}
        heard = set(model.heard)
        assert all(same(tensor, got[name]) for name, tensor in model.loaded(layer(seed)).items())
    assert heard == {"q", "k", "v", "o"}
    reasons = [why for why in replay.facts().why if "differs from what the loader made" in why]
    assert reasons


def test_a_tensor_that_changes_unseen_ends_all_replay():
    def load(targets, tensors):
        for _, tensor in tensors:
            targets["w"].copy_(tensor)
            past_torch[...] = tensor.shape[0] + model.pushes

    model: Any = Model({"w": torch.zeros(4)}, load)
    model.register_buffer("cache", torch.zeros(4))
    past_torch = model.cache.numpy()
    model.pushes = 0
    replay = ModelReplay({})
    for seed in range(3):
        model.pushes += 1
        model.push(replay, weights(seed, w=(4,)))
    assert replay.facts().phase == "loader"
    assert "the loader changes cache, and was not seen to" in next(iter(replay.facts().why))
    assert model.heard == ["w"]


def test_a_push_that_failed_proves_nothing():
    model: Any = Model(LAYER, load_layer)
    replay = proving(model, layer)
    manifest, buckets = read_buckets(layer(1), 1024)
    replay.begin(manifest, model)
    replay.load(next(buckets), model.load_weights)
    assert replay.facts().phase == "record", "another layout"
    model.push(replay, layer(1), 1024)
    assert replay.facts().phase == "record", "nothing was learnt of it"
    manifest, buckets = read_buckets(layer(1), 1 << 20)
    replay.begin(manifest, model)
    assert replay.facts().phase == "prove"
    model.push(replay, layer(1))
    assert replay.facts().phase == "prove"
    model.push(replay, layer(2))
    assert replay.facts().phase == "replay"


def test_layouts_that_take_turns_are_replayed():
    model: Any = Model(LAYER, load_layer)
    replay = ModelReplay({})
    for phase in ("record", "prove", "replay", "replay"):
        for names in (list(layer(0)), ["norm"]):
            now = {name: tensor for name, tensor in layer(len(phase)).items() if name in names}
            model.push(replay, now)
            assert (replay.facts().phase, replay.facts().replayed) == (phase, len(names))
    for name in list(layer(0))[:LAYOUTS]:
        model.push(replay, {name: layer(0)[name]})
    model.push(replay, layer(0))
    assert replay.facts().phase == "record", "it was pushed longest ago"


def test_what_is_forgotten_is_learnt_anew():
    model: Any = Model(LAYER, load_layer)
    replay = pushed(model, layer)
    replay.forget()
    for phase in ("record", "prove", "replay"):
        model.push(replay, layer(1))
        assert replay.facts().phase == phase


# --- when all begins anew -------------------------------------------------------------------------------------------


def test_parameters_that_moved_are_recorded_anew():
    model: Any = Model(LAYER, load_layer)
    replay = pushed(model, layer)
    model.norm.weight = torch.nn.Parameter(model.norm.weight.detach().clone(), requires_grad=False)
    model.push(replay, layer(1))
    assert (replay.facts().phase, replay.facts().note) == ("record", "norm.weight has moved in memory")
    model.norm.weight.data = model.norm.weight.data.float()
    model.push(replay, layer(1))
    assert (replay.facts().phase, replay.facts().note) == ("record", "norm.weight has changed in memory")
    for seed in (2, 3):
        model.push(replay, layer(seed))
    assert replay.facts().phase == "replay"


def test_memory_that_was_emptied_meanwhile_is_whole_after_a_replay():
    """As after a sleep that keeps addresses: what the loader filled is filled again."""
    model: Any = Model(LAYER, load_layer)
    replay = pushed(model, layer, times=3)
    for parameter in model.parameters():
        parameter.fill_(7)
    model.push(replay, layer(3))
    got = {name: tensor.clone() for name, tensor in ModelState.of(model).tensors.items()}
    assert replay.facts().phase == "replay"
    assert all(same(tensor, got[name]) for name, tensor in model.loaded(layer(3)).items())


def test_what_goes_wrong_while_learning_costs_no_push(monkeypatch, caplog):
    model: Any = Model(LAYER, load_layer)
    monkeypatch.setattr("weightsync.replay.state.lay_out", lambda *_: 1 / 0)
    replay = pushed(model, layer)
    assert len(model.heard) == 15
    assert (replay.facts().phase, replay.facts().note) == ("off", "it failed: ZeroDivisionError division by zero")
    assert "replay is off" in caplog.text


def test_want_of_memory_puts_the_proof_off(monkeypatch):
    model: Any = Model(LAYER, load_layer)
    replay = pushed(model, layer, times=1)
    with monkeypatch.context() as patched:
        patched.setattr("weightsync.replay.proof.Proof._empty", lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
        model.push(replay, layer(1))
    assert (replay.facts().phase, "no memory was left" in replay.facts().note) == ("prove", True)
    for phase in ("prove", "replay"):
        model.push(replay, layer(2))
        assert replay.facts().phase == phase


def test_a_model_that_cannot_be_looked_at_is_left_to_its_loader(caplog):
    model: Any = Model(LAYER, load_layer)
    replay = ModelReplay({})
    manifest, buckets = read_buckets(layer(0), 1 << 20)
    replay.begin(manifest, torch.nn.ModuleList)  # type: ignore[arg-type]
    for bucket in buckets:
        replay.load(bucket, model.load_weights)
    assert len(model.heard) == 15
    assert replay.facts().phase == "off"
    assert replay.facts().note.startswith("it failed: TypeError")
    assert "replay is off from here on" in caplog.text


def test_a_replay_that_fails_is_the_last(monkeypatch):
    model: Any = Model(LAYER, load_layer)
    replay = pushed(model, layer, times=3)
    monkeypatch.setattr("weightsync.replay.kernel.apply", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.push(replay, layer(3))
    model.push(replay, layer(4))
    assert (replay.facts().phase, len(model.heard)) == ("off", 15)


def test_a_parameter_that_is_padding_alone_stays_with_the_loader():
    """The last rank's part of a vocabulary may be."""

    def load(targets, tensors):
        targets["embed.weight"][len(tensors[0][1][4:]) :].fill_(0)

    model: Any = Model({"embed.weight": torch.ones(4, 4)}, load)
    replay = pushed(model, lambda seed: weights(seed, embed=(4, 4)))
    assert (replay.facts().phase, model.heard) == ("loader", ["embed"])


def test_what_is_filled_is_filled_before_anything_is_copied():
    """Copies may be made on several streams of a GPU, and go over it."""

    def load(targets, tensors):
        for _, tensor in tensors:
            targets["embed.weight"][:4].copy_(tensor)
            targets["embed.weight"][4:].fill_(0)

    model: Any = Model({"embed.weight": torch.ones(6, 4)}, load)
    replay = pushed(model, lambda seed: weights(seed, embed=(4, 4)))
    with torch.no_grad():
        model.embed.weight[4:] = 7
    manifest, _ = read_buckets(weights(9, embed=(4, 4)), 1 << 20)
    replay.begin(manifest, model)
    assert replay.facts().phase == "replay"
    assert not model.embed.weight[4:].any()


def test_where_parameters_lie_is_looked_up_once_in_a_push(monkeypatch):
    looked = []

    class Movers(HostMoves):
        def onto(self, targets):
            looked.append(len(targets))
            return super().onto(targets)

    monkeypatch.setattr(state, "mover_for", lambda _: Movers())
    model, replay = Model(LAYER, load_layer), ModelReplay({})
    for seed in range(2):
        model.push(replay, layer(seed), 64)
    for seed in range(2):
        looked.clear()
        model.push(replay, layer(seed), 64)
        assert looked == [len(LAYER)]
    assert replay.whole


def given_back(monkeypatch, model, make, *pushes):
    """For each push, which is pulled or not, whether memory was given back at its end."""
    times = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: times.append(1))
    replay, found = ModelReplay({}), []
    for seed, pull in enumerate(pushes):
        times.clear()
        model.push(replay, make(seed), pull=pull)
        assert bool(replay.pulled) == pull
        found.append(len(times))
    return found


UNCONVERTED = {**LAYER, "norm.weight": torch.zeros(16)}  # so that it can be pulled


@pytest.mark.parametrize(
    ("pushes", "wanted"),
    [
        ("record prove pulled pulled pulled", [0, 0, 1, 0, 0]),
        ("record prove copied copied", [0, 0, 1, 0]),
        ("record prove copied pulled pulled", [0, 0, 1, 1, 0]),
        ("record prove pulled copied copied pulled pulled", [0, 0, 1, 0, 0, 1, 0]),  # by a daemon that was restarted
    ],
)
def test_memory_that_is_needed_no_more_is_given_back_once(monkeypatch, pushes, wanted):
    pulled = [word == "pulled" for word in pushes.split()]
    assert given_back(monkeypatch, Model(UNCONVERTED, load_layer), layer, *pulled) == wanted


def test_memory_that_a_loader_goes_on_to_need_is_kept(monkeypatch):
    def load(targets, tensors):
        for name, tensor in tensors:
            targets[name].copy_(tensor * 2 if name == "b.w" else tensor)

    model = Model({"a.w": torch.zeros(4, 4), "b.w": torch.zeros(4, 4)}, load)

    def make(seed):
        return weights(seed, a__w=(4, 4), b__w=(4, 4))

    assert given_back(monkeypatch, model, make, *[False] * 4) == [0] * 4
    assert model.heard == ["b.w"]


def test_layouts_that_take_turns_give_back_once_each(monkeypatch):
    model = Model(UNCONVERTED, load_layer)
    layouts = [layer, lambda seed: {name: w for name, w in layer(seed).items() if name != "norm"}]

    def make(seed):
        return layouts[seed % 2](seed)

    pulled = [seed > 3 for seed in range(8)]
    assert given_back(monkeypatch, model, make, *pulled) == [0, 0, 0, 0, 1, 1, 0, 0]


def test_switched_off():
    model: Any = Model(LAYER, load_layer)
    replay = ModelReplay({SWITCH: "0"})
    for seed in range(3):
        model.push(replay, layer(seed))
        assert len(model.heard) == 15
    assert (replay.facts().phase, replay.facts().note) == ("off", "WEIGHTSYNC_REPLAY is 0")


# --- what is told of it ---------------------------------------------------------------------------------------------


def test_what_a_worker_says_reaches_the_terminal():
    model: Any = Model(
        {"a.w": torch.zeros(4), "b.w": torch.zeros(4)},
        lambda t, ws: [t[n].copy_(w if n == "a.w" else -w) for n, w in ws],
    )
    facts = pushed(model, lambda seed: weights(seed, a__w=(4,), b__w=(4,))).facts()
    plain = json.loads(msgspec.json.encode(facts))
    engine = EngineStatus(
        name="e", node="n", kind="sglang", model="m", url="http://e", state="serving",
        replay=msgspec.convert(plain, ReplayFacts),
    )  # fmt: skip
    status = Status(id=1, node="n", software="w", pid=1, uptime=1.0, engines=(engine,), bridges=(), peers={}, push=None)
    assert decode_untrusted(encode(status)) == status
    console = Console(width=200, file=StringIO())
    stock = msgspec.structs.replace(engine, name="stock", replay=None)
    console.print(replay_details(msgspec.to_builtins([engine, stock])))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "replays" in shown
    assert re.search(r"stock +nothing was told", shown)
    assert re.search(r"e +more is done with it than copying \(neg\) +b\.w", shown)


def test_of_several_workers_the_one_that_replays_least_is_told_of():
    slow, fast = ReplayFacts(phase="replay", replayed_bytes=1), ReplayFacts(phase="replay", replayed_bytes=2)
    off = ReplayFacts(phase="off", replayed_bytes=3)
    assert least([fast, slow]) is slow
    assert least([fast, off]) is off
    assert least([]) is None
