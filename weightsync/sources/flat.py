"""FSDP1's flat parameters: a rank's stretch of each, as boxes of the parameters that lie end to end in it.

The places of parameters are read from torch's own records of a flat parameter (`FlatParameter._param_infos`, `_shapes`,
`_strides`, `_shard_param_infos`, torch/distributed/fsdp/_flat_param.py), with `use_orig_params` or without. Between
steps, a flat parameter's data is this rank's stretch, in the type that the optimiser sees; nothing is gathered.
"""

from __future__ import annotations

from math import prod
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

from weightsync.errors import SourceError
from weightsync.plan.boxes import packed_strides
from weightsync.plan.manifest import Layout, Shard
from weightsync.sources.plain import plain_data
from weightsync.sources.recent import Recent
from weightsync.sources.wrappers import is_fsdp1, unwrapped_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from torch import nn
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp._flat_param import FlatParameter, FlatParamHandle

    from weightsync.sources.tree import Listed

__all__ = ["FlatWeights", "boxes_of_stretch", "flat_weights"]


class FlatWeights(NamedTuple):
    """This rank's weights of a module that uses FSDP1."""

    layout: Layout
    shards: list[torch.Tensor]  # the memory of each shard
    names: tuple[str, ...]  # of all tensors, whether this rank has a part of them or not


def flat_weights(
    module: nn.Module,
    listed: Listed,
    buffers: Sequence[tuple[str, torch.Tensor]],
    describe: Callable[[tuple[str, ...], Sequence[torch.Tensor]], tuple[Layout, list[torch.Tensor]]],
) -> FlatWeights:
    """Describe what this rank has of `module`: its stretches of flat parameters and, by `describe`, all other tensors.

    Raises `SourceError` naming the parameter, or the module, that cannot be pushed as it is.
    """
    handles = _handles(listed)
    cut = _cut_of(module, listed, handles)
    data = [_data(handle, cut.named[i]) for i, handle in enumerate(handles)]
    plain = [listed.tensors[i] for i in cut.plain]
    for name, tensor in zip(cut.plain_names, plain, strict=True):
        if getattr(tensor, "_fsdp_flattened", False):
            raise SourceError(
                f"parameter {name!r} lies in a flat parameter of FSDP1 under another name only",
                hint="parameters that are tied must be in the same FSDP unit",
            )
    names = (*cut.plain_names, *(name for name, _ in buffers))
    layout, shards = describe(names, [*plain, *(buffer for _, buffer in buffers)])
    pieces = [
        data[p.handle].as_strided(p.shape, p.strides, data[p.handle].storage_offset() + p.begin) for p in cut.pieces
    ]
    merged = cut.merged(layout, [str(flat.dtype).removeprefix("torch.") for flat in data])
    return FlatWeights(merged, [*shards, *pieces], (*names, *cut.names))


def boxes_of_stretch(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut elements [begin, end) of a row-major tensor into boxes; yield their offsets and shapes in order.

    There are at most two boxes for each dimension but the first, and one more.
    """
    if begin >= end:
        return
    if not shape:
        yield (), ()
        return
    inner = prod(shape[1:])
    first, last = -(-begin // inner), end // inner  # whole rows
    if first > last:
        yield from _within(shape, last, begin, end)
        return
    yield from _within(shape, first - 1, begin, first * inner)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _within(shape, last, last * inner, end)


def _within(
    shape: tuple[int, ...], row: int, begin: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut elements [begin, end), which all lie in one row, into boxes."""
    start = row * prod(shape[1:])
    for offset, box in boxes_of_stretch(shape[1:], begin - start, end - start):
        yield (row, *offset), (1, *box)


# Offset and shape in the parameter; first element and strides in the flat parameter's data.
_Box: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...], int, tuple[int, ...]]"


class _Piece(NamedTuple):
    """A box of a parameter in the data of a flat parameter."""

    handle: int  # index of the flat parameter
    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    begin: int  # element of the data
    strides: tuple[int, ...]


class _Cut:
    """How shards are cut from the data of a module's flat parameters, and which tensors lie in none of these."""

    def __init__(self, listed: Listed, paths: _Paths, handles: Sequence[FlatParamHandle]) -> None:
        self.named: list[list[str]] = []  # for each flat parameter, the names under which its parameters are sent
        self.pieces: list[_Piece] = []
        self._aliases: list[tuple[str, str]] = []  # of parameters that this rank has a part of
        names: dict[str, None] = {}
        for i, handle in enumerate(handles):
            every = _names(handle.flat_param, paths)
            self.named.append([own[0] for own in every])
            for own, pieces in zip(every, _pieces(i, handle.flat_param, self.named[i]), strict=True):
                names.update(dict.fromkeys(own))
                if pieces:
                    self.pieces += pieces
                    self._aliases += [(other, own[0]) for other in own[1:]]
        self.names = tuple(names)
        flat = {id(handle.flat_param) for handle in handles}
        self.plain = [
            i
            for i, (name, tensor) in enumerate(zip(listed.names, listed.tensors, strict=True))
            if name not in names and id(tensor) not in flat
        ]
        self.plain_names = tuple([listed.names[i] for i in self.plain])
        self._merged: tuple[Layout, list[str], Layout] | None = None

    def merged(self, plain: Layout, dtypes: list[str]) -> Layout:
        """Return the layout of plain tensors and flat parameters together; the same object for the same arguments.

        `plain` is the layout of all other tensors, `dtypes` the element type of each flat parameter.
        """
        if self._merged is not None and self._merged[0] is plain and self._merged[1] == dtypes:
            return self._merged[2]
        shards = [plain.shard(i) for i in range(len(plain))]
        shards += [Shard(p.name, dtypes[p.handle], p.global_shape, p.offset, p.shape) for p in self.pieces]
        layout = Layout.of(shards, [*plain.tensors.aliases, *self._aliases])
        self._merged = plain, dtypes, layout
        return layout


class _Known(NamedTuple):
    """Everything that a cut depends on.

    Modules are told apart by their ids. If `laid` is that of living flat parameters, their modules live, too.
    """

    tree: object
    met: list[int]  # ids of modules
    laid: list[tuple[Any, ...]]  # by flat parameter: torch's record of what lies where
    cut: _Cut


_RECENT: Recent[_Known] = Recent()
# By id of a module: under each of its names, how many modules are listed before it, and the prefix of its parameters.
_Paths: TypeAlias = "dict[int, list[tuple[int, str]]]"


def _cut_of(module: nn.Module, listed: Listed, handles: Sequence[FlatParamHandle]) -> _Cut:
    laid = [handle.flat_param._shard_param_infos for handle in handles]
    met = list(map(id, listed.met))
    for known in _RECENT:
        same = listed.tree is not None and known.tree is listed.tree and len(known.laid) == len(laid)
        if same and all(map(is_, known.laid, laid)) and known.met == met:
            _RECENT.add(known)
            return known.cut
    paths: _Paths = {}
    for before, (_, prefix, one) in enumerate(unwrapped_names(module)):
        paths.setdefault(id(one), []).append((before, prefix))
    cut = _Cut(listed, paths, handles)
    if listed.tree is not None:
        _RECENT.add(_Known(listed.tree, met, laid, cut))
    return cut


def _handles(listed: Listed) -> list[FlatParamHandle]:
    """Return the handle of each flat parameter, once even if it is met several times."""
    kinds = set(filter(is_fsdp1, listed.kinds))
    found = [cast("FullyShardedDataParallel", one)._handle for one in listed.met if type(one) in kinds]
    return list({id(handle): handle for handle in found if handle is not None}.values())


def _names(flat: FlatParameter, paths: _Paths) -> list[list[str]]:
    """Return all names of each parameter in a flat parameter, in the order in which their modules are listed."""
    found: dict[tuple[int, str], list[tuple[int, str]]] = {}

    def add(key: tuple[int, str], module: nn.Module, name: str) -> None:
        if id(module) not in paths:
            raise SourceError(
                f"parameter {name!r} of a {type(module).__name__} is in a flat parameter of FSDP1, and that module is "
                "no longer in the one that is pushed",
                hint="push the module that FSDP wrapped, and change its submodules before it is wrapped",
            )
        found.setdefault(key, []).extend((before, prefix + name) for before, prefix in paths[id(module)])

    for info in flat._param_infos:
        add((id(info.module), info.param_name), info.module, info.param_name)
    for tied in flat._shared_param_infos:
        add((id(tied.prim_module), tied.prim_param_name), tied.module, tied.param_name)
    return [list(dict.fromkeys(name for _, name in sorted(names, key=itemgetter(0)))) for names in found.values()]


def _pieces(handle: int, flat: FlatParameter, names: list[str]) -> Iterator[list[_Piece]]:
    """Yield the boxes that this rank has of each parameter in a flat parameter."""
    columns = (flat._shapes, flat._strides, flat._shard_param_infos, flat._param_extensions)
    for name, shape, strides, laid, extension in zip(names, *columns, strict=True):
        if extension is not None:
            raise SourceError(
                f"parameter {name!r} was cut by tensor parallelism before FSDP1 flattened it",
                hint="shard with torch.distributed.fsdp.fully_shard, which keeps note of both cuts",
            )
        yield [_Piece(handle, name, tuple(shape), *box) for box in _boxes_laid(name, tuple(shape), strides, laid)]


def _boxes_laid(name: str, shape: tuple[int, ...], strides: tuple[int, ...], laid: Any) -> Iterator[_Box]:
    """Yield the boxes of a parameter that lie in a rank's stretch; `laid` is torch's `_ShardParamInfo`."""
    if 0 in shape:
        yield (0,) * len(shape), shape, 0, packed_strides(shape, 1)
        return
    # FSDP1 flattens a parameter as it lies in memory. Channels-last ones have another order of dimensions there.
    order = sorted(range(len(shape)), key=lambda d: (-strides[d], d))
    stored = tuple([shape[d] for d in order])
    if any(shape[d] > 1 and strides[d] != step for d, step in zip(order, packed_strides(stored, 1), strict=True)):
        raise SourceError(f"parameter {name!r} was not dense when FSDP1 flattened it: its strides were {strides}")
    if not laid.in_shard:
        return
    back = sorted(range(len(order)), key=order.__getitem__)
    begin, at = laid.intra_param_start_idx, laid.offset_in_shard
    for offset, box in boxes_of_stretch(stored, begin, begin + laid.numel_in_shard):
        steps = packed_strides(box, 1)
        yield tuple([offset[d] for d in back]), tuple([box[d] for d in back]), at, tuple([steps[d] for d in back])
        at += prod(box)


def _data(handle: FlatParamHandle, names: list[str]) -> torch.Tensor:
    """Return this rank's stretch of a flat parameter."""
    flat = handle.flat_param
    own = getattr(flat, "_local_shard", None)  # set from the first forward on
    if flat.shape != flat._sharded_size or (own is not None and flat.data_ptr() != own.data_ptr()):
        raise SourceError(
            f"parameter {names[0]!r} is gathered by FSDP1 at the moment",
            hint="push between steps and outside of summon_full_params: each rank's own part is all that is needed",
        )
    if handle._use_orig_params and not handle._skipped_use_sharded_views:
        _check_originals(flat, names)
    return plain_data(names[0], flat)


def _check_originals(flat: FlatParameter, names: list[str]) -> None:
    """Raise `SourceError` if a parameter was replaced, or given other data, since FSDP1 last looked.

    Its flat parameter then has old values.
    """
    assert flat._params is not None, "with use_orig_params"
    begin, step = flat.data_ptr(), flat.element_size()
    columns = (names, flat._params, flat._param_infos, flat._shard_param_infos)
    for name, parameter, info, laid in zip(*columns, strict=True):
        there = begin + (laid.offset_in_shard or 0) * step
        moved = laid.numel_in_shard and parameter.data_ptr() != there
        if moved or info.module._parameters.get(info.param_name) is not parameter:
            raise SourceError(
                f"parameter {name!r} was given other data than its flat parameter of FSDP1 has",
                hint="change parameters in place, or inside FullyShardedDataParallel.summon_full_params",
            )
