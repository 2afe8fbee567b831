"""Whatever bytes come, `decode_untrusted` returns a message or raises `CodecError`."""

from __future__ import annotations

import contextlib

import msgpack
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.wire_examples import EXAMPLES
from weightsync.errors import CodecError
from weightsync.wire.codec import decode_untrusted, encode
from weightsync.wire.messages import MESSAGES, Message

FRAMES = [encode(e) for e in EXAMPLES]
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def survives(frame: bytes) -> None:
    with contextlib.suppress(CodecError):
        message = decode_untrusted(frame)
        assert isinstance(message, Message)
        assert decode_untrusted(encode(message)) == message or "nan" in repr(message)


@given(st.binary(max_size=400))
@example(b"\x80")
@settings(max_examples=500)
def test_random_bytes(frame):
    survives(frame)


@given(
    st.sampled_from(FRAMES), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4)
)
@settings(max_examples=800)
def test_mutated_frames(frame, changes):
    mutated = bytearray(frame)
    for at, value in changes:
        mutated[at % len(mutated)] = value
    survives(bytes(mutated))


@given(st.sampled_from(FRAMES), st.integers(0, 10_000), st.integers(0, 40), st.binary(max_size=40))
@settings(max_examples=400)
def test_frames_with_a_piece_cut_out_or_put_in(frame, at, cut, put):
    at %= len(frame)
    survives(frame[:at] + put + frame[at + cut :])


@given(
    st.sampled_from(MESSAGES),
    st.dictionaries(st.sampled_from(sorted({f for m in MESSAGES for f in m.__struct_fields__})), PLAIN, max_size=6),
)
@settings(max_examples=500)
def test_maps_of_the_right_type_with_anything_in_them(kind, fields):
    survives(msgpack.packb({"v": 1, "type": kind.__struct_config__.tag, **fields}))
