"""The parameters of an `nn.Module`, plain or sharded by FSDP2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from weightsync.errors import SourceError
from weightsync.sources.recent import Recent
from weightsync.sources.tensors import TensorSource, named

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ModuleSource", "parameters_of", "refuse_fsdp1"]

_LISTING = ("named_parameters", "named_modules", "_named_members")
_MOST = 1 << 22  # modules that a walk may meet


class ModuleSource(TensorSource):
    """All parameters of a module under their own names, tied ones once. Buffers are not weights and are left out.

    Names are taken as they are: the module's must be those of the checkpoint that engines read. Give
    `{name: tensor}` instead to rename, to leave some out, or to add buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        """Raises `SourceError` naming the first parameter that cannot be pushed."""
        refuse_fsdp1(module)
        super().__init__(module.named_parameters(remove_duplicate=False))


def parameters_of(module: nn.Module) -> tuple[tuple[str, ...], list[Any]]:
    """The names and parameters that `module.named_parameters(remove_duplicate=False)` gives.

    Names are not put together again for a module in which a walk meets the same as in another lately. Classes that list
    their parameters in their own way are always asked. Raises `SourceError` for FSDP1.
    """
    met = _walk(module, max((len(known.tree.counts) for known in _RECENT), default=0))
    if met is not None:
        tree, parameters = met
        for known in _RECENT:
            if tree == known.tree:
                _RECENT.add(known)
                return known.names, list(map(parameters.__getitem__, known.order))
    refuse_fsdp1(module)
    names, listed = named(module.named_parameters(remove_duplicate=False))
    met = _walk(module, _MOST)
    if met is not None:
        tree, parameters = met
        places = {name: i for i, name in enumerate(tree.parameters()) if parameters[i] is not None}
        order = [places.get(name, -1) for name in names]
        same = len(places) == len(names) and all(
            i >= 0 and parameters[i] is parameter for i, parameter in zip(order, listed, strict=True)
        )
        if same:
            _RECENT.add(_Known(tree, names, order))
    return names, listed


@dataclass(frozen=True)
class _Tree:
    """What a walk over a module meets, breadth first and shared submodules again, but for the parameters themselves."""

    counts: list[int]  # of each module, parameters and submodules; one -1 for a submodule that is None
    names: list[str]  # of each module's parameters, then of its submodules
    given: list[bool]  # parameters that are not None
    kinds: frozenset[type]  # classes of modules

    def parameters(self) -> Iterator[str]:
        """The full names of all parameters, in order."""
        counts, names = iter(self.counts), iter(self.names)
        prefixes = [""]
        for prefix in prefixes:  # which grows meanwhile
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

    tree: _Tree
    names: tuple[str, ...]
    order: list[int]  # which of those that the walk met they are


_RECENT: Recent[_Known] = Recent()


def _walk(module: nn.Module, most: int) -> tuple[_Tree, list[nn.Parameter | None]] | None:
    """The tree of a module, and its parameters. None where more than `most` modules are met, as in one that contains
    itself, or where one lists its parameters in its own way.
    """
    counts: list[int] = []
    names: list[str] = []
    parameters: list[nn.Parameter | None] = []
    met: list[nn.Module | None] = [module]
    for one in met:  # which grows meanwhile; once over everything, since memory that is far apart is what takes time
        if one is None:
            counts.append(-1)
            continue
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
    kinds = frozenset(map(type, met))
    if any(name in vars(module) for name in _LISTING) or not all(map(_lists_plainly, kinds)):
        return None
    return _Tree(counts, names, [one is not None for one in parameters], kinds), parameters


def _lists_plainly(kind: type) -> bool:
    """Whether modules of this class, or None, list their parameters as `nn.Module` does, and are not FSDP1's."""
    if kind is type(None):
        return True
    return not _is_fsdp1(kind) and all(getattr(kind, name, None) is getattr(nn.Module, name) for name in _LISTING)


def _is_fsdp1(kind: type) -> bool:
    return kind.__name__ == "FullyShardedDataParallel"


def refuse_fsdp1(module: nn.Module) -> None:
    """Raise `SourceError` naming the first module in it that FSDP1 wraps."""
    for name, child in module.named_modules():
        if _is_fsdp1(type(child)):
            raise SourceError(
                f"module {name or 'given'!r} is wrapped by FSDP1, whose flat parameters have no checkpoint names",
                hint="shard with torch.distributed.fsdp.fully_shard, or give a mapping of names to DTensors",
            )
