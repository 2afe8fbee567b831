"""A load plan: the copies that one load of a layout makes, and what stays with the engine's loader, and why. Pure.

A parameter is replayed only if fills and copies were seen to write every byte of it, and no two copies the same byte.
The same must hold for all parameters of its layer, and for all that are copied out of the same tensors: a loader never
gets half of a layer or of a tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from weightsync.replay.strided import Box, merge_dims

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy.typing as npt
    import torch

    Bytes = npt.NDArray[np.uint8]

__all__ = ["NOT_SEEN", "Copy", "Fill", "LoadPlan", "Target", "draw_up"]

NOT_SEEN = "the loader was not seen to copy any of it"


class Target(NamedTuple):
    """A tensor of the model."""

    name: str
    first: int  # byte of its storage at which it begins
    box: Box  # counted from there
    dtype: torch.dtype


class Copy(NamedTuple):
    """A copy of a box of a pushed tensor into a target. Both boxes have equal sizes.

    Their offsets count from where the tensor and the target begin.
    """

    source: str
    source_box: Box
    source_dtype: torch.dtype
    target: str
    target_box: Box
    dtype: torch.dtype  # what its elements are converted to


class Fill(NamedTuple):
    """A box of a target that got one value, such as the padding of a vocabulary."""

    target: str
    box: Box
    value: float


@dataclass(frozen=True)
class LoadPlan:
    """The copies and fills that replay a load, in the order in which they were seen."""

    copies: tuple[Copy, ...]
    fills: tuple[Fill, ...]  # all before the first copy
    targets: tuple[str, ...]  # those that get all of their bytes by these copies and fills
    by_loader: dict[str, str]  # target that the loader still loads → why
    untouched: tuple[str, ...]  # targets that nothing was seen to write or to compute with
    sources: frozenset[str]  # pushed tensors that the loader need not get any more
    loader_sources: dict[str, str]  # pushed tensor that the loader still gets → why

    def without(self, wrong: Mapping[str, str]) -> LoadPlan:
        """Return this plan without the targets `wrong` (→ why), and without all that is tied to them."""
        bad = _spread({**self.by_loader, **wrong}, {}, self.copies, (*self.targets, *self.by_loader))
        offered = (*self.sources, *self.loader_sources)
        return _plan(offered, self.copies, self.fills, self.targets, bad, self.loader_sources, self.untouched)


def draw_up(
    *,
    sources: Sequence[str],
    targets: Mapping[str, Target],
    copies: Sequence[Copy],
    fills: Sequence[Fill],
    computed: Mapping[str, str],
    altered: Mapping[str, str],
) -> LoadPlan:
    """Draw up the plan of a load that was watched.

    `sources` were pushed. `computed` names those sources, and `altered` those targets, with which more was done than
    copying, and what that was.
    """
    unique = tuple(dict.fromkeys(copies))
    written = {copy.target for copy in unique} | {fill.target for fill in fills}
    onto: dict[str, tuple[list[Box], list[Box]]] = {name: ([], []) for name in written}
    for fill in fills:
        onto[fill.target][0].append(fill.box)
    for copy in unique:
        onto[copy.target][1].append(copy.target_box)
    bad = dict(altered)
    for name in written - bad.keys():
        if fault := _coverage_fault(targets[name], *onto[name]):
            bad[name] = fault
    wrong = {name: f"more is done with it than copying ({what})" for name, what in computed.items()}
    bad = _spread(bad, wrong, unique, tuple(written | bad.keys()))
    good = tuple(name for name in targets if name in written and name not in bad)
    untouched = tuple(name for name in targets if name not in written and name not in bad)
    return _plan(sources, unique, tuple(fills), good, bad, wrong, untouched)


def _plan(
    offered: Iterable[str],
    copies: Sequence[Copy],
    fills: Sequence[Fill],
    targets: Iterable[str],
    bad: dict[str, str],
    wrong: Mapping[str, str],
    untouched: tuple[str, ...],
) -> LoadPlan:
    good = tuple(name for name in targets if name not in bad)
    kept = tuple(copy for copy in copies if copy.target not in bad)
    sources = frozenset(copy.source for copy in kept)
    why = {copy.source: f"{copy.target}: {bad[copy.target]}" for copy in copies if copy.target in bad} | dict(wrong)
    return LoadPlan(
        copies=kept,
        fills=tuple(fill for fill in fills if fill.target not in bad),
        targets=good,
        by_loader=bad,
        untouched=untouched,
        sources=sources,
        loader_sources={name: why.get(name, NOT_SEEN) for name in offered if name not in sources},
    )


def _layer(target: str) -> str:
    return target.rpartition(".")[0]


def _spread(
    bad: dict[str, str], wrong: dict[str, str], copies: Sequence[Copy], targets: Sequence[str]
) -> dict[str, str]:
    """Return the `bad` targets and all that are tied to them or to `wrong` sources, by a shared layer or source."""
    bad, wrong = dict(bad), dict(wrong)
    layers: dict[str, list[str]] = {}
    for name in targets:
        layers.setdefault(_layer(name), []).append(name)
    links: dict[str, dict[str, None]] = {}  # source → its targets
    sources: dict[str, dict[str, None]] = {}  # target → its sources
    for copy in copies:
        links.setdefault(copy.source, {})[copy.target] = None
        sources.setdefault(copy.target, {})[copy.source] = None
    new = [*bad]
    for source, why in wrong.items():
        for target in links.get(source, ()):
            if target not in bad:
                bad[target] = f"{source}: {why}"
                new.append(target)
    while new:
        target = new.pop()
        reached = dict.fromkeys(layers.get(_layer(target), ()), f"its layer has {target}")
        for source in sources.get(target, ()):
            reached |= dict.fromkeys(links[source], f"{source} is loaded into {target} too")
        for other, why in reached.items():
            if other not in bad:
                bad[other] = f"{why}, which is by the loader: {_root(bad[target])}"
                new.append(other)
    return bad


def _root(why: str) -> str:
    return why.rpartition("which is by the loader: ")[2]


def _coverage_fault(target: Target, fills: Sequence[Box], copies: Sequence[Box]) -> str:
    """Return what is wrong with how a target was written, as part of a sentence.

    Returns "" if each byte was written, and none by two copies.
    """
    if not copies:
        return "it is filled, and nothing is copied into it"
    itemsize = target.dtype.itemsize
    boxes = [merge_dims(box, box)[0] for box in (target.box, *fills, *copies)]
    unit = math.gcd(*(step for box in boxes for step in _steps(box, itemsize)))
    seen = np.zeros((target.box.span + itemsize) // unit, dtype=np.uint8)
    whole, *others = (_units(seen, box, unit, itemsize) for box in boxes)
    for units in others[: len(fills)]:
        units |= 1
    for units in others[len(fills) :]:
        if (units & 2).any():
            return "its bytes are written more than once"
        units |= 2
    missing = whole.size - np.count_nonzero(whole)
    return f"{missing * unit} of its bytes are not seen written" if missing else ""


def _steps(box: Box, itemsize: int) -> list[int]:
    """Return the numbers of bytes that the unit of measure for this box has to divide."""
    dense = bool(box.sizes) and box.strides[-1] == itemsize
    run = box.sizes[-1] * itemsize if dense else itemsize
    return [box.offset, run, *(box.strides[:-1] if dense else box.strides)]


def _units(seen: Bytes, box: Box, unit: int, itemsize: int) -> Bytes:
    """Return the units of a box, as a view of `seen`."""
    dense = bool(box.sizes) and box.strides[-1] == itemsize
    sizes = (*box.sizes[:-1], box.sizes[-1] * itemsize // unit) if dense else (*box.sizes, itemsize // unit)
    strides = (*(s // unit for s in (box.strides[:-1] if dense else box.strides)), 1)
    return np.lib.stride_tricks.as_strided(seen[box.offset // unit :], sizes, strides)
