"""Follows the bytes of pushed tensors: from where they were pushed, through copies, into the model's parameters.

Views share memory, so memory is followed, not tensors: each copy passes on what is known of the bytes that it copies.
Nothing is kept alive, because memory is known by a weak reference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch.multiprocessing.reductions import StorageWeakRef

from weightsync.replay.plan import Copy, Fill, LoadPlan, Target, draw_up
from weightsync.replay.strided import Box, compose, split_strides
from weightsync.replay.written import WrittenBox, WrittenBoxes

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

__all__ = ["Lineage", "same_memory"]

_NO_BOX = "a copy that cannot be followed"
_FILL = "a fill over it"


@dataclass
class _Memory:
    """What is known of one storage."""

    alive: StorageWeakRef
    written: WrittenBoxes = field(default_factory=WrittenBoxes)
    fills: list[tuple[Box, torch.dtype, float]] = field(default_factory=list)
    targets: list[tuple[int, int, str]] = field(default_factory=list)  # first byte, end, parameter
    offered: bool = False
    made_by: str = ""  # the operation that computed it


def box_of(tensor: torch.Tensor) -> Box:
    """Where a tensor lies in its storage."""
    size = tensor.element_size()
    return Box(int(tensor.storage_offset()) * size, tuple(tensor.shape), tuple(s * size for s in tensor.stride()))


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both tensors share one storage, as views do."""
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


class Lineage:
    """What is known so far. Tensors on the meta device, and empty ones, are ignored."""

    def __init__(self, targets: Mapping[str, torch.Tensor]) -> None:
        """`targets`: the model's parameters and buffers, by name. If two share memory, the first one counts."""
        self._memories: dict[int, _Memory] = {}
        self._targets: dict[str, Target] = {}
        self._offered: dict[str, None] = {}
        self._copies: list[Copy] = []
        self._fills: list[Fill] = []
        self._computed: dict[str, str] = {}  # offered tensor → what, other than a copy, read it
        self._altered: dict[str, str] = {}  # target → what, other than a copy, was done to it
        for name, tensor in targets.items():
            if tensor.numel():
                self._add_target(name, tensor)
            else:
                self._altered[name] = "it is empty: its kernel has it in another form"

    def offer(self, name: str, tensor: torch.Tensor) -> None:
        """Note that the loader will get this contiguous tensor, which has the checkpoint's `name`."""
        self._offered[name] = None
        if not tensor.numel():
            return
        memory = self._memory_of(tensor)
        memory.offered = True
        own = box_of(tensor)
        memory.written.add([WrittenBox(name, own.shifted(-own.offset), own, tensor.dtype, tensor.dtype)])

    def plan(self, altered: Mapping[str, str]) -> LoadPlan:
        """Return a plan of all that copies can repeat. `altered`: targets to leave to the loader, and why."""
        for memory in self._memories.values():
            if memory.written and not memory.alive.expired():
                for written in memory.written:
                    self._computed.setdefault(written.name, "the model keeps it elsewhere too")
        return draw_up(
            sources=tuple(self._offered),
            targets=self._targets,
            copies=self._copies,
            fills=self._fills,
            computed=self._computed,
            altered={**altered, **self._altered},
        )

    def copied(self, dst: torch.Tensor, src: torch.Tensor) -> None:
        if dst.device.type == "meta" or not dst.numel():
            return  # a rehearsal
        if dst.shape != src.shape:
            src = src.expand(dst.shape)
        onto = box_of(dst)
        if same_memory(dst, src) and onto == box_of(src) and dst.dtype == src.dtype:
            return  # onto itself
        known = self._known(src)
        if known is None or not self._follow(known, src, dst):
            how = "has from elsewhere" if known is None or known.targets else "converts or rearranges on the way"
            made_by = known.made_by if known is not None else ""
            why = f"the loader computes it ({made_by})" if made_by else f"it is given what the loader {how}"
            self.spoilt(dst, why, by=_NO_BOX)
            self.read(src, _NO_BOX)

    def cloned(self, out: torch.Tensor, src: torch.Tensor) -> None:
        if out.device.type == "meta" or not out.numel() or same_memory(out, src):
            return
        known = self._known(src)
        if known is not None and (known.made_by or not self._follow(known, src, out)):
            self.read(src, _NO_BOX)
            self.made(out, known.made_by or _NO_BOX)

    def filled(self, dst: torch.Tensor, value: float) -> None:
        if dst.device.type == "meta" or not dst.numel():
            return
        box, memory = box_of(dst), self._known(dst)
        if memory is not None and memory.offered:
            self.read(dst, _FILL)
            return
        target = self._target_of(memory, box, dst) if memory is not None else None
        if target is not None:
            there = box.shifted(-self._targets[target].first)
            size = dst.element_size()
            if any(c.target == target and c.target_box.touches(there, size, size) for c in self._copies):
                self.spoilt(dst, "it is filled after it was loaded", by=_FILL)
            self._fills.append(Fill(target, there, value))
        elif memory is not None and memory.targets:
            self.spoilt(dst, "it is filled together with others", by=_FILL)
        else:
            memory = self._memory_of(dst)
            if memory.written.touching(box, dst.element_size()):
                self.spoilt(dst, "", by=_FILL)
            memory.fills.append((box, dst.dtype, value))

    def _follow(self, known: _Memory, src: torch.Tensor, dst: torch.Tensor) -> bool:
        """Note what this copy out of `known` memory does. Returns False if that cannot be told."""
        view, onto = box_of(src), box_of(dst)
        itemsize = src.element_size()
        touching = known.written.touching(view, itemsize)
        latest = touching[-1] if touching else None
        if latest is not None and latest.dtype != src.dtype:
            return False
        if latest is not None and (found := compose(view, latest.own, latest.source)) is not None:
            offset, dims = found
            flat = [part for parts in dims for part in parts]
            sizes = tuple(part.size for part in flat)
            strides = [
                s for stride, parts in zip(onto.strides, dims, strict=True) for s in split_strides(stride, parts)
            ]
            source = Box(offset, sizes, tuple(part.source for part in flat))
            return self._note(dst, [latest._replace(source=source, own=Box(onto.offset, sizes, tuple(strides)))], [])
        return self._follow_whole(known, src, dst)

    def _follow_whole(self, known: _Memory, src: torch.Tensor, dst: torch.Tensor) -> bool:
        """Note a copy of several boxes that lie side by side, if they lie in the same way in `dst`."""
        view, onto, itemsize = box_of(src), box_of(dst), src.element_size()
        dense = view.span + itemsize == src.numel() * itemsize
        if not dense or src.dtype != dst.dtype or view.strides != onto.strides:
            return False
        first, end, by = view.offset, view.end(itemsize), onto.offset - view.offset
        written = known.written.touching(view, itemsize)
        fills = [
            (box, dtype, value) for box, dtype, value in known.fills if box.touches(view, dtype.itemsize, itemsize)
        ]
        covered = sum(w.own.elements * w.dtype.itemsize for w in written) + sum(
            b.elements * d.itemsize for b, d, _ in fills
        )
        if covered < src.numel() * itemsize:
            return False
        whole = all(w.own.within(first, end, itemsize) and w.dtype == src.dtype for w in written)
        if not whole or not all(box.within(first, end, itemsize) and dtype == src.dtype for box, dtype, _ in fills):
            return False
        return self._note(
            dst,
            [w._replace(own=w.own.shifted(by)) for w in written],
            [(box.shifted(by), dtype, value) for box, dtype, value in fills],
        )

    def _note(self, dst: torch.Tensor, written: list[WrittenBox], fills: list[tuple[Box, torch.dtype, float]]) -> bool:
        """Note that these now lie in `dst`. Returns False if no plan can repeat that, such as two conversions."""
        if any(w.dtype not in (w.source_dtype, dst.dtype) for w in written):
            return False
        memory = self._memory_of(dst)
        if memory.offered:
            return False
        if not memory.targets:
            memory.written.add(w._replace(dtype=dst.dtype) for w in written)
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

    # --- what cannot be followed --------------------------------------------------------------------------------------

    def made(self, tensor: torch.Tensor, by: str) -> None:
        """Note that the operation `by` computed this tensor, in memory of its own."""
        if tensor.device.type != "meta":
            self._memory_of(tensor).made_by = by

    def read(self, tensor: torch.Tensor, what: str) -> None:
        """Note that the operation `what` computes with this tensor."""
        memory = self._known(tensor)
        if memory is None or not tensor.numel():
            return
        box, size = box_of(tensor), tensor.element_size()
        for written in memory.written.touching(box, size):
            self._computed.setdefault(written.name, what)
        for first, end, name in memory.targets:
            if box.offset < end and first < box.end(size):
                self._altered.setdefault(name, f"the loader computes with it ({what})")

    def spoilt(self, tensor: torch.Tensor, why: str, by: str) -> None:
        """Note that something other than a copy of an offered tensor was written here, or may have been."""
        memory = self._known(tensor)
        if memory is None or not tensor.numel():
            return
        self.read(tensor, by)
        box, size = box_of(tensor), tensor.element_size()
        for first, end, name in memory.targets:
            if box.offset < end and first < box.end(size):
                self._altered[name] = why
        memory.written.forget(box, size)
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
        """Return the target in which all of a box lies, if the target has the tensor's dtype."""
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
        """Drop memory that is gone: a weak reference keeps its address from being reused, and costs a few bytes."""
        self._memories = {key: memory for key, memory in self._memories.items() if not memory.alive.expired()}
