"""Nodes joined by NCCL: whether it is installed, and what has to be alike on all of them. Does not load NCCL."""

from __future__ import annotations

import re
from importlib.metadata import distributions
from typing import TYPE_CHECKING

from weightsync.adapters.base import Finding
from weightsync.nccl_bridge.library import settings_here
from weightsync.nccl_bridge.terms import interface_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightsync.config import NodeConfig

__all__ = ["examine_joined"]


def examine_joined(config: NodeConfig, environment: Mapping[str, str]) -> list[Finding]:
    """Examine a node whose slots lie on GPUs; no findings if it is joined to no other node."""
    cluster = config.cluster
    if not (cluster.peers or cluster.listen or cluster.seed):
        return []
    versions = sorted(
        {
            found.version
            for found in distributions()
            if re.fullmatch(r"nvidia[-_]nccl[-_]cu\d\d", found.name or "", re.IGNORECASE)
        }
    )
    if not versions:
        what = "nodes are joined by NCCL, which is not installed in weightsyncd's environment"
        fix = "pip install nvidia-nccl-cu13 (or -cu12), unless libnccl.so.2 is the system's"
        return [Finding(level="warn", what=what, fix=fix)]
    if len(versions) > 1:
        what = f"several versions of NCCL are installed, one over the other: {', '.join(versions)}"
        return [Finding(level="fail", what=what, fix="keep the one that torch asks for")]
    settings = settings_here(versions[0], environment)
    alike = ", ".join(f"{name} {value}" for name, value in settings.items())
    interface = environment.get("NCCL_SOCKET_IFNAME") or interface_of(cluster.address)
    where = f"over {interface}" if interface else f"over an interface that NCCL chooses: none has {cluster.address}"
    what = f"nodes are joined by NCCL {where}; the same on every node have to be: {alike}"
    fix = "" if interface else "cluster.address, an IPv4 address of this node; or NCCL_SOCKET_IFNAME"
    return [Finding(level="ok" if interface else "warn", what=what, fix=fix)]
