"""Describing again: what looks as before is not described twice, and whatever changes is noticed."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from weightsync.errors import SourceError
from weightsync.sources import ModuleSource, Source, TensorSource, source_of
from weightsync.sources import description as descriptions
from weightsync.sources import tree as trees
from weightsync.sources.recent import RECENT, Recent


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(descriptions, "_RECENT", Recent())
    monkeypatch.setattr(trees, "_RECENT", Recent())


def values(source: Source) -> dict[str, torch.Tensor]:
    """What would be sent, by name."""
    layout, read = source.layout(), {}
    for i in range(len(layout)):
        shard = layout.shard(i)
        out = torch.empty(shard.shape, dtype=getattr(torch, shard.dtype))
        source.read_into(i, (0,) * out.dim(), shard.shape, out)
        read[shard.name] = out
        local = source.local(i)
        assert local is not None
        assert tuple(local.shape) == shard.shape
    return read


def check(weights: nn.Module | dict[str, torch.Tensor]) -> Source:
    """What is recalled is what describing from the start gives."""
    recalled = source_of(weights)
    anew = ModuleSource(weights) if isinstance(weights, nn.Module) else TensorSource(weights)
    assert recalled.layout() == anew.layout()
    found, expected = values(recalled), values(anew)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].equal(tensor), name
    return recalled


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 5)
        self.down = nn.Linear(5, 3, bias=False)
        self.scale = nn.Parameter(torch.rand(1))


def model() -> Any:
    return nn.Sequential(Layer(), Layer(), nn.Linear(3, 5))


def weights() -> dict[str, torch.Tensor]:
    return {"a": torch.rand(3, 4), "b": torch.rand(4), "s": torch.rand(()), "e": torch.empty(0, 2), "c": torch.rand(4)}


class TestAModule:
    def test_is_described_once(self):
        m = model()
        first = source_of(m)
        with torch.no_grad():
            for parameter in m.parameters():
                parameter.add_(1)
        assert check(m).layout() is first.layout()
        assert isinstance(check(m), ModuleSource)

    def test_that_is_another_one_built_alike(self):
        one, other = model(), model()
        assert check(one).layout() is check(other).layout()
        assert check(one).layout() is check(other).layout()

    def test_that_moves_keeps_its_layout(self):
        m = model()
        first = source_of(m)
        for parameter in m.parameters():
            parameter.data = parameter.data.clone()
        assert check(m).layout() is first.layout()

    def test_may_be_swapped(self):
        """Which torch refuses where somebody has a weak reference to a parameter."""
        m = model()
        source_of(m)
        torch.utils.swap_tensors(m[0].up.weight, nn.Parameter(torch.rand(2, 7)))
        assert check(m).layout().shard(1).shape == (2, 7)

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda m: setattr(m[1].up, "weight", nn.Parameter(torch.rand(5, 3))), id="replaced"),
            pytest.param(lambda m: setattr(m[1].up, "weight", nn.Parameter(torch.rand(7, 3))), id="another-shape"),
            pytest.param(lambda m: setattr(m[1].up.weight, "data", torch.rand(5, 3)), id="data"),
            pytest.param(lambda m: setattr(m[1].up.weight, "data", torch.rand(15)), id="data-of-another-shape"),
            pytest.param(lambda m: setattr(m[1].up.weight, "data", m[1].up.weight.data.view(3, 5)), id="viewed"),
            pytest.param(lambda m: setattr(m[1].up.weight, "data", m[1].up.weight.data.T), id="transposed"),
            pytest.param(lambda m: setattr(m[1].up.weight, "data", m[1].up.weight.data.half()), id="another-dtype"),
            pytest.param(lambda m: m.to(torch.bfloat16), id="all-another-dtype"),
            pytest.param(lambda m: m[1].register_parameter("more", nn.Parameter(torch.rand(2))), id="parameter-added"),
            pytest.param(lambda m: setattr(m[1].up, "bias", None), id="parameter-none"),
            pytest.param(lambda m: setattr(m[1].down, "bias", nn.Parameter(torch.rand(3))), id="none-parameter"),
            pytest.param(lambda m: delattr(m[1], "scale"), id="parameter-removed"),
            pytest.param(lambda m: m.append(nn.Linear(1, 1)), id="submodule-added"),
            pytest.param(lambda m: m[1].add_module("more", nn.Linear(1, 1)), id="submodule-added-below"),
            pytest.param(lambda m: m.pop(1), id="submodule-removed"),
            pytest.param(lambda m: m._modules.__setitem__("1", None), id="submodule-none"),
            pytest.param(lambda m: m.__setitem__(1, nn.Linear(2, 2)), id="submodule-replaced"),
            pytest.param(lambda m: setattr(m[1], "up", m[0].up), id="submodule-shared"),
            pytest.param(lambda m: m[1]._modules.update(up=m[1]._modules.pop("up")), id="submodules-reordered"),
            pytest.param(
                lambda m: m[1].up._parameters.update(weight=m[1].up._parameters.pop("weight")),
                id="parameters-reordered",
            ),
            pytest.param(
                lambda m: setattr(m[1].up, "_parameters", OrderedDict(w=nn.Parameter(torch.rand(2)))), id="another-dict"
            ),
            pytest.param(lambda m: setattr(m[2], "weight", m[0].up.weight), id="tied"),
            pytest.param(lambda m: setattr(m[2].weight, "data", m[0].up.weight.data), id="tied-by-memory"),
            pytest.param(lambda m: setattr(m[0].up.weight, "data", torch.empty(0, 3)), id="empty"),
        ],
    )
    def test_that_changes(self, change):
        m = model()
        check(m)
        change(m)
        check(m)
        check(m)

    def test_whose_ties_change(self):
        m: Any = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(4)))
        m[1].weight = m[0].weight
        assert check(m).layout().tensors.aliases == (("1.weight", "0.weight"),)
        m[1].weight, m[2].weight = nn.Parameter(torch.rand(2, 2)), m[0].weight
        assert check(m).layout().tensors.aliases == (("2.weight", "0.weight"),)
        m[3].weight.data = m[0].weight.data
        assert len(check(m).layout().tensors.aliases) == 2
        m[3].weight.data = m[0].weight.data.T  # the same memory, seen in another way
        assert len(check(m).layout().tensors.aliases) == 1
        m[3].weight.data = m[1].weight.data
        assert check(m).layout().tensors.aliases == (("2.weight", "0.weight"), ("3.weight", "1.weight"))

    def test_that_loses_its_data(self):
        m = model()
        source_of(m)
        m[1].up.weight = nn.Parameter(torch.empty(5, 3, device="meta"))
        with pytest.raises(SourceError, match=r"'1.up.weight' is on the meta device"):
            source_of(m)
        m[1].up.weight = nn.Parameter(torch.zeros(5, 3).to_sparse())
        with pytest.raises(SourceError, match=r"'1.up.weight' is sparse"):
            source_of(m)

    @pytest.mark.parametrize("freed", ["0.up.weight", "2.weight", "every"])
    @pytest.mark.parametrize("described", [False, True])
    def test_whose_memory_is_freed(self, freed, described):
        """As trainers offload: reading it would end the process."""
        m = model()
        m[2].bias.data = torch.empty(0)  # which has no memory either, and needs none
        if described:
            source_of(m)
        for name, parameter in m.named_parameters():
            if freed in (name, "every"):
                parameter.untyped_storage().resize_(0)
        for make in (source_of, ModuleSource):
            with pytest.raises(SourceError, match=r"tensor '.*' has no memory on this rank: it was offloaded or freed"):
                make(m)

    def test_of_which_a_part_is_wrapped_by_now(self):
        m = model()
        first = source_of(m)
        m[1] = nn.DataParallel(m[1])
        assert check(m).layout().tensors.names == first.layout().tensors.names
        assert check(m).layout() is check(m).layout()
        m[1] = nn.ModuleDict({"module": m[1].module})  # the same names below, and no wrapper
        assert "1.module.scale" in check(m).layout().tensors.names

    def test_that_contains_itself_by_now(self):
        m = model()
        source_of(m)
        m[2].itself = m
        with pytest.raises(RecursionError):
            source_of(m)

    def test_that_lists_its_parameters_itself(self, monkeypatch):
        class Renamed(nn.Linear):
            prefix_of_names = "model."

            def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
                prefix = self.prefix_of_names + prefix
                return super().named_parameters(prefix, recurse, remove_duplicate)

        m = Renamed(2, 2)
        assert "model..weight" in source_of(m).layout().tensors.names
        monkeypatch.setattr(Renamed, "prefix_of_names", "base.")
        assert "base..weight" in source_of(m).layout().tensors.names
        plain = model()
        source_of(plain)
        listed = [("only", plain[2].weight)]
        monkeypatch.setattr(plain, "named_parameters", lambda **_: listed)
        assert source_of(plain).layout().tensors.names == ("only",)

    def test_is_not_kept_alive(self):
        m = model()
        source_of(m)
        replaced, gone = weakref.ref(m[0].up.weight), weakref.ref(m[1])
        memory = weakref.ref(m[2].weight.untyped_storage())
        m[0].up.weight = nn.Parameter(torch.rand(5, 3))
        m[2].weight.data = torch.rand(5, 3)
        m.pop(1)
        gc.collect()
        assert (replaced(), gone(), memory()) == (None, None, None)
        whole, parameter = weakref.ref(m), weakref.ref(m[0].up.weight)
        source_of(m)
        del m
        gc.collect()
        assert (whole(), parameter()) == (None, None)


class TestAMapping:
    def test_is_described_once(self):
        w = weights()
        first = source_of(w)
        w["a"] += 1
        assert check(w).layout() is first.layout()
        assert source_of(iter(w.items())).layout() is first.layout()
        assert source_of([[name, t] for name, t in w.items()]).layout() is first.layout()

    def test_whose_tensors_are_new_each_time(self):
        m = model()
        first = source_of(dict(m.state_dict()))
        assert check(dict(m.state_dict())).layout() is first.layout()

    @pytest.mark.parametrize(
        "change",
        [
            lambda w: w.update(a=torch.rand(3, 4)),
            lambda w: w.update(a=torch.rand(4, 3)),
            lambda w: w.update(a=torch.rand(12)),
            lambda w: w.update(a=w["a"].double()),
            lambda w: w.update(a=w["a"].view(torch.int32)),
            lambda w: w.update(a=nn.Parameter(w["a"])),
            lambda w: w["a"].resize_(6, 4),
            lambda w: w["a"].t_(),
            lambda w: w.update(d=torch.rand(1)),
            lambda w: w.pop("a"),
            lambda w: w.update(a=w.pop("a")),
            lambda w: w.update(c=w["b"]),
            lambda w: w.update(c=w["b"][:]),
            lambda w: w.update(c=w["b"], b=w["c"]),
            lambda w: w.update(b=torch.empty(0)),
            lambda w: w.update(e=torch.rand(0, 3)),
            lambda w: w.update(e=torch.rand(1, 2)),
            lambda w: w.update({"a": w["b"], "b": w["a"]}),
        ],
    )
    def test_that_changes(self, change):
        w = weights()
        check(w)
        change(w)
        check(w)
        check(w)

    def test_of_empty_tensors_tied_by_being_one(self):
        one = torch.empty(0)
        assert not check({"a": torch.empty(0), "b": torch.empty(0)}).layout().tensors.aliases
        assert check({"a": one, "b": one}).layout().tensors.aliases
        assert not check({"a": torch.empty(0), "b": torch.empty(0)}).layout().tensors.aliases

    def test_in_which_a_tensor_becomes_none(self):
        w = weights()
        source_of(w)
        with pytest.raises(SourceError, match="'b' is NoneType"):
            source_of(w | {"b": None})

    @pytest.mark.parametrize("described", [False, True])
    @pytest.mark.parametrize("first", [0, 2])
    def test_of_views_whose_memory_is_freed(self, first, described):
        """What is left of such a view's address is its offset."""
        fused = torch.rand(4, 3)
        w = {"a": fused[first:3], "b": fused[3:], "c": torch.rand(2)}
        if described:
            source_of(w)
        fused.untyped_storage().resize_(0)
        with pytest.raises(SourceError, match="'a' has no memory on this rank"):
            source_of(w)

    @pytest.mark.parametrize("described", [False, True])
    def test_of_views_with_the_negative_bit(self, described):
        """Of which memory has the negated values."""
        z = torch.rand(4, dtype=torch.complex64)
        if described:
            source_of({"re": z.real, "im": z.imag})
        with pytest.raises(SourceError, match="'im' is a view that negates what is in memory") as caught:
            source_of({"re": z.real, "im": z.conj().imag})
        assert "resolve_neg()" in str(caught.value)
        assert torch.equal(values(source_of({"re": z.real, "im": z.conj().imag.resolve_neg()}))["im"], -z.imag)

    def test_that_is_not_sound_is_refused_every_time(self):
        w = weights() | {"m": torch.zeros(2, device="meta")}
        for _ in range(2):
            with pytest.raises(SourceError, match="'m' is on the meta device"):
                source_of(w)

    def test_is_not_kept_alive(self):
        w = weights()
        source_of(w)
        tensor, memory = weakref.ref(w["a"]), weakref.ref(w["a"].untyped_storage())
        del w
        gc.collect()
        assert (tensor(), memory()) == (None, None)


def test_gradients_do_not_matter():
    m = model()
    for _ in range(2):
        source = source_of(m)
        out = torch.empty(5, 3)
        source.read_into(1, (0, 0), (5, 3), out)
        assert not out.requires_grad
        assert source.box_bytes(1, (0, 0), (5, 3)) is not None
        local = source.local(1)
        assert local is not None
        assert local.data_ptr() == m[0].up.weight.data_ptr()


def test_no_more_than_a_few_are_remembered():
    for i in range(2 * RECENT):
        source_of({f"t{i}": torch.zeros(1)})
        source_of(nn.Sequential(*(nn.Linear(1, 1) for _ in range(i + 1))))
    assert len(descriptions._RECENT) == RECENT
    assert len(trees._RECENT) == RECENT


def test_those_in_use_are_the_last_to_be_forgotten():
    w = weights()
    first = source_of(w)
    for i in range(3 * RECENT):
        source_of({f"t{i}": torch.zeros(1)})
        assert source_of(w).layout() is first.layout()


def test_many_threads():
    """Each describes models of its own that look alike in part; nobody gets another's memory."""
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        try:
            mine = nn.Sequential(*(nn.Linear(2, 2 + i % 3) for i in range(1 + number)))
            for _ in range(30):
                check(mine)
        except BaseException as error:  # noqa: BLE001 - for the thread that waits
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
