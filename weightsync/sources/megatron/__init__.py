"""Trainers on megatron-core: `push_weights(MegatronSource(model, "/path/to/checkpoint"), version=n)` on every rank."""

from __future__ import annotations

from weightsync.sources.megatron.families import FAMILIES
from weightsync.sources.megatron.held import Held, Rule
from weightsync.sources.megatron.rules import QKV, Columns, Gated, Norm, Rows, Vocabulary, Whole
from weightsync.sources.megatron.source import MegatronSource

__all__ = [
    "FAMILIES",
    "QKV",
    "Columns",
    "Gated",
    "Held",
    "MegatronSource",
    "Norm",
    "Rows",
    "Rule",
    "Vocabulary",
    "Whole",
]
