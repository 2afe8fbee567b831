"""A second, plain implementation of float8 quantising, block by block; and the tensors that a source sends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from weightsync.sources import Fp8, source_of
from weightsync.sources.quantised import QuantisedSource, quantised

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weightsync.sources import Source

__all__ = ["plainly", "quantised_whole", "sent", "tensors_of"]


def plainly(x: torch.Tensor, block: tuple[int, int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the elements and scales of a matrix, or of a stack of matrices."""
    if x.dim() == 3:
        weights, scales = zip(*[plainly(one, block) for one in x], strict=True)
        return torch.stack(weights), torch.stack(scales) if block else torch.cat(scales)
    rows, columns = block or x.shape
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    found = torch.zeros(-(-x.shape[0] // rows), -(-x.shape[1] // columns))
    for i in range(found.shape[0]):
        for j in range(found.shape[1]):
            at = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scale = x[at].abs().max().float().clamp(min=1e-4 if block else 1e-12) / torch.tensor(448.0)
            found[i, j] = scale
            out[at] = (x[at].float() * (1 / scale)).to(out.dtype)
    return out, found if block else found.reshape(1)


def quantised_whole(
    tensors: dict[str, torch.Tensor], names: Iterable[str], block: tuple[int, int] | None
) -> dict[str, torch.Tensor]:
    """Return what is sent of whole tensors if the tensors in `names` are quantised."""
    made = dict(tensors)
    for name in names:
        made[name], made[name + ("_scale_inv" if block else "_scale")] = plainly(tensors[name], block)
    return made


def sent(weights: object, recipe: Fp8 | str, **how: object) -> dict[str, torch.Tensor]:
    """Return all that a source of whole tensors sends, quantised by `recipe`."""
    source = quantised(source_of(weights, **how), recipe)  # type: ignore[arg-type]
    assert isinstance(source, QuantisedSource)
    source.measure()
    return tensors_of(source)


def tensors_of(source: Source) -> dict[str, torch.Tensor]:
    """Return the shards of a source by name, each read in one piece."""
    layout = source.layout()
    found = {}
    for i in range(len(layout)):
        shard = layout.shard(i)
        out = torch.empty(shard.shape, dtype=getattr(torch, shard.dtype))
        source.read_into(i, (0,) * out.dim(), shard.shape, out)
        found[shard.name] = out
    return found
