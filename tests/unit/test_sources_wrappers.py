"""Modules in wrappers, and with their buffers: the names are those of the checkpoint."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

from weightsync.errors import SourceError
from weightsync.sources import ModuleSource, source_of

# What torch.compile imports when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def compiled(module: nn.Module) -> nn.Module:
    """Once: of what is compiled already torch makes a function."""
    if type(module).__name__ == "OptimizedModule":
        return module
    wrapped: nn.Module = torch.compile(module)  # type: ignore[assignment]
    return wrapped


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def model() -> Any:
    return nn.ModuleDict({"module": block(), "_orig_mod": block(), "last": nn.Linear(4, 2, bias=False)})


def names(module: nn.Module, **options: Any) -> tuple[str, ...]:
    """What describing it anew and what recalling it says."""
    anew = ModuleSource(module, **options).layout().tensors.names
    assert source_of(module, **options).layout().tensors.names == anew
    assert source_of(module, **options).layout() is source_of(module, **options).layout()
    return anew


@pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper, offload_wrapper, nn.DataParallel])
def test_a_wrapper_does_not_show(wrap):
    plain = model()
    assert names(wrap(plain)) == names(plain)
    assert names(wrap(wrap(plain))) == names(plain)
    assert ModuleSource(wrap(plain)).names == tuple(name for name, _ in plain.named_parameters())


@pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper, offload_wrapper, nn.DataParallel])
def test_nor_does_one_deep_inside(wrap):
    plain, wrapped = model(), model()
    for name in ("module", "_orig_mod"):
        wrapped[name][0] = wrap(wrapped[name][0])
        wrapped[name] = compiled(wrap(wrapped[name]))
    assert names(wrapped) == names(plain)
    assert names(nn.DataParallel(wrapped)) == names(plain)
    assert names(wrapped, buffers=True) == names(plain, buffers=True)


def test_names_that_look_like_a_wrappers_stay():
    plain = model()
    assert names(plain)[:2] == ("module.0.weight", "module.0.bias")
    assert "_orig_mod.0.weight" in names(compiled(plain))


def test_what_a_wrapped_model_lists_itself_is_asked_for():
    class Renamed(nn.Linear):
        def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
            return super().named_parameters(f"model{prefix}", recurse, remove_duplicate)

    assert ModuleSource(compiled(Renamed(2, 2))).names == ("model.weight", "model.bias")


def test_submodules_that_are_shared_are_tied():
    shared = model()
    shared["again"] = checkpoint_wrapper(shared["last"])
    assert ModuleSource(shared).layout().tensors.aliases == (("again.weight", "last.weight"),)


class TestBuffers:
    def test_those_of_the_checkpoint_are_sent_if_asked_for(self):
        plain = model()
        plain["last"].register_buffer("positions", torch.arange(3), persistent=False)
        plain["last"].register_buffer("scale", torch.ones(2))
        assert names(plain, buffers=True) == (*names(plain), *(n for n in plain.state_dict() if n not in names(plain)))
        source = source_of(plain, buffers=True)
        assert source.layout().tensors.dtypes[-1] == "float32"
        assert "int64" in source.layout().tensors.dtypes  # num_batches_tracked
        assert "last.positions" not in source.layout().tensors.names
        assert "last.scale" in source.layout().tensors.names

    def test_their_values_are_read_anew(self):
        plain = nn.BatchNorm1d(2, affine=False)
        first = source_of(plain, buffers=True)
        plain.running_mean = torch.full((2,), 7.0)
        again = source_of(plain, buffers=True)
        assert again.layout() is first.layout()
        local = again.local(0)
        assert local is not None
        assert local.tolist() == [7.0, 7.0]

    @pytest.mark.parametrize("weights", [{"w": torch.ones(2)}, [("w", torch.ones(2))]])
    def test_are_a_modules(self, weights):
        with pytest.raises(SourceError, match=r"buffers = True is for modules, and these weights are a (dict|list)"):
            source_of(weights, buffers=True)


def test_wrappers_are_told_without_importing_them():
    code = (
        "import sys, torch; from weightsync.sources import source_of; source_of(torch.nn.Linear(1, 1));"
        "sys.exit('torch._dynamo.eval_frame' in sys.modules or 'torch.distributed.fsdp' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=50).returncode == 0
