"""Handles written without torch, against torch's own functions."""

from __future__ import annotations

import inspect
import pickle

import torch
from torch.multiprocessing import reductions

from weightsync.adapters.torch_handles import cuda_args, host_buffer
from weightsync.ipc.arena import Arena
from weightsync.ipc.descriptors import seal
from weightsync.pickling import Call, Global, dumps
from weightsync.transports.torch_cuda import TorchCudaTicket
from weightsync.transports.torch_shm import TorchShmSender, TorchShmTicket

TICKET = TorchCudaTicket(
    reader="e/0",
    nbytes=1000,
    checksum=7,
    storage_handle=b"\x01c" + bytes(64),
    storage_offset=512,
    counter_handle=b"/torch_1_2_3",
    counter=5,
)


def test_the_arguments_are_those_of_rebuild_cuda_tensor():
    """By torch's own parameter names, so that a torch that changes them fails here and not in an engine."""
    parameters = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    values = dict(zip(parameters, pickle.loads(dumps(cuda_args(TICKET, "GPU-1"))), strict=True))
    assert values == {
        "tensor_cls": torch.Tensor,
        "tensor_size": (1000,),
        "tensor_stride": (1,),
        "tensor_offset": 0,
        "storage_cls": torch.storage.TypedStorage,
        "dtype": torch.uint8,
        "storage_device": "GPU-1",
        "storage_handle": b"\x01c" + bytes(64),
        "storage_size_bytes": 1000,
        "storage_offset_bytes": 512,
        "requires_grad": False,
        "ref_counter_handle": b"/torch_1_2_3",
        "ref_counter_offset": 5,
        "event_handle": b"",
        "event_sync_required": False,
    }
    assert parameters.index("storage_device") == 6, "engines put their own device there"


def test_a_ticket_survives_the_pipe():
    assert TorchCudaTicket.unpack(seal(b"U", TICKET)) == TICKET


def test_a_pickled_buffer_is_opened_by_torch_and_released_with_the_tensor():
    with Arena.create(node="handles", bridge=0, slots=1, slot_bytes=4096) as arena:
        sender = TorchShmSender(arena)
        try:
            arena.slot(0)[:5] = b"hello"
            sender.offer("e/0")
            ticket = TorchShmTicket.unpack(sender.export(0, 5, 1, ["e/0"])["e/0"])
            payload = dumps({"flattened_tensor": host_buffer(ticket), "dtype": Global("torch", "bfloat16")})
            opened = pickle.loads(payload)
            assert bytes(opened["flattened_tensor"].tolist()) == b"hello"
            assert sender.pending(0) == ("e/0",)
            del opened
            assert sender.pending(0) == ()
        finally:
            sender.close()
            arena.unlink()


def test_calls_are_nested():
    assert pickle.loads(dumps(Call(Global("builtins", "list"), ((1, Call(Global("builtins", "int"), ("7",))),)))) == [
        1,
        7,
    ]
