"""A manifest is told whole once, and by its digest as long as both sides remember it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.hand_push import as_bytes, manifest_of
from weightsync.errors import CodecError, LocalProtocolError
from weightsync.plan.packing import DIGEST_BYTES
from weightsync.plan.replay_facts import LAYOUTS
from weightsync.plan.told import SeenManifests, ToldManifests

MANIFESTS = [
    manifest_of(as_bytes([("w", torch.zeros(4)), ("v", torch.zeros(n + 1))]), slot_bytes=1024)
    for n in range(LAYOUTS + 3)
]


@given(st.lists(st.sampled_from(MANIFESTS)))
def test_both_sides_remember_the_same(pushed):
    told, seen = ToldManifests(), SeenManifests()
    for manifest in pushed:
        assert seen.of(told.tell(manifest)) == manifest


def test_the_second_time_it_is_its_digest_and_the_same_object():
    told, seen = ToldManifests(), SeenManifests()
    first = seen.of(told.tell(MANIFESTS[0]))
    again = told.tell(MANIFESTS[0])
    assert again == MANIFESTS[0].digest
    assert seen.of(again) is first
    assert seen.of(MANIFESTS[0].pack()) is first


def test_what_is_not_remembered_is_told_whole_after_a_failure():
    told, seen = ToldManifests(), SeenManifests()
    told.tell(MANIFESTS[0])  # to a worker that has been replaced since
    with pytest.raises(LocalProtocolError, match="does not remember"), told.unless_it_fails():
        seen.of(told.tell(MANIFESTS[0]))
    assert seen.of(told.tell(MANIFESTS[0])) == MANIFESTS[0]


@pytest.mark.parametrize("nonsense", [b"", b"\x80\x04N.", bytes(DIGEST_BYTES), bytes(DIGEST_BYTES + 1)])
def test_nonsense_is_an_error(nonsense):
    with pytest.raises((CodecError, LocalProtocolError)):
        SeenManifests().of(nonsense)
