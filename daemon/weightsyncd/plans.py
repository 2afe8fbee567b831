"""Layouts and plans that were seen before, by digest, so that the second push of a layout plans nothing."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsync.errors import PushRefused
from weightsync.plan.buckets import plan_push
from weightsync.plan.layout import Layout
from weightsync.session.events import BucketPlan

if TYPE_CHECKING:
    from weightsync.config import ArenaConfig
    from weightsync.plan.buckets import Plan
    from weightsync.plan.manifest import Manifest
    from weightsync.plan.shares import Share
    from weightsync.plan.table import TensorTable

__all__ = ["CachedPlan", "Plans"]

_PLANS = 16  # kept: models × layouts that alternate on one node
_MAX_RUNS = 2**21  # bytes that describe the runs of one bucket: 131,072 runs
_LAYOUTS = 4096  # kept: ranks of a trainer × models and layouts that alternate; more for a trainer with more ranks


@dataclass(frozen=True)
class CachedPlan:
    """A plan in the forms that pushes need."""

    digest: bytes  # of the manifest and of what every rank fills
    manifest: Manifest
    buckets: tuple[BucketPlan, ...]
    fills: tuple[bytes, ...]  # by rank: little-endian i32
    shares: tuple[tuple[Share, ...], ...]  # by bucket, of each node; empty where one node's ranks write everything


class Plans:
    """The daemon's memory of layouts and plans."""

    def __init__(self, arena: ArenaConfig) -> None:
        self._arena = arena
        self._plans: OrderedDict[bytes, CachedPlan] = OrderedDict()
        self._layouts: OrderedDict[bytes, Layout] = OrderedDict()
        self._tables: dict[bytes, TensorTable] = {}

    def missing(self, digests: tuple[bytes, ...], owners: int, nodes: tuple[int, ...]) -> list[int]:
        """Return the ranks whose layouts are needed for a plan and not known."""
        if self._key(digests, owners, nodes) in self._plans:
            return []
        return [rank for rank, digest in enumerate(digests) if digest not in self._layouts]

    def learn(self, packed: bytes, world: int = 1) -> bytes:
        """Note a layout of a trainer with `world` ranks, and return its digest. Raises `CodecError`."""
        layout = Layout.unpack(packed, self._tables)
        self._layouts[layout.digest] = layout
        self._layouts.move_to_end(layout.digest)
        while len(self._layouts) > max(_LAYOUTS, world):
            self._layouts.popitem(last=False)
        if len(self._tables) > _PLANS:
            self._tables.clear()
        return layout.digest

    async def plan(self, digests: tuple[bytes, ...], owners: int, nodes: tuple[int, ...]) -> CachedPlan:
        """Return the plan for these layouts; `nodes` has each rank's node, and 0 is home.

        Raises `PushRefused` if the layouts contradict each other or do not fit.
        """
        key = self._key(digests, owners, nodes)
        known = self._plans.get(key)
        if known is None:
            layouts = [self._layouts[digest] for digest in digests]
            known = await asyncio.to_thread(self._make, layouts, owners, nodes)
            self._plans[key] = known
            while len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return known

    def _make(self, layouts: list[Layout], owners: int, nodes: tuple[int, ...]) -> CachedPlan:
        arena = self._arena
        plan = plan_push(layouts, slot_bytes=arena.slot_bytes, owners=owners, alignment=arena.alignment, nodes=nodes)
        _check_runs(plan)
        manifest = plan.manifest
        buckets = tuple(
            BucketPlan(int(nbytes), int(owner), fillers)
            for nbytes, owner, fillers in zip(manifest.bucket_nbytes, manifest.bucket_owner, plan.fillers, strict=True)
        )
        fills = tuple(fill.astype("<i4").tobytes() for fill in plan.fills)
        whole = hashlib.blake2b(manifest.digest, digest_size=16)
        for fill in fills:
            whole.update(hashlib.blake2b(fill, digest_size=16).digest())
        return CachedPlan(whole.digest(), manifest, buckets, fills, plan.shares)

    def _key(self, digests: tuple[bytes, ...], owners: int, nodes: tuple[int, ...]) -> bytes:
        """Return a 16-byte digest of everything that a plan depends on."""
        whole = hashlib.blake2b(digest_size=16)
        whole.update(f"{self._arena.slot_bytes}:{self._arena.alignment}:{owners}:{len(digests)}:{nodes}:".encode())
        for digest in digests:
            whole.update(digest)
        return whole.digest()


def _check_runs(plan: Plan) -> None:
    """Raise `PushRefused` if ranks of different nodes write runs that are too many to describe in `_MAX_RUNS` bytes."""
    for index, shares in enumerate(plan.shares):
        if (needed := sum(len(share.runs) for share in shares)) > _MAX_RUNS:
            piece = plan.manifest.bucket_pieces(index)[0]
            name = plan.manifest.tensors.names[plan.manifest.piece_tensor[piece]]
            raise PushRefused(
                f"ranks of different nodes hold {needed // 16} separate runs of the bucket that {name!r} is in",
                hint="shard tensors between nodes by rows (dimension 0), and by columns only within a node; "
                "or make arena.slot_bytes smaller",
            )
