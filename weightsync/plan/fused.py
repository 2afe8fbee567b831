"""Which tensors engines fuse into one, and the order in which tensors travel.

Engines keep some tensors of a checkpoint as one parameter: q, k and v as `qkv_proj`, gate and up as `gate_up_proj`, an
expert's three as slices of stacked tensors. Such a group travels in one bucket, so that an engine's loader, and its
replay, always see a fused parameter whole. The table below follows vLLM's and SGLang's `packed_modules_mapping`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.plan.boxes import Ints

__all__ = ["canonical_order", "group_key", "layer_key", "natural_key"]

# Module names that are fused when they stand side by side in the same parent module: {group: its members}. Weights,
# biases and scales of the members all belong to the group. A name may be in one group only.
FUSED: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "qkv_lin": ("q_lin", "k_lin", "v_lin"),
    "qkv_long": ("query", "key", "value"),
    "qkv_short": ("wq", "wk", "wv", "weights_proj"),  # DeepSeek's sparse-attention indexer fuses weights_proj with wk
    "fused_qkv_a": ("q_a_proj", "kv_a_proj_with_mqa"),  # multi-head latent attention, both compressions in one product
    "gate_up": ("gate_proj", "up_proj"),
    "gate_up_w": ("w1", "w3"),
    # Linear attention: Qwen3-Next and Qwen3.5, Kimi Linear, Falcon-H1 and others differ in which of these they have.
    "in_proj": (
        "in_proj_qkvz",
        "in_proj_ba",
        "in_proj_qkv",
        "in_proj_q",
        "in_proj_k",
        "in_proj_v",
        "in_proj_z",
        "in_proj_a",
        "in_proj_b",
    ),
}

# Members that lie directly in `….experts.N` are one group: all matrices of that expert.
EXPERT_MEMBERS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "linear_fc1", "linear_fc2")

_GROUP_OF = {member: group for group, members in FUSED.items() for member in members}
_EXPERT = frozenset(EXPERT_MEMBERS)
_MEMBERS = _EXPERT.union(_GROUP_OF)
_DIGITS = re.compile(r"\d+")


def group_key(name: str) -> str:
    """Return a key that exactly the tensors of one fused group share; the name itself if it is in no group.

    One of the last three components must be a fused module's name, which leaves room for `.weight`, `.weight_scale` or
    `.base_layer.weight` after it.
    """
    return _group_key(name, name.split("."))


def _group_key(name: str, parts: list[str]) -> str:
    for back in (-1, -2, -3)[: len(parts)]:
        part = parts[back]
        if part not in _MEMBERS:
            continue
        if part in _EXPERT and parts[back - 2 : back - 1] == ["experts"] and parts[back - 1].isdecimal():
            return ".".join((*parts[:back], "[expert]"))
        if part in _GROUP_OF:
            return ".".join((*parts[:back], f"[{_GROUP_OF[part]}]"))
    return name


def layer_key(name: str) -> str:
    """Return a tensor's layer: its name up to the first component that is a number, else its parent module."""
    head, _, _ = name.rpartition(".")
    parts = head.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
    return head


class _SegmentKeys(dict[str, str]):
    """Sort keys of name components, each worked out once: even many names have few distinct components."""

    def __missing__(self, segment: str) -> str:
        # Each run of digits gets its length in front, so that longer (greater) numbers sort after shorter ones.
        key = _DIGITS.sub(_number_key, segment)
        if any(run.startswith("0") and len(run) > 1 for run in _DIGITS.findall(segment)):
            key += "\0" + segment  # "01" and "1" are the same number but not the same name
        self[segment] = key
        return key


def _number_key(match: re.Match[str]) -> str:
    digits = match.group().lstrip("0") or "0"
    return chr(ord("0") + len(digits)) + digits


def natural_key(name: str) -> str:
    """Return a sort key for natural order: runs of digits compare as numbers, all else as text."""
    return ".".join(map(_SegmentKeys().__getitem__, name.split(".")))


def canonical_order(names: Sequence[str]) -> tuple[Ints, Ints]:
    """Return the order in which tensors travel, and where fused groups begin in it.

    The order is the natural order of names, except that the members of a fused group stand together, at the place of
    the first member. It depends on the set of names alone. Returns positions in `names`, in order, and positions in
    that order at which a group (often of one tensor) begins.
    """
    keys = _SegmentKeys()
    sort_keys: list[str] = []
    group_keys: list[str] = []
    for name in names:
        parts = name.split(".")
        sort_keys.append(".".join([keys[part] for part in parts]))
        group_keys.append(_group_key(name, parts))
    natural = sorted(range(len(names)), key=sort_keys.__getitem__)
    # Groups are numbered as they are met, so sorting by number puts each group at the place of its first member.
    number: dict[str, int] = {}
    numbers = np.array([number.setdefault(group_keys[i], len(number)) for i in natural], dtype=np.int64)
    grouped = np.argsort(numbers, kind="stable")
    order = np.array(natural, dtype=np.int64)[grouped]
    return order, np.flatnonzero(np.diff(numbers[grouped], prepend=-1))
