"""What stock vLLM's ipc and nccl backends are sent, opened as their workers open it."""

from __future__ import annotations

import asyncio
import base64
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from tests.hand_push import manifest_of
from weightsync.adapters.torch_handles import cuda_args
from weightsync.adapters.vllm.path_group import GroupPath
from weightsync.adapters.vllm.path_ipc import IpcPath, misfits, update_info
from weightsync.adapters.vllm.path_stock import broken_groups
from weightsync.adapters.vllm.profiles import PROFILES, Choice
from weightsync.errors import EngineError, EngineRefused
from weightsync.ipc.descriptors import seal
from weightsync.plan.buckets import plan_push
from weightsync.plan.manifest import Layout, Shard
from weightsync.transports.group import GroupOffer, GroupTicket
from weightsync.transports.torch_cuda import TorchCudaTicket

HANDLE = b"\x07" * 64


def ticket(reader="e/0", nbytes=4096):
    made = TorchCudaTicket(
        reader=reader,
        nbytes=nbytes,
        checksum=1,
        storage_handle=HANDLE,
        storage_offset=512,
        counter_handle=b"/torch_1_2_3",
        counter=5,
    )
    return seal(b"U", made)


def args():
    return cuda_args(TorchCudaTicket.unpack(ticket()), 0)


def tensors(*shapes):
    names = ("model.a.weight", "model.b.weight", "model.c.weight")
    return {
        name: ("bfloat16", shape, bytes(2 * int(np.prod(shape)))) for name, shape in zip(names, shapes, strict=False)
    }


def manifest(*shapes, slot_bytes=1 << 20, alignment=256, owners=1):
    shards = [Shard(name, d, s, (0,) * len(s), s) for name, (d, s, _) in tensors(*shapes).items()]
    return plan_push([Layout.of(shards)], slot_bytes=slot_bytes, owners=owners, alignment=alignment).manifest


def opened(info):
    return pickle.loads(base64.b64decode(info["ipc_handles_pickled"]))


def test_the_workers_unpickler_gets_the_arguments_of_rebuild_cuda_tensor():
    info = update_info(manifest((4, 128), (128,)), 0, {"aa-bb": args()}, flagged=False)
    found = opened(info)["aa-bb"]
    assert len(found) == len(inspect.signature(rebuild_cuda_tensor).parameters)
    assert found[0] is torch.Tensor
    assert found[5] is torch.uint8
    assert found[6] == 0  # the worker's own ordinal comes here
    assert found[7] == HANDLE
    assert list(info) == ["names", "dtype_names", "shapes", "tensor_sizes", "ipc_handles_pickled"]


def test_one_dict_for_all_workers_where_there_are_no_lists():
    info = update_info(manifest((128,)), 0, {"a": args(), "b": args()}, flagged=True)
    assert set(opened(info)) == {"a", "b"}
    assert info["packed"] is True


def test_the_buffer_is_cut_up_as_it_was_filled():
    plan = manifest((4, 128), (128,))
    info = update_info(plan, 0, {"a": args()}, flagged=False)
    assert info["names"] == ["model.a.weight", "model.b.weight"]
    assert info["shapes"] == [[4, 128], [128]]
    assert info["tensor_sizes"] == [1024, 256]
    assert info["dtype_names"] == ["bfloat16", "bfloat16"]
    assert sum(info["tensor_sizes"]) == int(plan.bucket_nbytes[0])


def test_gaps_between_tensors_do_not_fit():
    assert misfits(manifest((4, 128), (128,))) == []
    found = misfits(manifest((3,), (128,)))
    assert found == ["'model.b.weight' starts 250 bytes behind the tensor before it"]


def test_cut_tensors_do_not_fit():
    assert misfits(manifest((8, 128), slot_bytes=1024)) == ["'model.a.weight' is cut over several buckets"]


def test_broken_groups():
    layer = "model.layers.0"
    attention = [f"{layer}.self_attn.{m}_proj.weight" for m in "qkv"]
    assert broken_groups(attention) == []
    assert "without k_proj, v_proj" in broken_groups(attention[:1])[0]
    both = [f"{layer}.mlp.{m}_proj.weight" for m in ("gate", "up")]
    assert broken_groups(both) == []
    assert broken_groups(both[1:]) == []  # a model without gates
    assert "without gate_proj" in broken_groups([*both, "model.layers.1.mlp.up_proj.weight"])[0]


class Http:
    """Remembers what was posted."""

    engine = "stock"

    def __init__(self):
        self.posted = []

    async def post(self, path, body=None, params=None, *, deadline):
        self.posted.append((path, body))


class StockServer:
    engine = "stock"
    version = "0.x"
    world = 2

    def __init__(self, profile):
        self.http = Http()
        self.profile = profile
        self.choice = Choice(profile, "")


def ipc_push(profile, *, torn=False):
    server: Any = StockServer(profile)
    path = IpcPath(server, draft=False, gpus=lambda: ["u0", "u1"])
    plan = manifest((4, 128), (128,))

    async def run():
        assert await path.accept(plan, whole=False, deadline=0) is None
        await path.begin(3, plan, [[b""], [b""]], torn=torn, deadline=0)
        await path.load(0, [ticket("e/0"), ticket("e/1")], deadline=0)
        await path.finish(deadline=0)

    asyncio.run(run())
    return server.http.posted


def by_name(name):
    return next(profile for profile in PROFILES if profile.name == name)


def test_newer_servers_get_a_list_with_each_workers_own_handle():
    init, start, update, finish = ipc_push(by_name("vllm-0.29"))
    assert init == ("/init_weight_transfer_engine", {"init_info": {"packed": True}})
    assert start == ("/start_weight_update", {})
    assert [list(opened(worker)) for worker in update[1]["update_info"]] == [["u0"], ["u1"]]
    assert "packed" not in update[1]["update_info"][0]
    assert finish == ("/finish_weight_update", None)


def test_older_servers_get_one_dict_that_says_it_is_packed():
    init, *repair, _, update, _ = ipc_push(by_name("vllm-0.22"))
    assert [path for path, _ in repair] == ["/start_weight_update", "/finish_weight_update"]
    assert init[1] == {"init_info": {}}
    assert set(opened(update[1]["update_info"])) == {"u0", "u1"}
    assert update[1]["update_info"]["packed"] is True


def test_a_torn_server_is_opened_and_closed_once_first():
    paths = [path for path, _ in ipc_push(by_name("vllm-0.29"), torn=True)]
    assert paths == [
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/finish_weight_update",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
    ]


def nobody():
    raise EngineError("cannot determine which GPUs its ranks use", hint="name them")


@pytest.mark.parametrize(
    ("name", "gpus", "shapes", "match"),
    [
        ("vllm-0.21", list, ((128,),), "takes no packed buffers"),
        ("vllm-0.29", nobody, ((128,),), "cannot determine which GPUs"),
        ("vllm-0.29", list, ((3,), (128,)), "starts 250 bytes behind"),
        ("vllm-0.27", lambda: ["a", "a"], ((128,),), "several of its workers share a GPU"),
    ],
)
def test_what_stock_ipc_cannot_take_is_refused(name, gpus, shapes, match):
    server: Any = StockServer(by_name(name))
    path = IpcPath(server, draft=False, gpus=gpus)
    with pytest.raises(EngineRefused, match=match):
        asyncio.run(path.accept(manifest(*shapes), whole=False, deadline=0))


def group_of(name):
    return [[GroupOffer(name=name, host="10.0.0.1", port=77, world=3, backend="nccl").pack()]] * 2


def test_workers_join_a_group_once_and_take_each_bucket_from_it():
    server: Any = StockServer(by_name("vllm-0.26"))
    path = GroupPath(server, draft=False)
    plan = manifest((4, 128), (128,))
    tickets = [GroupTicket(group="one", sequence=1).pack()] * 2

    async def push(version, group):
        server.http.posted.clear()
        assert await path.accept(plan, whole=False, deadline=0) is None
        await path.begin(version, plan, group_of(group), torn=False, deadline=0)
        await path.load(0, tickets, deadline=0)
        await path.finish(deadline=0)
        return server.http.posted

    async def run():
        first = list(await push(1, "one"))
        again = [path for path, _ in await push(2, "one")]
        other = [path for path, _ in await push(3, "two")]
        return first, again, other

    first, again, other = asyncio.run(run())
    terms = {"master_address": "10.0.0.1", "master_port": 77, "rank_offset": 1, "world_size": 3}
    assert first[0] == ("/init_weight_transfer_engine", {"init_info": terms})
    info = {"names": list(tensors((4, 128), (128,))), "dtype_names": ["bfloat16"] * 2, "shapes": [[4, 128], [128]]}
    assert first[-2:] == [("/update_weights", {"update_info": info}), ("/finish_weight_update", None)]
    assert again == ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert other == ["/init_weight_transfer_engine", *again]


def test_a_group_takes_several_buckets_in_one_request():
    server: Any = StockServer(by_name("vllm-0.26"))
    path = GroupPath(server, draft=False)
    plan = manifest((128,), (128,), (128,), slot_bytes=256)
    ticket = [GroupTicket(group="one", sequence=1).pack()] * 2

    async def run():
        await path.begin(1, plan, group_of("one"), torn=False, deadline=0)
        server.http.posted.clear()
        await path.load(0, ticket, deadline=0)
        await path.load_several(1, [ticket] * 2, deadline=0)
        return [body["update_info"]["names"] for _, body in server.http.posted]

    names = list(tensors((128,), (128,), (128,)))
    assert asyncio.run(run()) == [names[:1], names[1:]]


@pytest.mark.parametrize(
    ("name", "terms", "shapes", "match"),
    [
        ("vllm-0.19", {}, ((128,),), "not known to load so"),
        ("vllm-0.26", {"slot_bytes": 1024}, ((8, 128),), "'model.a.weight'"),
        ("vllm-0.26", {"slot_bytes": 256, "owners": 2}, ((128,), (128,)), "in the slots of 2 bridges"),
        ("vllm-0.26", {}, ((128,), (0,)), "'model.b.weight' has no elements"),
    ],
)
def test_what_a_stock_group_cannot_take_is_refused(name, terms, shapes, match):
    server: Any = StockServer(by_name(name))
    path = GroupPath(server, draft=False)
    with pytest.raises(EngineRefused, match=match):
        asyncio.run(path.accept(manifest(*shapes, **terms), whole=False, deadline=0))


def test_hand_made_manifests_are_like_planned_ones():
    assert manifest_of(tensors((128,)), slot_bytes=1 << 20) == manifest((128,))
