"""Some tensors only, and other names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from weightsync.cli import app
from weightsync.errors import SourceError
from weightsync.sources import Part, PartSource, Source, source_of
from weightsync.sources import selected as selections
from weightsync.sources.recent import RECENT, Recent

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(selections, "_RECENT", Recent())


def weights() -> dict[str, torch.Tensor]:
    names = ("layers.0.up.weight", "layers.0.up.bias", "layers.1.up.weight", "norm.weight", "head.weight")
    return {name: torch.full((2, 3 + i), float(i)) for i, name in enumerate(names)}


def sent(source: Source) -> dict[str, float]:
    """By name, what would be sent; all elements are alike."""
    layout, found = source.layout(), {}
    assert source.nbytes == layout.nbytes
    for i in range(len(layout)):
        shard, local = layout.shard(i), source.local(i)
        out = torch.empty(shard.shape, dtype=getattr(torch, shard.dtype))
        source.read_into(i, (0,) * out.dim(), shard.shape, out)
        assert local is not None
        assert local.to(out.dtype).equal(out)
        data = source.box_bytes(i, (0,) * out.dim(), shard.shape)
        assert data is None or data.tobytes() == out.numpy().tobytes()
        found[shard.name] = float(out.flatten()[0])
    return found


class TestOnly:
    @pytest.mark.parametrize(
        ("only", "values"),
        [
            ("norm.weight", {3}),
            ("layers.*", {0, 1, 2}),
            (["layers.?.up.weight", "head.weight"], {0, 2, 4}),
            (("*.weight", "norm.weight"), {0, 2, 3, 4}),
            (iter(["layers.[1-9].*"]), {2}),
            ({"head.weight"}, {4}),
            (lambda name: name.endswith("bias"), {1}),
            (str.isascii, {0, 1, 2, 3, 4}),
        ],
    )
    def test_chooses(self, only, values):
        assert set(sent(source_of(weights(), only=only)).values()) == values

    def test_a_name_with_a_patterns_characters_is_itself(self):
        assert sent(source_of({"a[0]": torch.zeros(1), "a0": torch.ones(1)}, only="a[0]")) == {"a[0]": 0, "a0": 1}
        assert sent(source_of({"a[x]": torch.zeros(1), "b": torch.ones(1)}, only="a[x]")) == {"a[x]": 0}

    def test_what_is_not_there_is_refused_with_what_is_near(self):
        with pytest.raises(SourceError, match=r"only = 'head\.wieght' chooses none of the 5 tensors") as caught:
            source_of(weights(), only=["norm.weight", "head.wieght"])
        assert "'head.weight'" in str(caught.value)
        with pytest.raises(SourceError, match=r"only = 'model\.layers\.\*' chooses none") as caught:
            source_of(weights(), only="model.layers.*")
        assert "layers.0.up" in str(caught.value)
        with pytest.raises(SourceError, match="only, a function, chooses none of the 5 tensors"):
            source_of(weights(), only=lambda _: False)

    @pytest.mark.parametrize("only", [[], 3, [3], ["norm.weight", None]])
    def test_what_is_no_choice_is_refused(self, only):
        with pytest.raises(SourceError, match="only "):
            source_of(weights(), only=only)

    def test_a_rank_that_has_parts_may_have_none_of_those(self):
        """Others may have them: only all ranks together know."""
        here = PartSource([Part("a", (4,), (0,), torch.zeros(2))])
        assert len(source_of(here, only="b").layout()) == 0
        assert len(source_of({}, only="b").layout()) == 0


class TestRename:
    @pytest.mark.parametrize(
        "rename",
        [{"norm.weight": "n", "not.there": "x"}, lambda name: "n" if name == "norm.weight" else name],
    )
    def test_gives_other_names(self, rename):
        expected = {("n" if name == "norm.weight" else name): i for i, name in enumerate(weights())}
        assert sent(source_of(weights(), rename=rename)) == expected

    def test_names_may_be_exchanged(self):
        w = {"a": torch.zeros(1), "b": torch.ones(1)}
        assert sent(source_of(w, rename={"a": "b", "b": "a"})) == {"b": 0, "a": 1}

    def test_comes_after_only(self):
        chosen = source_of(weights(), only="layers.0.*", rename=lambda name: f"model.{name}", dtype="bfloat16")
        assert sent(chosen) == {"model.layers.0.up.weight": 0, "model.layers.0.up.bias": 1}
        assert set(chosen.layout().tensors.dtypes) == {"bfloat16"}

    def test_two_tensors_of_one_name_are_refused(self):
        with pytest.raises(SourceError, match=r"'norm\.weight' and 'head\.weight' would both be sent as"):
            source_of(weights(), rename={"norm.weight": "head.weight"})
        with pytest.raises(SourceError, match=r"'layers\.0\.up\.weight' and 'layers\.0\.up\.bias' .* as 'x'"):
            source_of(weights(), rename=lambda _: "x")
        assert "head.weight" in sent(source_of(weights(), only="norm.*", rename={"norm.weight": "head.weight"}))

    @pytest.mark.parametrize(
        ("rename", "why"),
        [
            (lambda _: None, "the name None"),
            ({"norm.weight": 3}, "the name 3"),
            ({"norm.weight": ""}, "cannot be sent"),
            (["norm.weight"], "rename is a list"),
        ],
    )
    def test_what_is_no_name_is_refused(self, rename, why):
        with pytest.raises(SourceError, match=why):
            source_of(weights(), rename=rename)


class TestTies:
    def source(self, **how: Any) -> Source:
        one = torch.ones(2)
        return source_of({"embed": one, "head": one, "norm": torch.zeros(2)}, **how)

    def test_a_tied_tensor_is_sent_under_the_name_that_is_chosen(self):
        table = self.source(only=["head", "norm"]).layout().tensors
        assert (set(table.names), table.aliases) == ({"head", "norm"}, ())
        table = self.source(only="*", rename={"head": "lm_head"}).layout().tensors
        assert (table.names, table.aliases) == (("embed", "norm"), (("lm_head", "embed"),))


class TestAgain:
    @pytest.mark.parametrize(
        "how",
        [
            lambda: {"only": ["layers.*"]},
            lambda: {"rename": {"norm.weight": "n"}},
            lambda: {"only": lambda name: "layers" in name, "rename": lambda name: name + "x"},
        ],
    )
    def test_the_layout_is_the_same_object(self, how: Callable[[], dict[str, Any]]):
        w = weights()
        assert source_of(w, **how()).layout() is source_of(w, **how()).layout()

    def test_a_mapping_that_has_changed_is_seen(self):
        rename = {"norm.weight": "n"}
        assert "n" in sent(source_of(weights(), rename=rename))
        rename["norm.weight"] = "m"
        assert "m" in sent(source_of(weights(), rename=rename))

    def test_a_function_is_asked_each_time(self):
        w, chosen = weights(), {"norm.weight"}
        only = chosen.__contains__
        assert set(sent(source_of(w, only=only))) == {"norm.weight"}
        chosen.add("head.weight")
        assert set(sent(source_of(w, only=only))) == {"norm.weight", "head.weight"}

    def test_no_more_than_a_few_are_remembered(self):
        for i in range(2 * RECENT):
            source_of(weights(), rename={"norm.weight": f"n{i}"})
        assert len(selections._RECENT) == RECENT

    def test_weights_of_another_layout_are_chosen_from_anew(self):
        m = nn.Sequential(nn.Linear(2, 2))
        assert len(source_of(m, only="*.weight").layout()) == 1
        m.append(nn.Linear(2, 2))
        assert len(source_of(m, only="*.weight").layout()) == 2


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (["--only", "layers.7.*"], "chooses none of the 5 tensors"),
        (["--rename", "norm.weight"], "is not OLD=NEW"),
        (["--rename", "a=b", "--rename", "a=c"], "is the second for this tensor"),
        (["--rename", "norm.weight=head.weight"], "would both be sent as 'head.weight'"),
    ],
)
def test_the_command_says_so_too(tmp_path, how, why):
    save_file(weights(), tmp_path / "model.safetensors")
    nobody = ["--daemon", "ipc:///nowhere.sock", "--version", "1"]
    done = CliRunner().invoke(app, ["push", str(tmp_path), *nobody, *how], env={"COLUMNS": "200"})
    assert done.exit_code
    assert why in " ".join(f"{done.output} {done.exception}".split())
