"""Load full-precision weights into layers that quantised theirs when the server started (`--quantization fp8`).

SGLang's own loaders write into the parameters of such a layer, which by then have another dtype and shape: run on
0.5.17, that ends the scheduler. So a hook (`quantise_once`) records the form of a layer's parameters before they are
quantised for the first time. For a push the layer gets empty parameters of that form. When all its tensors have come,
the layer quantises them as it did at the start. The result is copied over the memory that kernels and CUDA graphs hold.
So a layer is in full precision only from its first tensor to its last.

At the end of SGLang's session all layers quantise again; the hook keeps layers that are quantised out of that.
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
"""Classes whose `process_weights_after_loading` quantises."""

_REMEMBERED = "_weightsync_raw"


class _Raw(NamedTuple):
    """The form of a parameter before it was quantised, without its data."""

    kind: type[torch.nn.Parameter]
    attributes: dict[str, Any]  # set by SGLang, such as weight_loader
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
        """Whether this parameter has this form."""
        return now is not None and (now.shape, now.dtype, now.stride()) == (self.shape, self.dtype, self.stride)


def quantise_once(original: Callable[..., Any], method: Any, layer: torch.nn.Module) -> Any:
    """Hook around `process_weights_after_loading`: a layer that is quantised already does not quantise again.

    The first call records the form of the layer's parameters. Later calls quantise only parameters of that form.
    """
    raw: dict[str, _Raw] | None = getattr(layer, _REMEMBERED, None)
    if raw is not None:
        as_loaded = all(form.is_of(layer._parameters.get(name)) for name, form in raw.items())
        return original(method, layer) if as_loaded else None
    config = method.quant_config
    # mxfp8 keeps its original parameters for later loads, and pushes into it are refused
    if not getattr(config, "is_checkpoint_fp8_serialized", True) and not getattr(config, "use_mxfp8", False):
        raw = {
            name: _Raw(type(p), dict(p.__dict__), p.shape, p.stride(), p.dtype)
            for name, p in layer._parameters.items()
            if p is not None
        }
        setattr(layer, _REMEMBERED, raw)
    return original(method, layer)


def remembered(model: torch.nn.Module) -> bool:
    """Whether the model has layers that quantised themselves, and no SGLang loader that quantises them again."""
    own = hasattr(model, "flash_rl_initial_load_complete")
    return not own and any(hasattr(layer, _REMEMBERED) for layer in model.modules())


class Requantiser:
    """Requantises the layers of one model during one update. `names` must have every tensor of a quantised layer."""

    def __init__(self, model: torch.nn.Module, names: Sequence[str]) -> None:
        # layer in full precision → its quantised parameters, whose memory kernels hold
        self._kernel: dict[torch.nn.Module, dict[str, torch.nn.Parameter | None]] = {}
        self._layer: dict[str, torch.nn.Module] = {}  # checkpoint name → its quantised layer
        self._missing: dict[torch.nn.Module, set[str]] = {}  # layer → names that have not come
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
        """Load these tensors inside: their layers are in full precision, and quantise afterwards if they are whole."""
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
        """Raise `LocalProtocolError` if a layer did not get all of its tensors."""
        if self._kernel:
            name = min(min(self._missing[layer]) for layer in self._kernel)
            raise LocalProtocolError(f"a quantised layer was loaded without {name!r}")

    def abandon(self) -> None:
        """Put the quantised parameters back in place, whatever they hold: the next update starts from them."""
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
