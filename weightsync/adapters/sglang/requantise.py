"""Full-precision weights for layers that quantised theirs when the server started (`--quantization fp8`).

SGLang's own loaders write into what lies in such a layer, which by then is another dtype in another shape: run on
0.5.17, that ends the scheduler. So before a layer is quantised for the first time it is remembered what its parameters
were like (`quantise_once`, a hook). To load it again they are put back, empty; when all its tensors have come the layer
quantises them as it did at the start, and the result is copied over what the kernels and CUDA graphs hold. One bucket's
layers are in full precision at a time. The end of SGLang's session has all layers quantise once more, which the same
hook keeps from those that are quantised.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from weightsync.adapters.sglang.names import follow
from weightsync.errors import LocalProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["HOOKED", "Requantiser", "quantise_once", "remembered"]

_FP8 = "sglang.srt.layers.quantization.fp8"
HOOKED = (f"{_FP8}.Fp8LinearMethod", f"{_FP8}.Fp8MoEMethod")
"""Whose `process_weights_after_loading` quantises."""

_REMEMBERED = "_weightsync_raw"


class _Raw(NamedTuple):
    """A parameter before it was quantised, without its data."""

    kind: type[torch.nn.Parameter]
    attributes: dict[str, Any]  # SGLang's, such as its weight_loader
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device) -> torch.nn.Parameter:
        data = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        parameter = torch.nn.Parameter(data, requires_grad=False)
        parameter.__class__ = self.kind
        parameter.__dict__.update(self.attributes)
        return parameter

    def is_of(self, now: torch.nn.Parameter | None) -> bool:
        """Whether this parameter is like it."""
        return now is not None and (now.shape, now.dtype, now.stride()) == (self.shape, self.dtype, self.stride)


def quantise_once(original: Callable[..., Any], method: Any, layer: torch.nn.Module) -> Any:
    """Around `process_weights_after_loading`: note what the layer's parameters are like before it quantises them for
    the first time, and from then on let it quantise what is like that, and nothing that is quantised.
    """
    raw: dict[str, _Raw] | None = getattr(layer, _REMEMBERED, None)
    if raw is not None:
        as_loaded = all(form.is_of(layer._parameters.get(name)) for name, form in raw.items())
        return original(method, layer) if as_loaded else None
    config = method.quant_config
    # mxfp8 keeps its parameters, for weights that are loaded again, and no push comes to it
    if not getattr(config, "is_checkpoint_fp8_serialized", True) and not getattr(config, "use_mxfp8", False):
        raw = {
            name: _Raw(type(p), dict(p.__dict__), p.shape, p.stride(), p.dtype)
            for name, p in layer._parameters.items()
            if p is not None
        }
        setattr(layer, _REMEMBERED, raw)
    return original(method, layer)


def remembered(model: torch.nn.Module) -> bool:
    """Whether the model has layers that quantised themselves, and that no loader of SGLang's own sees to."""
    own = hasattr(model, "flash_rl_initial_load_complete")
    return not own and any(hasattr(layer, _REMEMBERED) for layer in model.modules())


class Requantiser:
    """One update of one model. Every tensor of a quantised layer must be among `names`."""

    def __init__(self, model: torch.nn.Module, names: Sequence[str]) -> None:
        self._kernel: dict[torch.nn.Module, dict[str, torch.nn.Parameter | None]] = {}  # of layers put back
        self._layer: dict[str, torch.nn.Module] = {}
        self._missing: dict[torch.nn.Module, set[str]] = {}
        if not remembered(model):
            return
        owners = {
            id(parameter): layer
            for layer in model.modules()
            if hasattr(layer, _REMEMBERED)
            for parameter in layer._parameters.values()
            if parameter is not None
        }
        for name in names:
            layer = owners.get(id(follow(model, name.split("."))))
            if layer is not None:
                self._layer[name] = layer
                self._missing.setdefault(layer, set()).add(name)

    @contextmanager
    def loading(self, names: Sequence[str]) -> Iterator[None]:
        """While these tensors are loaded their layers are as they were before; those that are then whole quantise."""
        layers = list(dict.fromkeys(self._layer[name] for name in names if name in self._layer))
        with torch.no_grad():
            for layer in layers:
                if layer not in self._kernel:
                    self._put_back(layer)
            yield
            for name in names:
                if name in self._layer:
                    self._missing[self._layer[name]].discard(name)
            for layer in layers:
                if not self._missing[layer]:
                    self._quantise(layer)

    def finish(self) -> None:
        """Raises `LocalProtocolError` if a layer did not get all of its tensors."""
        if self._kernel:
            name = min(min(self._missing[layer]) for layer in self._kernel)
            raise LocalProtocolError(f"a quantised layer was loaded without {name!r}")

    def abandon(self) -> None:
        """Put the quantised parameters back in place, whatever is in them: the next update begins with them."""
        for layer, kernel in self._kernel.items():
            layer._parameters.update(kernel)
        self._kernel.clear()

    def _put_back(self, layer: torch.nn.Module) -> None:
        self._kernel[layer] = dict(layer._parameters)
        for name, raw in getattr(layer, _REMEMBERED).items():
            if not raw.is_of(layer._parameters.get(name)):
                device = next(p.device for p in layer._parameters.values() if p is not None)
                layer._parameters[name] = raw.empty(device)

    def _quantise(self, layer: torch.nn.Module) -> None:
        kernel = self._kernel[layer]
        method: Any = layer.quant_method
        method.process_weights_after_loading(layer)
        for name, held in kernel.items():
            made = layer._parameters.get(name)
            if held is None or made is None or made is held:
                continue
            if (made.shape, made.dtype) != (held.shape, held.dtype):
                raise LocalProtocolError(f"{name} became {made.dtype} {list(made.shape)}, and was {held.dtype}")
            held.data.copy_(made.data)
            layer._parameters[name] = held
        del self._kernel[layer]
