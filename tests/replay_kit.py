"""Pushes into a loader in the test's own process, bucket by bucket, as a worker's plugin makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tests.hand_push import as_bytes, fill_slot, manifest_of
from weightsync.replay.bucket import ReadBucket
from weightsync.replay.model import ModelState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from weightsync.plan.manifest import Manifest
    from weightsync.replay.state import ModelReplay

__all__ = ["Model", "read_buckets", "same"]


def read_buckets(
    weights: Mapping[str, torch.Tensor], slot_bytes: int, device: torch.device | str = "cpu"
) -> tuple[Manifest, Iterator[ReadBucket]]:
    """Return a manifest, and its buckets as a `SlotReader` on `device` reads them.

    No reference to a bucket is left once the next is asked for.
    """
    tensors = as_bytes(weights.items())
    manifest = manifest_of(tensors, slot_bytes=slot_bytes)

    def buckets() -> Iterator[ReadBucket]:
        parts: dict[int, torch.Tensor] = {}
        sizes = manifest.tensors.sizes
        come = [0] * len(sizes)
        for bucket in range(manifest.buckets):
            data = torch.zeros(int(manifest.bucket_nbytes[bucket]), dtype=torch.uint8)
            fill_slot(manifest, bucket, tensors, data.numpy().data)
            cut = {}
            for piece in manifest.bucket_pieces(bucket):
                tensor, nbytes = int(manifest.piece_tensor[piece]), int(manifest.piece_nbytes[piece])
                if nbytes == int(sizes[tensor]):
                    continue
                part = parts.setdefault(tensor, torch.empty(int(sizes[tensor]), dtype=torch.uint8))
                start = int(manifest.piece_start[piece]) * int(manifest.tensors.itemsizes[tensor])
                at = int(manifest.piece_offset[piece])
                part[start : start + nbytes] = data[at : at + nbytes]
                come[tensor] += nbytes
                if come[tensor] == int(sizes[tensor]):
                    cut[tensor] = parts.pop(tensor)
                del part
            cut = {tensor: whole.to(device) for tensor, whole in cut.items()}
            yield ReadBucket(manifest, bucket, data.to(device), cut)
            del data, cut

    return manifest, buckets()


class Model(torch.nn.Module):
    """A model of these parameters, with a loader that calls `load`."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], load: Callable[[Any, Any], object]) -> None:
        super().__init__()
        self.heard: list[str] = []  # names that the loader got in the last push
        self._load = load
        for name, value in parameters.items():
            layer, _, leaf = name.rpartition(".")
            home: torch.nn.Module = self
            for step in filter(None, layer.split(".")):
                if not hasattr(home, step):
                    home.add_module(step, torch.nn.Module())
                home = getattr(home, step)
            home.register_parameter(leaf, torch.nn.Parameter(value.clone(), requires_grad=False))

    def load_weights(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        self.heard += [name for name, _ in tensors]
        with torch.no_grad():
            self._load(ModelState.of(self).tensors, tensors)

    def push(
        self, replay: ModelReplay, weights: Mapping[str, torch.Tensor], slot_bytes: int = 1 << 20, *, pull: bool = False
    ) -> None:
        """Make one push through `replay`."""
        self.heard = []
        manifest, buckets = read_buckets(weights, slot_bytes, next(self.parameters()).device)
        replay.begin(manifest, self)
        for bucket in buckets:
            if pull and replay.takes(bucket.index):
                replay.pull(bucket)
            else:
                replay.load(bucket, self.load_weights)
            del bucket
        replay.finish(lambda: ModelState.of(self))

    def loaded(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the parameters after the loader has loaded these weights."""
        self.load_weights(list(weights.items()))
        return {name: tensor.clone() for name, tensor in ModelState.of(self).tensors.items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, NaNs included."""
    return as_bytes([("", one)]) == as_bytes([("", other)])
