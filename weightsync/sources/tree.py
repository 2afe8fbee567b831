"""Lists a module's parameters under the names of its checkpoint. A walk recognises modules with known names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from weightsync.sources.fsdp2 import reshard, reshard_all
from weightsync.sources.recent import Recent
from weightsync.sources.tensors import named
from weightsync.sources.wrappers import is_fsdp2, unwrapped_names, wrapped_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

__all__ = ["Listed", "Tree", "parameters_of", "persistent_buffers"]

_LISTING = ("named_parameters", "named_modules", "_named_members")
_MOST = 1 << 22  # modules that a walk may meet


class Listed(NamedTuple):
    """The parameters that a module lists."""

    names: tuple[str, ...]  # without wrappers
    tensors: list[torch.Tensor]
    tree: Tree | None  # the same object for modules with the same names; None: names are put together each time
    met: list[nn.Module | None]  # modules in the order of the walk; without a tree, each module once
    kinds: frozenset[type]  # classes of the modules


@dataclass(frozen=True)
class Tree:
    """What a walk over a module meets, breadth first, without the parameters themselves.

    A shared submodule is met again each time.
    """

    counts: list[int]  # of each module: number of parameters, number of submodules; one -1 for a submodule that is None
    names: list[str]  # of each module's parameters, then of its submodules
    given: list[bool]  # whether each parameter is not None
    kinds: frozenset[type]  # classes of the modules
    wrappers: tuple[int, ...]  # the modules that wrap another

    def parameters(self) -> Iterator[str]:
        """Yield the full names of all parameters, in order."""
        counts, names = iter(self.counts), iter(self.names)
        prefixes = [""]
        for prefix in prefixes:  # grows meanwhile
            own = next(counts)
            if own < 0:
                continue
            below = next(counts)
            for _ in range(own):
                yield prefix + next(names)
            prefixes += [f"{prefix}{next(names)}." for _ in range(below)]


@dataclass(frozen=True)
class _Known:
    """The names of a tree's parameters, as its module lists them."""

    tree: Tree
    names: tuple[str, ...]
    order: list[int]  # each one's index among the parameters that the walk met


_RECENT: Recent[_Known] = Recent()


def parameters_of(module: nn.Module) -> Listed:
    """Return what `module.named_parameters(remove_duplicate=False)` gives, with names without wrappers.

    Names are not put together again if a walk meets the same as in a recent module. Classes that list their parameters
    in their own way are always asked. FSDP2's modules are resharded first, so that their parameters are the sharded
    ones; `SourceError` is raised if one of them is in use.
    """
    met = _walk(module, max((len(known.tree.counts) for known in _RECENT), default=0))
    if met is not None:
        tree, parameters, modules = met
        for known in _RECENT:
            if tree == known.tree:
                _RECENT.add(known)
                return Listed(
                    known.names, list(map(parameters.__getitem__, known.order)), known.tree, modules, tree.kinds
                )
    reshard_all(module.modules())
    given, listed = named(module.named_parameters(remove_duplicate=False))
    names = _without_wrappers(module, given)
    met = _walk(module, _MOST)
    if met is not None:
        tree, parameters, modules = met
        places = {name: i for i, name in enumerate(tree.parameters()) if parameters[i] is not None}
        order = [places.get(name, -1) for name in given]
        same = len(places) == len(names) and all(
            i >= 0 and parameters[i] is parameter for i, parameter in zip(order, listed, strict=True)
        )
        if same:
            _RECENT.add(_Known(tree, names, order))
            return Listed(names, listed, tree, modules, tree.kinds)
    modules = list(module.modules())
    return Listed(names, listed, None, modules, frozenset(map(type, modules)))


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that a checkpoint has, under their names there."""
    for _, prefix, one in unwrapped_names(module):
        for name, buffer in one._buffers.items():
            if buffer is not None and name not in one._non_persistent_buffers_set:
                yield prefix + name, buffer


def _without_wrappers(module: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    if not any(wrapped_in(kind) for kind in {type(one) for one in module.modules()}):
        return names
    short = {full + name: prefix + name for full, prefix, one in unwrapped_names(module) for name in one._parameters}
    return tuple([short.get(name, name) for name in names])


def _walk(module: nn.Module, most: int) -> tuple[Tree, list[nn.Parameter], list[nn.Module | None]] | None:
    """Return the tree of a module, its parameters (None for those that are not given), and the modules in it.

    Returns None if the walk meets a module that lists its parameters in its own way, or more than `most` modules, as in
    one that contains itself. A module of FSDP2 is resharded before the walk reaches submodules with parameters that
    this changes.
    """
    counts: list[int] = []
    names: list[str] = []
    parameters: list[nn.Parameter] = []
    met: list[nn.Module | None] = [module]
    kinds: set[type] = set()
    sharding: set[type] = set()  # classes of FSDP2
    for one in met:  # grows meanwhile; a single pass, because access to scattered memory takes most of the time
        if one is None:
            counts.append(-1)
            kinds.add(type(None))
            continue
        kind = type(one)
        if kind not in kinds:
            kinds.add(kind)
            if is_fsdp2(kind):
                sharding.add(kind)
        if kind in sharding:
            reshard(one)
        state = one.__dict__
        own, below = state.get("_parameters"), state.get("_modules")
        if own is None or below is None:
            return None
        counts.append(len(own))
        counts.append(len(below))
        if own:
            names += own
            parameters += own.values()
        if below:
            names += below
            met += below.values()
            if len(met) > most:
                return None
    wrapping = {kind for kind in kinds if wrapped_in(kind) is not None}
    if any(name in vars(module) for name in _LISTING) or not all(map(_lists_plainly, kinds - wrapping)):
        return None
    wrappers = tuple(i for i, kind in enumerate(map(type, met)) if kind in wrapping) if wrapping else ()
    given = [one is not None for one in parameters]
    return Tree(counts, names, given, frozenset(kinds), wrappers), parameters, met


def _lists_plainly(kind: type) -> bool:
    """Whether modules of this class, or None, list their parameters as `nn.Module` does."""
    return kind is type(None) or all(getattr(kind, name, None) is getattr(nn.Module, name) for name in _LISTING)
