"""Layouts and plans that were seen before, by digest, so that the second push of a layout plans nothing."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsync.plan.buckets import plan_push
from weightsync.plan.layout import Layout
from weightsync.session.events import BucketPlan

if TYPE_CHECKING:
    from weightsync.config import ArenaConfig
    from weightsync.plan.manifest import Manifest
    from weightsync.plan.table import TensorTable

__all__ = ["CachedPlan", "Plans"]

_PLANS = 16  # kept: models × layouts that alternate on one node
_LAYOUTS = 4096  # kept: ranks of a trainer × the same


@dataclass(frozen=True)
class CachedPlan:
    """A plan in the forms that pushes need."""

    digest: bytes  # of the manifest and of what every rank fills
    manifest: Manifest
    buckets: tuple[BucketPlan, ...]
    fills: tuple[bytes, ...]  # by rank: little-endian i32


class Plans:
    """The daemon's memory of layouts and plans."""

    def __init__(self, arena: ArenaConfig) -> None:
        self._arena = arena
        self._plans: OrderedDict[bytes, CachedPlan] = OrderedDict()
        self._layouts: OrderedDict[bytes, Layout] = OrderedDict()
        self._tables: dict[bytes, TensorTable] = {}

    def missing(self, digests: tuple[bytes, ...], owners: int) -> list[int]:
        """Ranks whose layouts are needed for a plan and not known."""
        if self._key(digests, owners) in self._plans:
            return []
        return [rank for rank, digest in enumerate(digests) if digest not in self._layouts]

    def learn(self, packed: bytes) -> bytes:
        """Note a layout and return its digest. Raises `CodecError`."""
        layout = Layout.unpack(packed, self._tables)
        self._layouts[layout.digest] = layout
        while len(self._layouts) > _LAYOUTS:
            self._layouts.popitem(last=False)
        if len(self._tables) > _PLANS:
            self._tables.clear()
        return layout.digest

    async def plan(self, digests: tuple[bytes, ...], owners: int) -> CachedPlan:
        """The plan for these layouts. Raises `PushRefused` where they contradict each other or do not fit."""
        key = self._key(digests, owners)
        known = self._plans.get(key)
        if known is None:
            layouts = [self._layouts[digest] for digest in digests]
            known = await asyncio.to_thread(self._make, layouts, owners)
            self._plans[key] = known
            while len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return known

    def _make(self, layouts: list[Layout], owners: int) -> CachedPlan:
        plan = plan_push(layouts, slot_bytes=self._arena.slot_bytes, owners=owners, alignment=self._arena.alignment)
        manifest = plan.manifest
        buckets = tuple(
            BucketPlan(int(nbytes), int(owner), fillers)
            for nbytes, owner, fillers in zip(manifest.bucket_nbytes, manifest.bucket_owner, plan.fillers, strict=True)
        )
        fills = tuple(fill.astype("<i4").tobytes() for fill in plan.fills)
        whole = hashlib.blake2b(manifest.digest, digest_size=16)
        for fill in fills:
            whole.update(hashlib.blake2b(fill, digest_size=16).digest())
        return CachedPlan(whole.digest(), manifest, buckets, fills)

    def _key(self, digests: tuple[bytes, ...], owners: int) -> bytes:
        """What a plan depends on, in 16 bytes."""
        whole = hashlib.blake2b(digest_size=16)
        whole.update(f"{self._arena.slot_bytes}:{self._arena.alignment}:{owners}:{len(digests)}:".encode())
        for digest in digests:
            whole.update(digest)
        return whole.digest()
