"""Mappings, iterables and modules of plain tensors as sources."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from weightsync.errors import SourceError
from weightsync.fingerprint import fingerprint
from weightsync.plan.dtypes import BY_NAME
from weightsync.plan.manifest import Shard
from weightsync.sources import ModuleSource, Source, TensorSource, source_of


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(3))


def test_a_mapping_is_described():
    source = TensorSource({"w": torch.zeros(3, 2, dtype=torch.bfloat16), "s": torch.tensor(2.0)})
    layout = source.layout()
    assert [layout.shard(i) for i in range(2)] == [
        Shard("w", "bfloat16", (3, 2), (0, 0), (3, 2)),
        Shard("s", "float32", (), (), ()),
    ]
    assert source.nbytes == 16
    assert source.layout() is layout
    assert isinstance(source, Source)


@pytest.mark.parametrize("dtype", sorted(BY_NAME))
def test_every_dtype_is_copied_bit_for_bit(dtype):
    raw = torch.randint(0, 256, (5, 8 * BY_NAME[dtype].itemsize), dtype=torch.uint8) & (1 if dtype == "bool" else 255)
    tensor = raw.view(getattr(torch, dtype))
    source = TensorSource([("t", tensor)])
    out = torch.empty(2, 3, dtype=tensor.dtype)
    source.read_into(0, (1, 4), (2, 3), out)
    assert bits(out) == bits(tensor[1:3, 4:7])
    data = source.box_bytes(0, (1, 4), (2, 3))
    assert data is not None
    assert data.shape == (2, 3 * BY_NAME[dtype].itemsize)
    assert data.tobytes() == bits(tensor[1:3, 4:7])
    assert np.shares_memory(data, raw.numpy())
    with pytest.raises(ValueError, match="read-only"):
        data[:] = 0


def test_copies_into_strided_memory():
    tensor = torch.arange(12.0).reshape(3, 4)
    slot = torch.full((4, 6), -1.0)
    TensorSource({"t": tensor}).read_into(0, (1, 1), (2, 3), slot[1:3, 2:5])
    assert slot[1:3, 2:5].equal(tensor[1:3, 1:4])
    assert int((slot == -1).sum()) == 18


def test_a_box_never_broadcasts_or_converts():
    source = TensorSource({"t": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="does not go into"):
        source.read_into(0, (0, 0), (1, 2), torch.empty(2, 2))
    with pytest.raises(ValueError, match="does not go into"):
        source.read_into(0, (0, 0), (2, 2), torch.empty(2, 2, dtype=torch.float64))


def test_scalars_and_empty_tensors():
    source = TensorSource({"s": torch.tensor(7, dtype=torch.int16), "e": torch.empty(0, 4), "v": torch.empty(0)})
    assert source.nbytes == 2
    out = torch.empty((), dtype=torch.int16)
    source.read_into(0, (), (), out)
    assert int(out) == 7
    data = source.box_bytes(0, (), ())
    assert data is not None
    assert data.shape == (2,)
    assert fingerprint(data, itemsize=2, global_shape=(), offset=(), shape=())
    assert source.layout().shard(1).shape == (0, 4)


def test_a_transposed_tensor_is_copied_in_its_own_order():
    tensor = torch.arange(6.0).reshape(2, 3).T
    source = TensorSource({"t": tensor})
    assert source.box_bytes(0, (0, 0), (3, 2)) is None
    out = torch.empty(3, 2)
    source.read_into(0, (0, 0), (3, 2), out)
    assert out.equal(tensor)


def test_strided_rows_are_not_copied():
    tensor = torch.arange(24.0).reshape(4, 6)[:, 1:4]
    data = TensorSource({"t": tensor}).box_bytes(0, (1, 0), (2, 3))
    assert data is not None
    assert data.strides == (24, 1)
    assert fingerprint(data, itemsize=4, global_shape=(4, 3), offset=(1, 0), shape=(2, 3)) == fingerprint(
        np.ascontiguousarray(data), itemsize=4, global_shape=(4, 3), offset=(1, 0), shape=(2, 3)
    )


def test_reading_leaves_memory_that_can_be_freed():
    """As FSDP2 frees what it had gathered."""
    tensor = torch.ones(4, 4)
    source = TensorSource({"t": tensor})
    data = source.box_bytes(0, (0, 0), (4, 4))
    assert data is not None
    del data
    tensor.untyped_storage().resize_(0)


def test_local_memory_is_the_tensors_own():
    weights = {"w": torch.rand(4, 6)[:, ::2], "s": torch.tensor(2.0), "e": torch.empty(0, 3)}
    sources: list[Source] = [TensorSource(weights), source_of(weights), source_of(weights)]
    for source in sources:
        for i, tensor in enumerate(weights.values()):
            local = source.local(i)
            assert local is not None
            assert (local.shape, local.stride(), local.data_ptr()) == (tensor.shape, tensor.stride(), tensor.data_ptr())


def test_gradients_and_inference_mode_do_not_matter():
    with torch.inference_mode():
        made_there = torch.ones(2)
    source = TensorSource({"p": nn.Parameter(torch.ones(2)), "q": nn.Parameter(torch.ones(2)) * 2, "i": made_there})
    out = torch.empty(2)
    for shard in range(3):
        source.read_into(shard, (0,), (2,), out)
        assert source.box_bytes(shard, (0,), (2,)) is not None
    assert not out.requires_grad


def test_what_changes_in_place_is_what_is_sent():
    tensor = torch.zeros(2)
    source = TensorSource({"t": tensor})
    tensor += 1
    out = torch.empty(2)
    source.read_into(0, (0,), (2,), out)
    assert out.tolist() == [1, 1]


class TestTies:
    def test_a_tied_parameter_is_sent_once(self):
        source = ModuleSource(Tied())
        assert source.layout().tensors.names == ("embed.weight", "norm.weight", "norm.bias")
        assert source.layout().tensors.aliases == (("head.weight", "embed.weight"),)
        assert len(source.layout()) == 3

    def test_a_state_dict_has_the_same_ties(self):
        state = {name: t for name, t in Tied().state_dict().items() if name != "positions"}
        assert TensorSource(state).layout() == ModuleSource(Tied()).layout()

    def test_another_view_of_the_same_memory_is_no_tie(self):
        base = torch.zeros(4, 4)
        views = {
            "a": base,
            "t": base.T,
            "h": base[:2],
            "r": base.view(16),
            "i": base.view(torch.int32),
            "again": base[:],
        }
        table = TensorSource(views).layout().tensors
        assert table.names == ("a", "t", "h", "r", "i")
        assert table.aliases == (("again", "a"),)

    def test_empty_tensors_are_not_tied_by_having_no_memory(self):
        assert not TensorSource({"a": torch.empty(0), "b": torch.empty(0)}).layout().tensors.aliases

    def test_temporaries_of_an_iterable_are_not_confused(self):
        """Each is dropped by the generator before the next is made, and may get its address."""
        source = TensorSource((f"t{i}", torch.full((1024,), float(i))) for i in range(20))
        assert not source.layout().tensors.aliases
        out = torch.empty(1024)
        for i in range(20):
            source.read_into(i, (0,), (1024,), out)
            assert out[0] == i


class TestRefusals:
    @pytest.mark.parametrize(
        ("weights", "why"),
        [
            ({"w": 3}, "'w' is int, not a tensor"),
            ({"w": np.zeros(3)}, "'w' is ndarray"),
            ({3: torch.zeros(1)}, "name is 3"),
            ({"": torch.zeros(1)}, "cannot be sent"),
            ({"w": torch.zeros(2, device="meta")}, "'w' is on the meta device"),
            ({"w": torch.zeros(2, 2).to_sparse()}, "'w' is sparse"),
            ({"w": torch.zeros(2, dtype=torch.complex64)}, "'w' has dtype torch.complex64"),
            ([("w", torch.zeros(1)), ("w", torch.zeros(1))], "'w' is given twice"),
            ([torch.zeros(2)], "gave Tensor, not a pair"),
            (["wx"], "gave str, not a pair"),
            ([("w", torch.zeros(1), 1)], "gave tuple, not a pair"),
        ],
    )
    def test_name_the_tensor(self, weights, why):
        with pytest.raises(SourceError, match=why):
            source_of(weights)

    @pytest.mark.filterwarnings("ignore")
    def test_quantised_tensors(self):
        quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
        with pytest.raises(SourceError, match=r"'w' is sparse or quantised|'w' has dtype"):
            source_of({"w": quantised})

    def test_lazy_parameters(self):
        with pytest.raises(SourceError, match=r"'weight' is not initialised"):
            source_of(nn.LazyLinear(3))

    def test_tensor_subclasses_without_data_of_their_own(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            fake = torch.zeros(2)
        with pytest.raises(SourceError, match="'w' is a FakeTensor"):
            source_of({"w": fake})

    @pytest.mark.parametrize("weights", [None, 3, "model", b"model", torch.zeros(2, 2), object()])
    def test_things_that_are_no_weights(self, weights):
        with pytest.raises(SourceError, match="nothing that can be pushed") as caught:
            source_of(weights)
        assert "mapping" in str(caught.value)


class TestDispatch:
    def test_by_kind(self):
        source = TensorSource({})
        assert source_of(source) is source
        assert isinstance(source_of(nn.Linear(1, 1)), ModuleSource)
        assert isinstance(source_of({}), TensorSource)
        assert isinstance(source_of(iter([("a", torch.zeros(1))])), TensorSource)

    def test_a_module_keeps_its_names_and_no_buffers(self):
        module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3))
        assert source_of(module).layout().tensors.names == ("0.weight", "0.bias", "1.weight", "1.bias")

    def test_importing_it_loads_no_torch(self):
        code = "import sys, weightsync.sources; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False, timeout=50).returncode == 0

    def test_names_that_are_not_there(self):
        import weightsync.sources

        with pytest.raises(AttributeError, match="NoSuchSource"):
            _ = weightsync.sources.NoSuchSource


def test_a_stretch_of_a_flat_parameter_is_refused_whatever_its_length():
    """A rank of FSDP1 with use_orig_params has 1-D stretches, which say nothing of where they lie."""
    stretch = torch.nn.Parameter(torch.ones(6))
    stretch._fsdp_flattened = True  # type: ignore[attr-defined]
    with pytest.raises(SourceError, match="'w' is a rank's stretch of a flat parameter of FSDP1"):
        source_of({"w": stretch})


def test_a_parameter_that_deepspeed_has_partitioned_is_refused():
    """ZeRO-3 leaves a tensor of no elements in the module, and notes the shape of what it has taken away."""

    module = nn.Linear(3, 2)
    source_of(module)
    module.weight.ds_shape = module.weight.shape  # type: ignore[attr-defined]
    module.weight.data = torch.empty(0)
    for weights in (module, {"weight": module.weight}):
        with pytest.raises(SourceError, match=r"'weight' of shape \(2, 3\) is partitioned by DeepSpeed") as caught:
            source_of(weights)
        assert "GatheredParameters" in str(caught.value)
    module.weight.data = torch.ones(2, 3)  # gathered
    assert source_of(module).nbytes == 4 * 8
