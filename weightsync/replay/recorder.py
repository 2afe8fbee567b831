"""Watches a loader at work: which bytes of which tensors it copies into which parameters.

    recorder = Recorder(targets)
    recorder.offer(name, tensor)          # before the loader is given it
    with recorder:
        model.load_weights(...)           # as often as there are buckets
    plan = recorder.plan()

Every operation of torch passes through here and is carried out. Views keep their memory, so memory is what is followed:
that of the tensors on offer, and that of whatever they were copied into on the way (a layer put together apart, a copy
in another order or dtype). What is computed from them, or from a parameter, cannot be followed, and all that had a part
in it stays with the loader. Nothing is kept alive: memory is known by a weak reference.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from weightsync.replay.plan import Copy, Fill, LoadPlan, Target, draw_up
from weightsync.replay.strided import Box, compose, split_strides

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = ["Recorder", "box_of"]

logger = logging.getLogger(__name__)

_aten = torch.ops.aten
_COPIES = (_aten.copy_.default,)
_CLONES = (_aten.clone.default, _aten._to_copy.default)
_FILLS = (_aten.fill_.Scalar, _aten.zero_.default)
_RAW = ("numpy", "__array__", "__dlpack__", "tolist", "data_ptr")
_LOOK_AT_NO_DATA = frozenset(
    {"empty_like", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "full_like", "ones_like"}
    | {"zeros_like", "is_pinned", "is_same_size", "record_stream", "sym_size", "sym_stride", "sym_numel"}
    | {"sym_storage_offset", "size", "stride", "numel"}
)


class _Written(NamedTuple):
    """Bytes of a tensor on offer, as they lie in some memory."""

    name: str
    source: Box  # in the tensor
    own: Box  # in the memory
    source_dtype: torch.dtype
    dtype: torch.dtype  # that they have here


@dataclass
class _Memory:
    """What is known of one storage."""

    alive: StorageWeakRef
    written: list[_Written] = field(default_factory=list)
    fills: list[tuple[Box, torch.dtype, float]] = field(default_factory=list)
    targets: list[tuple[int, int, str]] = field(default_factory=list)  # first byte, end, parameter
    offered: bool = False
    made_by: str = ""  # the operation that computed it


def box_of(tensor: torch.Tensor) -> Box:
    """Where a tensor lies in its storage."""
    size = tensor.element_size()
    return Box(int(tensor.storage_offset()) * size, tuple(tensor.shape), tuple(s * size for s in tensor.stride()))


class Recorder(TorchDispatchMode):
    """One recording. A context manager that may be entered many times, in one thread."""

    def __init__(self, targets: Mapping[str, torch.Tensor]) -> None:
        """`targets`: the model's parameters and buffers, by name. Of two with the same memory the first counts."""
        super().__init__()
        self._memories: dict[int, _Memory] = {}
        self._targets: dict[str, Target] = {}
        self._offered: dict[str, None] = {}
        self._calls = _Calls(self)
        self._lost = ""  # why nothing of this can be trusted
        self._copies: list[Copy] = []
        self._fills: list[Fill] = []
        self._computed: dict[str, str] = {}  # tensor on offer → what read it that is no copy
        self._altered: dict[str, str] = {}  # target → what befell it that is no copy
        for name, tensor in targets.items():
            if tensor.numel():
                self._add_target(name, tensor)
            else:
                self._altered[name] = "it is empty: its kernel has it in another form"

    def offer(self, name: str, tensor: torch.Tensor) -> None:
        """The loader will be given this tensor, contiguous, which has the checkpoint's `name`."""
        self._offered[name] = None
        if not tensor.numel():
            return
        memory = self._memory_of(tensor)
        memory.offered = True
        own = box_of(tensor)
        memory.written.append(_Written(name, own.shifted(-own.offset), own, tensor.dtype, tensor.dtype))

    def plan(self, altered: Mapping[str, str] | None = None) -> LoadPlan:
        """What was seen, as far as it can be done again by copying. `altered`: targets that cannot, and why."""
        for name, why in (altered or {}).items():
            self._altered.setdefault(name, why)
        for memory in self._memories.values():
            if memory.written and not memory.alive.expired():
                for written in memory.written:
                    self._computed.setdefault(written.name, "the model keeps it elsewhere too")
        if self._lost:
            self._altered = dict.fromkeys(self._targets, self._lost)
        return draw_up(
            sources=tuple(self._offered),
            targets=self._targets,
            copies=self._copies,
            fills=self._fills,
            computed=self._computed,
            altered=self._altered,
        )

    def __enter__(self) -> Self:
        super().__enter__()
        self._calls.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._calls.__exit__(*error)
        super().__exit__(*error)

    def handed_out(self, tensors: Iterable[torch.Tensor], to: str) -> None:
        """Code that torch does not see into was given these: it may have read them, and written to them."""
        for tensor in tensors:
            if tensor.device.type != "meta":
                self._read(tensor, to)
                self._spoilt(tensor, f"the loader computes it ({to})")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        try:
            self._saw(func, args, kwargs, out)
        except Exception as error:
            logger.exception("weightsync: %s cannot be followed; nothing is replayed", func)
            self._lost = f"{func} cannot be followed: {error!r}"
        return out

    def _saw(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        if func in _COPIES:
            self._copied(args[0], args[1])
        elif func in _CLONES:
            self._cloned(out, args[0])
        elif func in _FILLS:
            self._filled(args[0], float(args[1]) if len(args) > 1 else 0.0)
        else:
            self._other(func, args, kwargs, out)

    # --- what may be followed ---------------------------------------------------------------------------------------

    def _copied(self, dst: torch.Tensor, src: torch.Tensor) -> None:
        if dst.device.type == "meta" or not dst.numel():
            return  # a rehearsal
        if dst.shape != src.shape:
            src = src.expand(dst.shape)
        onto = box_of(dst)
        if self._same(dst, src) and onto == box_of(src) and dst.dtype == src.dtype:
            return  # onto itself
        known = self._known(src)
        if known is None or not self._follow(known, src, dst):
            how = "has from elsewhere" if known is None or known.targets else "converts or rearranges on the way"
            made_by = known.made_by if known is not None else ""
            self._spoilt(
                dst, f"the loader computes it ({made_by})" if made_by else f"it is given what the loader {how}"
            )
            if known is not None:
                self._read(src, "a copy that cannot be followed")

    def _cloned(self, out: torch.Tensor, src: torch.Tensor) -> None:
        if out.device.type == "meta" or not out.numel() or self._same(out, src):
            return
        known = self._known(src)
        if known is None or known.made_by or not self._follow(known, src, out):
            self._read(src, "a copy that cannot be followed")
            self._memory_of(out).made_by = (known.made_by if known is not None else "") or "a copy of a copy"

    def _filled(self, dst: torch.Tensor, value: float) -> None:
        if dst.device.type == "meta" or not dst.numel():
            return
        box, memory = box_of(dst), self._known(dst)
        if memory is not None and memory.offered:
            self._read(dst, "a fill of it")
            return
        target = self._target_of(memory, box, dst) if memory is not None else None
        if target is not None:
            there = box.shifted(-self._targets[target].first)
            size = dst.element_size()
            if any(c.target == target and c.target_box.touches(there, size, size) for c in self._copies):
                self._spoilt(dst, "it is filled after it was loaded")
            self._fills.append(Fill(target, there, value))
        elif memory is not None and memory.targets:
            self._spoilt(dst, "a fill across its borders")
        else:
            memory = self._memory_of(dst)
            if any(w.own.touches(box, w.dtype.itemsize, dst.element_size()) for w in memory.written):
                self._spoilt(dst, "a fill over it")
            memory.fills.append((box, dst.dtype, value))

    def _follow(self, known: _Memory, src: torch.Tensor, dst: torch.Tensor) -> bool:
        """Note what this copy does, out of memory that is known; False where that cannot be told."""
        view, onto = box_of(src), box_of(dst)
        itemsize = src.element_size()
        for written in reversed(known.written):
            if not written.own.touches(view, written.dtype.itemsize, itemsize):
                continue
            if written.dtype != src.dtype:
                return False
            found = compose(view, written.own, written.source)
            if found is None:
                break
            offset, dims = found
            flat = [part for parts in dims for part in parts]
            sizes = tuple(part.size for part in flat)
            strides = [
                s for stride, parts in zip(onto.strides, dims, strict=True) for s in split_strides(stride, parts)
            ]
            source = Box(offset, sizes, tuple(part.source for part in flat))
            return self._note(dst, [written._replace(source=source, own=Box(onto.offset, sizes, tuple(strides)))], [])
        return self._follow_whole(known, src, dst)

    def _follow_whole(self, known: _Memory, src: torch.Tensor, dst: torch.Tensor) -> bool:
        """A copy of several things that lie side by side to where they lie side by side in the same way."""
        view, onto, itemsize = box_of(src), box_of(dst), src.element_size()
        dense = view.span + itemsize == src.numel() * itemsize
        if not dense or src.dtype != dst.dtype or view.strides != onto.strides:
            return False
        first, end, by = view.offset, view.end(itemsize), onto.offset - view.offset
        written = [w for w in known.written if w.own.touches(view, w.dtype.itemsize, itemsize)]
        fills = [
            (box, dtype, value) for box, dtype, value in known.fills if box.touches(view, dtype.itemsize, itemsize)
        ]
        if not written and not fills:
            return False
        whole = all(w.own.within(first, end, itemsize) and w.dtype == src.dtype for w in written)
        if not whole or not all(box.within(first, end, itemsize) and dtype == src.dtype for box, dtype, _ in fills):
            return False
        return self._note(
            dst,
            [w._replace(own=w.own.shifted(by)) for w in written],
            [(box.shifted(by), dtype, value) for box, dtype, value in fills],
        )

    def _note(self, dst: torch.Tensor, written: list[_Written], fills: list[tuple[Box, torch.dtype, float]]) -> bool:
        """This now lies in `dst`. False where it was converted more than once on its way."""
        if any(w.dtype not in (w.source_dtype, dst.dtype) for w in written):
            return False
        memory = self._memory_of(dst)
        if memory.offered:
            return False
        if not memory.targets:
            memory.written += [w._replace(dtype=dst.dtype) for w in written]
            memory.fills += fills
            return True
        target = self._target_of(memory, box_of(dst), dst)
        if target is None:
            return False
        back = -self._targets[target].first
        self._fills += [Fill(target, box.shifted(back), value) for box, _, value in fills]
        self._copies += [
            Copy(w.name, w.source, w.source_dtype, target, w.own.shifted(back), dst.dtype) for w in written
        ]
        return True

    # --- what may not -----------------------------------------------------------------------------------------------

    def _other(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        name = func.name().removeprefix("aten::")
        if name.partition(".")[0] in _LOOK_AT_NO_DATA:
            return
        writes = _written_arguments(func)
        inputs = list(_tensors((*args, *kwargs.values())))
        outputs = list(_tensors((out,)))
        changed = [
            t
            for at in writes
            for t in _tensors((args[at] if isinstance(at, int) and at < len(args) else kwargs.get(str(at)),))
        ]
        if not changed and outputs and all(any(self._same(o, i) for i in inputs) for o in outputs):
            return  # a view
        for tensor in inputs:
            if tensor.device.type != "meta":
                self._read(tensor, name)
        for tensor in outputs:
            if tensor.device.type != "meta" and not any(self._same(tensor, i) for i in inputs):
                self._memory_of(tensor).made_by = name
        for tensor in changed:
            if tensor.device.type != "meta":
                self._spoilt(tensor, f"the loader computes it ({name})")

    def _read(self, tensor: torch.Tensor, what: str) -> None:
        """Something computes with this tensor."""
        memory = self._known(tensor)
        if memory is None or not tensor.numel():
            return
        box, size = box_of(tensor), tensor.element_size()
        for written in memory.written:
            if written.own.touches(box, written.dtype.itemsize, size):
                self._computed.setdefault(written.name, what)
        for first, end, name in memory.targets:
            if box.offset < end and first < box.end(size):
                self._altered.setdefault(name, f"the loader computes with it ({what})")

    def _spoilt(self, tensor: torch.Tensor, what: str) -> None:
        """Something else than a copy of what was on offer was written here."""
        if not tensor.numel():
            return
        memory = self._known(tensor)
        if memory is None:
            return
        self._read(tensor, what)
        box, size = box_of(tensor), tensor.element_size()
        for first, end, name in memory.targets:
            if box.offset < end and first < box.end(size):
                self._altered[name] = what
        memory.written = [w for w in memory.written if not w.own.touches(box, w.dtype.itemsize, size)]
        memory.fills = [f for f in memory.fills if not f[0].touches(box, f[1].itemsize, size)]

    # --- memory -----------------------------------------------------------------------------------------------------

    def _add_target(self, name: str, tensor: torch.Tensor) -> None:
        memory = self._memory_of(tensor)
        box = box_of(tensor)
        first, end = box.offset, box.end(tensor.element_size())
        for other_first, other_end, other in memory.targets:
            if first < other_end and other_first < end:
                if not (other_first <= first and end <= other_end):
                    self._altered.setdefault(other, f"it shares a part of its memory with {name}")
                return
        memory.targets.append((first, end, name))
        self._targets[name] = Target(name, first, box.shifted(-first), tensor.dtype)

    def _target_of(self, memory: _Memory, box: Box, tensor: torch.Tensor) -> str | None:
        """The target in which the whole of a box lies, in its own dtype."""
        size = tensor.element_size()
        for first, end, name in memory.targets:
            if box.within(first, end, size):
                return name if self._targets[name].dtype == tensor.dtype else None
        return None

    def _known(self, tensor: torch.Tensor) -> _Memory | None:
        try:
            found = self._memories.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # a tensor without a storage of its own
            return None
        return found

    def _memory_of(self, tensor: torch.Tensor) -> _Memory:
        storage = tensor.untyped_storage()
        found = self._memories.get(storage._cdata)
        if found is None:
            if len(self._memories) % 256 == 0:
                self._forget_gone()
            found = self._memories[storage._cdata] = _Memory(StorageWeakRef(storage))
        return found

    def _forget_gone(self) -> None:
        """A weak reference keeps an address from being given again, and costs a few bytes."""
        self._memories = {key: memory for key, memory in self._memories.items() if not memory.alive.expired()}

    @staticmethod
    def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
        return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


class _Calls(TorchFunctionMode):
    """Sees what goes past the dispatcher: operations of an engine's own, and views of memory that are no tensors."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        own = isinstance(func, OpOverload | OpOverloadPacket) and not str(func).startswith(("aten.", "prim"))
        if own or getattr(func, "__name__", "") in _RAW:
            self._recorder.handed_out(_tensors((*args, *kwargs.values())), str(func) if own else func.__name__)
        return out


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@cache
def _written_arguments(func: Any) -> tuple[int | str, ...]:
    """Which arguments an operation writes to: by position, or by name where they have none."""
    found: list[int | str] = []
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [argument.name] if argument.kwarg_only else [at]
    return tuple(found)
