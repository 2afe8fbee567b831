"""Selects and renames a source's tensors, as `only` and `rename` of `push_weights` say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import translate
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from weightsync.errors import SourceError
from weightsync.plan.manifest import Layout, TensorTable
from weightsync.plan.table import check_local_table
from weightsync.sources.recent import Recent

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from weightsync.sources.base import Source

__all__ = ["Only", "Rename", "SelectedSource", "selected"]

Only: TypeAlias = str | Iterable[str] | Callable[[str], object] | None
Rename: TypeAlias = Mapping[str, str] | Callable[[str], str] | None

_SHOWN = 3  # names in an error
_GLOB = frozenset("*?[")


def selected(source: Source, only: Only = None, rename: Rename = None) -> Source:
    """Return the tensors of `source` that `only` chooses by their own names, under the names that `rename` gives them.

    only: one or several names and shell patterns (`*`, `?`, `[…]`), or a function that says whether a name is chosen.
    rename: {own name: name in the checkpoint}, where other names stay as they are; or a function from one to the other.

    Each name of a tied tensor is chosen and renamed for itself; the tensor is sent under the first name that is left.
    Functions are called in every push, patterns and mappings are applied once for a layout.

    Raises `SourceError` if two tensors get the same name; also if the source knows the names of all tensors, and a
    pattern matches none of them.
    """
    only = _patterns(only)
    if rename is not None and not isinstance(rename, Mapping) and not callable(rename):
        raise SourceError(f"rename is a {type(rename).__name__}", hint="a mapping of names to names, or a function")
    layout = source.layout()
    rule = None if callable(only) or callable(rename) else (only, None if rename is None else dict(rename))
    if rule is not None:
        for known in _RECENT:
            if known.layout is layout and known.rule == rule:
                _RECENT.add(known)
                return SelectedSource(source, known)
    every = getattr(source, "names", None)
    own = (*layout.tensors.names, *(other for other, _ in layout.tensors.aliases))
    names = _renamed(_chosen(own if every is None else every, only, known=every is not None), rename)
    same = next((known for known in _RECENT if known.layout is layout and known.names == names), None)
    if same is None:
        selection = _selection(layout, rule, names)
    else:
        selection = same if same.rule == rule else replace(same, rule=rule)
    _RECENT.add(selection)
    return SelectedSource(source, selection)


class SelectedSource:
    """Some shards of a source, with their tensors under other names."""

    def __init__(self, source: Source, selection: _Selection) -> None:
        self._source, self._layout, self._shards = source, selection.to, selection.shards
        self._names = selection.names

    @property
    def nbytes(self) -> int:
        """Bytes of all shards together."""
        return self._layout.nbytes

    @property
    def names(self) -> tuple[str, ...] | None:
        """The names under which all chosen tensors are sent, if the source knows the names of all its tensors."""
        return None if getattr(self._source, "names", None) is None else tuple(self._names.values())

    def layout(self) -> Layout:
        """What this rank holds of the tensors that were chosen."""
        return self._layout

    def local(self, shard: int) -> torch.Tensor | None:
        """A shard's own memory."""
        return self._source.local(self._shards[shard])

    def read_into(self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...], out: torch.Tensor) -> None:
        """Copy a box of a shard into `out`."""
        self._source.read_into(self._shards[shard], src_offset, shape, out)

    def box_bytes(
        self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> npt.NDArray[np.uint8] | None:
        """The bytes of a box of a shard, where the source has them."""
        return self._source.box_bytes(self._shards[shard], src_offset, shape)


@dataclass(frozen=True, eq=False)
class _Selection:
    """A source's layout, and the layout of the tensors chosen from it."""

    layout: Layout
    rule: object  # `only` and `rename`; None if one of them is a function
    names: dict[str, str]  # {own name, here or on another rank: name that is sent}, for all names that are sent
    to: Layout
    shards: list[int]  # by shard of `to`: the shard of `layout`


_RECENT: Recent[_Selection] = Recent()


def _patterns(only: Only) -> tuple[str, ...] | Callable[[str], object] | None:
    """Return `only` as a tuple of names and patterns; a function or None as it is."""
    if only is None or callable(only):
        return only
    patterns = (only,) if isinstance(only, str) else tuple(only) if isinstance(only, Iterable) else (only,)
    odd = [pattern for pattern in patterns if not isinstance(pattern, str)]
    if odd or not patterns:
        raise SourceError(
            f"only has {odd[0]!r}, which is no name" if patterns else "only is empty: it chooses nothing",
            hint="a name or pattern, several of them, or a function that is given a name",
        )
    return patterns


def _chosen(
    names: tuple[str, ...], only: tuple[str, ...] | Callable[[str], object] | None, *, known: bool
) -> list[str]:
    """Return the names that `only` chooses. `known`: other ranks have no other names."""
    if only is None:
        return list(names)
    if callable(only):
        chosen = [name for name in names if only(name)]
        if not chosen and known and names:
            raise _nothing("only, a function, chooses", "", names)
        return chosen
    found = set(names).intersection(only)
    for pattern in only:
        is_name = pattern in found
        if not _GLOB.isdisjoint(pattern):
            matches = set(filter(re.compile(translate(pattern)).match, names))
            found |= matches
            is_name |= bool(matches)
        if not is_name and known and names:
            raise _nothing(f"only = {pattern!r} chooses", pattern, names)
    return [name for name in names if name in found]


def _nothing(what: str, pattern: str, names: tuple[str, ...]) -> SourceError:
    near = get_close_matches(pattern.replace("*", ""), names, _SHOWN, 0.4) or names[:_SHOWN]
    return SourceError(
        f"{what} none of the {len(names)} tensors",
        hint=f"there are {', '.join(map(repr, near))} and others, as they are called before `rename`",
    )


def _renamed(names: list[str], rename: Rename) -> dict[str, str]:
    """Return {own name: name that is sent}."""
    if rename is None:
        return dict(zip(names, names, strict=True))
    renamed = {name: rename(name) if callable(rename) else rename.get(name, name) for name in names}
    back: dict[str, str] = {}
    for name, new in renamed.items():
        if not isinstance(new, str):
            raise SourceError(f"rename gives {name!r} the name {new!r}, which is no string")
        other = back.setdefault(new, name)
        if other != name:
            raise SourceError(f"tensors {other!r} and {name!r} would both be sent as {new!r}: see `rename`")
    return renamed


def _selection(layout: Layout, rule: object, names: dict[str, str]) -> _Selection:
    table = layout.tensors
    aliases: dict[str, list[str]] = {}
    for other, name in table.aliases:
        aliases.setdefault(name, []).append(other)
    places: dict[int, int] = {}  # by tensor of the layout
    sent: list[str] = []
    ties: list[tuple[str, str]] = []
    for i, name in enumerate(table.names):
        left = [names[one] for one in (name, *aliases.get(name, ())) if one in names]
        if left:
            places[i] = len(sent)
            sent.append(left[0])
            ties += [(other, left[0]) for other in left[1:]]
    to = TensorTable(
        tuple(sent), tuple([table.dtypes[i] for i in places]), tuple([table.shapes[i] for i in places]), tuple(ties)
    )
    check_local_table(to)
    place = np.full(len(table), -1, dtype=np.int32)
    place[list(places)] = list(places.values())
    tensor = place[layout.tensor]
    shards = np.flatnonzero(tensor >= 0)
    width = to.width
    return _Selection(
        layout,
        rule,
        names,
        Layout(to, tensor[shards], layout.offset[shards][:, :width], layout.shape[shards][:, :width]),
        shards.tolist(),
    )
