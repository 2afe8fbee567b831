"""The pickles for stock servers, opened with the real pickle and the real torch; and orders for the plugin."""

from __future__ import annotations

import io
import itertools
import pickle
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
import torch

from tests.hand_push import Tensors, fill_slot, manifest_of
from weightsync.adapters.sglang import orders, payloads
from weightsync.adapters.sglang.names import look_up
from weightsync.errors import CodecError
from weightsync.ipc.arena import Arena
from weightsync.transports.torch_shm import TorchShmSender

if TYPE_CHECKING:
    from collections.abc import Iterator

UPDATE = "0123456789abcdef"
TENSORS: Tensors = {
    "model.embed_tokens.weight": ("bfloat16", (5, 8), bytes(range(80))),
    "model.norm.weight": ("float32", (4,), np.arange(4, dtype=np.float32).tobytes()),
    "scale": ("float8_e4m3fn", (3,), b"\x01\x02\x03"),
    "step": ("int64", (), np.int64(7).tobytes()),
}
MANIFEST = manifest_of(TENSORS, slot_bytes=1 << 16)
_NUMBERS = itertools.count(1)


@pytest.fixture
def ticket() -> Iterator[bytes]:
    """Bucket 0, exported to one reader; read and released at the end of the test."""
    arena = Arena.create(node="payloads", bridge=0, slots=1, slot_bytes=1 << 16)
    sender = TorchShmSender(arena)
    try:
        fill_slot(MANIFEST, 0, TENSORS, arena.slot(0))
        sender.offer("e/0")
        yield sender.export(0, int(MANIFEST.bucket_nbytes[0]), next(_NUMBERS), ["e/0"])["e/0"]
        assert sender.pending(0) == ()
    finally:
        sender.close()
        arena.close()
        arena.unlink()


def check(named: dict[str, torch.Tensor]) -> None:
    assert list(named) == list(MANIFEST.tensors.names)
    for name, (dtype, shape, data) in TENSORS.items():
        assert str(named[name].dtype) == f"torch.{dtype}"
        assert tuple(named[name].shape) == shape
        assert named[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes() == data


def test_a_flattened_bucket_as_sglang_takes_it_apart(ticket: bytes) -> None:
    bucket = pickle.loads(payloads.flattened_bucket(ticket, None, MANIFEST, 0))
    named = {
        item.name: bucket["flattened_tensor"][item.start_idx : item.end_idx].view(item.dtype).reshape(item.shape)
        for item in bucket["metadata"]
    }
    check(named)
    for item in bucket["metadata"]:
        assert isinstance(item.shape, torch.Size)
        assert item.numel == item.end_idx - item.start_idx


@pytest.mark.parametrize("device", [3, "cpu"])
def test_messages_as_checkpoint_engine_takes_them(ticket: bytes, device: Any) -> None:
    def buffer(message: bytes) -> torch.Tensor:
        function, args = pickle.loads(message)
        args = list(args)
        args[6] = device  # what its worker does
        made = function(*args)
        assert made.dtype == torch.uint8
        return made  # type: ignore[no-any-return]

    mine = buffer(payloads.open_buffer(ticket, None))
    named = {
        item["name"]: mine[item["offset"] : item["offset"] + item["dtype"].itemsize * item["shape"].numel()]
        .view(item["dtype"])
        .view(item["shape"])
        for item in pickle.loads(payloads.tensor_list(MANIFEST, 0))
    }
    check(named)
    del named
    mine = buffer(payloads.close_buffer())
    assert mine.numel() == 0
    assert pickle.loads(payloads.end()) is None


def test_every_global_is_one_that_sglang_lets_through(ticket: bytes) -> None:
    allowed = {  # of SafeUnpickler.ALLOWED_GLOBALS in 0.5.23
        ("torch.multiprocessing.reductions", "rebuild_storage_filename"),
        ("torch.storage", "TypedStorage"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch", "Size"),
        ("types", "SimpleNamespace"),
        *(("torch", name) for name in ("uint8", "bfloat16", "float32", "float8_e4m3fn", "int64")),
    }
    met = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            met.add((module, name))
            return super().find_class(module, name)

    Unpickler(io.BytesIO(payloads.flattened_bucket(ticket, None, MANIFEST, 0))).load()
    assert met <= allowed


@pytest.mark.parametrize(
    "order",
    [
        orders.Accept(manifest=b"m" * 300, target="all"),
        orders.Begin(update=UPDATE, manifest=b"m", target="draft", offers=((b"a", b"b"), ()), seconds=3.5),
        orders.Load(update=UPDATE, bucket=2, tickets=((b"t", b"u"), (b"v", b"w")), seconds=0.5),
        orders.Finish(update=UPDATE),
    ],
)
def test_orders_travel(order: orders.Order) -> None:
    action = orders.encode(order)
    assert action.isascii()
    assert orders.decode(action) == order


@pytest.mark.parametrize("action", ["checksum", "snapshot", "", "compare"])
def test_sglangs_own_actions_are_left_alone(action: str) -> None:
    assert orders.decode(action) is None


@pytest.mark.parametrize(
    "action",
    [
        orders.PREFIX,
        orders.PREFIX + "é",
        orders.PREFIX + "AAAA=",
        orders.PREFIX + orders.encode(orders.Finish(update=UPDATE))[:-4],
        "weightsync7:gaA=",
    ],
)
def test_a_damaged_order_is_a_codec_error(action: str) -> None:
    with pytest.raises(CodecError):
        orders.decode(action)


class _Module:
    """As much of a torch module as names are looked up in."""

    def __init__(self, **members: Any) -> None:
        self.__dict__.update(members)

    def named_parameters(self) -> list[tuple[str, Any]]:
        found = []
        for name, member in self.__dict__.items():
            if isinstance(member, list | _Module):
                below = enumerate(member) if isinstance(member, list) else [("", member)]
                for i, child in below:
                    prefix = f"{name}.{i}." if i != "" else f"{name}."
                    found += [(prefix + inner, parameter) for inner, parameter in child.named_parameters()]
            else:
                found.append((name, member))
        return found


def _model() -> _Module:
    layer = _Module(
        self_attn=_Module(qkv_proj=_Module(weight=object()), o_proj=_Module(weight=object())),
        mlp=_Module(experts=_Module(w13_weight=object(), w2_weight=object()), gate=_Module(weight=object())),
    )
    return _Module(model=_Module(layers=[layer], norm=_Module(weight=object(), k_scale=object())))


LAYER = "model.layers.0."
NAMES = [
    f"{LAYER}self_attn.q_proj.weight",
    f"{LAYER}self_attn.o_proj.weight",
    f"{LAYER}mlp.experts.7.gate_proj.weight",
    f"{LAYER}mlp.experts.7.down_proj.weight",
    f"{LAYER}mlp.gate.weight",
    f"{LAYER}self_attn.rotary_emb.inv_freq",
]


def test_names_are_looked_up_in_fused_modules_and_stacked_experts() -> None:
    assert look_up(_model(), [*NAMES, "model.norm.weight"]) == ([], [])
    assert look_up(_model(), NAMES) == ([], ["model.norm.weight"])


@pytest.mark.parametrize(
    "odd",
    [
        f"{LAYER}self_attn.bogus.weight",
        "model.layers.1.mlp.gate.weight",
        f"{LAYER}mlp.experts.0.router.weight",
        "lm_head.weight",
    ],
)
def test_a_name_that_leads_nowhere_is_found(odd: str) -> None:
    assert look_up(_model(), [*NAMES, odd])[0] == [odd]


def test_a_model_that_renames_is_not_judged() -> None:
    assert look_up(_model(), ["language_model." + name for name in NAMES]) == ([], None)
    model = _Module(hf_to_sglang_mapper=object())
    assert look_up(model, ["anything"]) == ([], None)


def test_an_answer_of_the_plugin() -> None:
    answer = msgspec.json.encode(orders.Accepted(unknown=("a",)))
    assert msgspec.json.decode(answer, type=orders.Accepted) == orders.Accepted(unknown=("a",), untouched=())
