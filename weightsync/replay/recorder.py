"""Watches a loader at work, and notes which bytes of which tensors it copies into which parameters.

    recorder = Recorder(targets)
    recorder.offer(name, tensor)          # before the loader gets it
    with recorder:
        model.load_weights(...)           # once for each bucket
    plan = recorder.plan()

Every operation of torch passes through here and is carried out. Views share memory, so memory is followed: that of the
offered tensors, and memory that they were copied into on the way (a layer put together apart, a copy in another order
or dtype). A result that is computed from them, or from a parameter, cannot be followed, and every tensor that took part
stays with the loader. Nothing is kept alive, because memory is known by a weak reference.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any, Self

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from weightsync.replay.lineage import Lineage, same_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from weightsync.replay.plan import LoadPlan

__all__ = ["Recorder"]

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


class Recorder(TorchDispatchMode):
    """One recording. A context manager that may be entered many times, in one thread."""

    def __init__(self, targets: Mapping[str, torch.Tensor]) -> None:
        """`targets`: the model's parameters and buffers, by name. If two share memory, the first one counts."""
        super().__init__()
        self._lineage = Lineage(targets)
        self._calls = _Calls(self)
        self._targets = tuple(targets)
        self._lost = ""  # why nothing in this recording can be trusted

    def offer(self, name: str, tensor: torch.Tensor) -> None:
        """Note that the loader will get this contiguous tensor, which has the checkpoint's `name`."""
        self._lineage.offer(name, tensor)

    def plan(self, altered: Mapping[str, str]) -> LoadPlan:
        """As `Lineage.plan`. No target can be replayed if an operation could not be followed."""
        return self._lineage.plan({**altered, **dict.fromkeys(self._targets if self._lost else (), self._lost)})

    def __enter__(self) -> Self:
        super().__enter__()
        self._calls.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._calls.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._follow(self._saw, func, args, kwargs, out)
        return out

    def handed_out(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note that code which torch cannot see into got these arguments: it may have read them, or written to them."""
        self._follow(self._gave, func, args, kwargs)

    def _follow(self, note: Callable[..., None], func: Any, *what: Any) -> None:
        """Call `note` with an operation. Its failure must not fail the load that is watched."""
        try:
            note(func, *what)
        except Exception as error:
            logger.exception("weightsync: %s cannot be followed; nothing is replayed", func)
            self._lost = f"{func} cannot be followed: {error!r}"

    def _gave(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        name = str(func) if isinstance(func, OpOverload | OpOverloadPacket) else func.__name__
        for tensor in _tensors((*args, *kwargs.values())):
            self._lineage.spoilt(tensor, f"the loader computes it ({name})", by=name)

    def _saw(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        if func.namespace not in ("aten", "prim", "prims"):  # a collective's schema does not say what it writes
            self._gave(func, args, kwargs)
        elif func in _COPIES:
            self._lineage.copied(args[0], args[1])
        elif func in _CLONES:
            self._lineage.cloned(out, args[0])
        elif func in _FILLS:
            self._lineage.filled(args[0], float(args[1]) if len(args) > 1 else 0.0)
        else:
            self._other(func, args, kwargs, out)

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
        if not changed and outputs and all(any(same_memory(o, i) for i in inputs) for o in outputs):
            return  # a view
        for tensor in inputs:
            self._lineage.read(tensor, name)
        for tensor in outputs if inputs else ():
            if not any(same_memory(tensor, i) for i in inputs):
                self._lineage.made(tensor, name)
        for tensor in changed:
            self._lineage.spoilt(tensor, f"the loader computes it ({name})", by=name)


class _Calls(TorchFunctionMode):
    """Sees calls that bypass the dispatcher: an engine's own operations, and views of memory that are no tensors."""

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
            self._recorder.handed_out(func, args, kwargs)
        return out


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@cache
def _written_arguments(func: Any) -> tuple[int | str, ...]:
    """Return the arguments that an operation writes to: by position, or by name if they are keyword-only."""
    found: list[int | str] = []
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [argument.name] if argument.kwarg_only else [at]
    return tuple(found)
