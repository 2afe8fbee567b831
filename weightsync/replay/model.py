"""What a model's layers hold at one moment: tensors, and other attributes that loading may replace."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

__all__ = ["ModelState", "Place"]

_PLAIN = (bool, bytes, complex, float, int, str, torch.dtype, torch.device)
_TORCHS = ("_parameters", "_buffers", "_modules")


class Place(NamedTuple):
    """Where a tensor lies, and its form. A plan holds only while these stay the same."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class ModelState:
    """A model at one moment. The tensors are the model's own, without gradients."""

    tensors: dict[str, torch.Tensor]  # parameters and buffers, each by the first of its names
    things: dict[str, dict[str, Any]]  # layer → its other attributes, and those of the objects in them

    @classmethod
    def of(cls, model: torch.nn.Module) -> ModelState:
        """Take the state that `model` has now."""
        return cls(cls.tensors_of(model).tensors, {path: _things(layer) for path, layer in model.named_modules()})

    @classmethod
    def tensors_of(cls, model: torch.nn.Module) -> ModelState:
        """Take the tensors alone, in a tenth of the time. `replaced` needs more than these."""
        named = (*model.named_parameters(), *model.named_buffers())
        return cls({name: tensor.detach() for name, tensor in named if tensor.device.type != "meta"}, {})

    @property
    def places(self) -> dict[str, Place]:
        """Where each tensor lies."""
        return {name: Place(t.data_ptr(), tuple(t.shape), t.stride(), t.dtype) for name, t in self.tensors.items()}

    def replaced(self, after: ModelState) -> dict[str, str]:
        """Return the tensors for which loading did more than write to them → what. `after` is the state after it."""
        places = after.places
        found = {
            name: "the loader gives it other memory" for name, place in self.places.items() if places.get(name) != place
        }
        for path, before in self.things.items():
            now = after.things.get(path, {})
            other = next((key for key in {**before, **now} if _replaced(before.get(key), now.get(key))), None)
            if other is not None:
                own = [name for name in self.tensors if name.rpartition(".")[0] == path]
                found |= {name: f"loading its layer replaces {other}" for name in own if name not in found}
        return found


def _things(layer: torch.nn.Module) -> dict[str, Any]:
    found = {}
    for key, value in vars(layer).items():
        if key in _TORCHS or isinstance(value, torch.nn.Module):
            continue
        found[key] = _held(value)
        if not isinstance(value, type) and hasattr(value, "__dict__") and not isinstance(value, torch.Tensor):
            found |= {f"{key}.{inner}": _held(of_it) for inner, of_it in vars(value).items()}
    return found


def _held(value: Any) -> Any:
    """Return a weak reference to a value if it can have one, else the value.

    A strong one would keep memory: a function that loading replaces may be all that held a layer's packed weights.
    """
    try:
        return weakref.ref(value)
    except TypeError:
        return value


def _replaced(before: Any, now: Any) -> bool:
    """Whether something else is there now. Plain data may be another object, as long as it is equal."""
    if isinstance(before, weakref.ref) or isinstance(now, weakref.ref):
        return before is not now or before() is None  # a living object always gives the same weak reference
    if before is now:
        return False
    return not (type(before) is type(now) and _plain(before) and _plain(now) and before == now)


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(part) for part in value)
    return value is None or isinstance(value, _PLAIN)
