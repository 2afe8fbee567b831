"""The node: where slots would lie, whether there is room for them, and whether its GPUs reach each other."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from weightsync.adapters.base import Finding
from weightsync.doctor.arenas import held
from weightsync.doctor.joined import examine_joined
from weightsync.doctor.packages import examine_packages
from weightsync.doctor.sizes import size
from weightsync.errors import ConfigError
from weightsync.gpus import Gpu, links, peer_states, survey
from weightsync.ipc.arena import MAX_READERS, stride
from weightsync.ipc.fences import CELL_BYTES
from weightsync.ipc.segments import DIRECTORY
from weightsync.placement import keeper_gpu, placed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from weightsync.config import NodeConfig

__all__ = ["Node", "examine_node", "room", "worst_first"]

_COUNTERS = 80_064  # bytes of a bridge's reference counters for stock engines, see transports/torch_cuda.py
_CONTEXT = 1 << 29  # bytes; about what a process's CUDA context takes of a GPU
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_REASONS = {
    "CNS": "the chipset does not let them",
    "GNS": "this kind of GPU cannot",
    "TNS": "the way between them does not let them",
    "DR": "switched off in the driver's settings",
}


class Node(NamedTuple):
    """The node that engines are judged for."""

    config: NodeConfig  # with every choice made, if `placed` could make them
    gpus: tuple[Gpu, ...]  # this machine's, in the driver's order

    @property
    def on_gpus(self) -> bool:
        """Whether slots would lie on GPUs."""
        return self.config.arena.device != "cpu"


def examine_node(config: NodeConfig, environment: Mapping[str, str] = os.environ) -> tuple[Node, list[Finding]]:
    """Examine this node for a weightsyncd that is started with this config. Calls nvidia-smi up to four times."""
    gpus: tuple[Gpu, ...] = ()
    found = []
    try:
        gpus = tuple(survey())
    except ConfigError as error:
        found.append(Finding(level="warn", what=error.message, fix=error.hint or ""))
    try:
        config = placed(config, environment, gpus)
    except ConfigError as error:
        found.append(Finding(level="fail", what=error.message, fix=error.hint or ""))
    node = Node(config, gpus)
    chosen = [gpu for gpu in gpus if gpu.uuid in config.node.gpus]
    if node.on_gpus:
        found += _arenas(config, chosen)
        found += _peers(gpus, chosen)
        found += _links(gpus)
        found += examine_packages()
        found += _allocator(environment)
        found += examine_joined(config, environment)
    if config.arena.device != "auto":  # still "auto" if `placed` failed: then the number of slots is not known
        found.append(room(config))
    return node, worst_first(found)


def room(config: NodeConfig) -> Finding:
    """Judge whether the files of all bridges fit into shared memory. This node's present files count as free."""
    arena, directory, bridges = config.arena, config.node.shm_dir, max(config.node.bridges, 1)
    control = stride(1) + stride(arena.slots * MAX_READERS * CELL_BYTES)
    if arena.device == "cpu":
        need = bridges * (control + arena.slots * stride(arena.slot_bytes))
        what = f"{bridges} × {arena.slots} slots of {size(arena.slot_bytes)}, in host memory, need {size(need)}"
    else:
        need = bridges * (control + stride(_COUNTERS))
        what = f"fences and reference counters need {size(need)}"
    try:
        free = shutil.disk_usage(directory).free + held(config)
    except OSError as error:
        return Finding(level="fail", what=f"node.shm_dir = {directory}: {error.strerror}", fix=f"use {DIRECTORY}")
    what = f"{what} of {directory}, which has {size(free)} free"
    if need > free:
        fix = f"docker run --shm-size={-(-need // 2**20)}m or more; or smaller arena.slots, arena.slot_bytes"
        return Finding(level="fail", what=what, fix=fix)
    if os.path.realpath(directory) != DIRECTORY:
        fix = f"leave node.shm_dir at {DIRECTORY}, or use the engines' plugins"
        return Finding(level="warn", what=f"{what}; stock engines look in {DIRECTORY} alone", fix=fix)
    return Finding(level="ok", what=what)


def worst_first(found: Iterable[Finding]) -> list[Finding]:
    """Return the findings sorted: failures, warnings, then what is well."""
    order = {"fail": 0, "warn": 1, "ok": 2}
    return sorted(found, key=lambda finding: order[finding.level])


def _arenas(config: NodeConfig, gpus: Sequence[Gpu]) -> list[Finding]:
    """Judge whether each arena fits on its GPU.

    Not judged if weightsyncd runs already, because its own arenas would count as taken.
    """
    slots, slot_bytes = config.arena.slots, config.arena.slot_bytes
    found = []
    runs = held(config) > 0
    models = {engine.model for engine in config.engines if not engine.frozen} if config.node.retain == "host" else ()
    keepers = Counter(keeper_gpu(config.node.gpus, others) for others in range(len(models)))
    for gpu in gpus:
        need = slots * stride(slot_bytes)
        what = f"slots lie on GPU {gpu.uuid}: {slots} × {size(slot_bytes)} take {size(need)}"
        if kept := keepers[gpu.uuid] * (slot_bytes + _CONTEXT):
            need += kept
            what += f", and reading them for late engines (node.retain) {size(kept)}"
        if runs:
            found.append(Finding(level="ok", what=f"{what}; weightsyncd of {config.node.name} runs and has them"))
        elif gpu.free is None:
            fix = "nvidia-smi says nothing about its memory; arena.slot_bytes sets the size of a slot"
            found.append(Finding(level="warn", what=f"{what}; how much is free cannot be told", fix=fix))
        elif need + _CONTEXT > gpu.free:
            fix = "smaller arena.slots or arena.slot_bytes, or a smaller share of the GPU for engine and trainer"
            what = f"{what} and a CUDA context {size(_CONTEXT)}, and {size(gpu.free)} are free"
            found.append(Finding(level="fail", what=what, fix=fix))
        else:
            found.append(Finding(level="ok", what=f"{what} of {size(gpu.free)} free"))
    return found


def _peers(gpus: Sequence[Gpu], chosen: Sequence[Gpu]) -> list[Finding]:
    """Find pairs of GPUs, at least one with slots, that cannot map each other's memory; one finding for each reason."""
    if len(gpus) < 2 or not chosen:
        return []
    try:
        states = peer_states()
    except ConfigError as error:
        what = f"whether GPUs reach each other cannot be told: {error.message}"
        return [Finding(level="warn", what=what, fix="look at nvidia-smi topo -p2p r")]
    apart: dict[str, dict[frozenset[int], str]] = {}
    for pair, state in sorted(states.items()):
        if state != "OK" and any(at < len(gpus) and gpus[at] in chosen for at in pair):
            names = " and ".join(gpus[at].uuid for at in sorted(pair) if at < len(gpus))
            apart.setdefault(state, {})[frozenset(pair)] = names
    found = [
        Finding(
            level="warn",
            what=f"GPUs that cannot reach each other's memory, {state} ({_REASONS.get(state, 'says nvidia-smi')}): "
            f"{'; '.join(pairs.values())}. A trainer rank or engine on one cannot map slots on the other, and fails",
            fix='node.gpus with GPUs that everybody reaches, or arena.device = "cpu"; nvidia-smi topo -p2p r shows all',
        )
        for state, pairs in apart.items()
    ]
    return found or [Finding(level="ok", what=f"the {len(gpus)} GPUs here reach each other's memory")]


def _links(gpus: Sequence[Gpu]) -> list[Finding]:
    """Examine the links between GPUs. NVLink between only some pairs is a fault more often than a design."""
    if len(gpus) < 2:
        return []
    try:
        found = links()
    except ConfigError:  # `_peers` has said so
        return []
    pairs: dict[str, list[str]] = {}
    for (one, other), link in sorted(found.items()):
        if one < other < len(gpus):
            pairs.setdefault("NVLink" if link.startswith("NV") else link, []).append(f"GPU{one}-GPU{other}")
    slow = {link: names for link, names in pairs.items() if link != "NVLink"}
    if "NVLink" in pairs and slow:
        which = "; ".join(f"{', '.join(names[:8])} {link}" for link, names in slow.items())
        what = f"some GPUs are linked by NVLink and some are not: {which}. Buckets between those go over PCIe"
        fix = "nvidia-smi nvlink --status; systemctl status nvidia-fabricmanager"
        return [Finding(level="warn", what=what, fix=fix)]
    if pairs:
        kinds = sorted({link for (one, other), link in found.items() if max(one, other) < len(gpus)})
        return [Finding(level="ok", what=f"the {len(gpus)} GPUs are linked by {', '.join(kinds)}")]
    return []


def _allocator(environment: Mapping[str, str]) -> list[Finding]:
    """Mention a setting that is known to break CUDA IPC elsewhere, but does not here."""
    return [
        Finding(
            level="ok",
            what=f"{name}={environment[name]} may stay: weights are copied out of torch's memory into slots, and only "
            "slots, of plain cudaMalloc memory, are shared",
        )
        for name in _ALLOCATOR
        if "expandable_segments:true" in environment.get(name, "").lower().replace(" ", "")
    ]
