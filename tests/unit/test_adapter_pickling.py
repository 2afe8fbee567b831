"""Pickles written by name, read by the real unpickler."""

from __future__ import annotations

import io
import pickle
import types
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightsync.pickling import Call, Global, dumps, namespace

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_values_come_back(value):
    back = pickle.loads(dumps(value))
    assert back == value
    assert type(back) is type(value)


def test_names_calls_and_namespaces():
    value = [
        Global("torch", "bfloat16"),
        Call(Global("torch", "Size"), ([2, 3],)),
        namespace(name="w", shape=(2, 3)),
        Call(Global("collections", "OrderedDict"), ([("a", 1)],)),
    ]
    dtype, size, meta, ordered = pickle.loads(dumps(value))
    assert dtype is torch.bfloat16
    assert size == torch.Size([2, 3])
    assert (meta.name, meta.shape) == ("w", (2, 3))
    assert isinstance(meta, types.SimpleNamespace)
    assert ordered == OrderedDict(a=1)


def test_only_what_is_named_is_looked_up():
    asked = []

    class Spy(pickle.Unpickler):
        def find_class(self, module, name):
            asked.append((module, name))
            return super().find_class(module, name)

    Spy(io.BytesIO(dumps({"m": [namespace(a=1), namespace(a=2)]}))).load()
    assert asked == [("types", "SimpleNamespace")] * 2


@pytest.mark.parametrize("value", [object(), {1, 2}, Global("a\nb", "c"), 1 << 3000])
def test_anything_else_is_refused(value):
    with pytest.raises(TypeError):
        dumps(value)
