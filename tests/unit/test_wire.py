"""Messages ↔ bytes: every message, old bytes, hostile bytes."""

from __future__ import annotations

import json
from pathlib import Path

import msgpack
import pytest

from tests.wire_examples import EXAMPLES
from weightsync.errors import CodecError
from weightsync.wire import codec
from weightsync.wire import messages as msg
from weightsync.wire.codec import decode_untrusted, encode

GOLDEN = sorted(  # later ones say what is written now
    (Path(__file__).parent.parent / "golden").glob("wire-v1-*.json"), key=lambda path: int(path.stem.rpartition("-")[2])
)


def by_type(message: msg.Message) -> str:
    return str(type(message).__struct_config__.tag)


def test_there_is_an_example_of_every_message():
    assert [type(e) for e in EXAMPLES] == list(msg.MESSAGES)


@pytest.mark.parametrize("message", EXAMPLES, ids=by_type)
def test_a_message_survives_the_wire(message):
    assert decode_untrusted(encode(message)) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=by_type)
def test_bytes_of_version_1_are_still_read_and_still_written(message):
    """Bytes once sent stay readable. Where a new field changes what is written, add a new golden file."""
    kept = [json.loads(path.read_text()).get(by_type(message)) for path in GOLDEN]
    golden = [bytes.fromhex(text) for text in kept if text is not None]
    assert all(decode_untrusted(frame) == message for frame in golden)
    assert encode(message) == golden[-1]


@pytest.mark.parametrize("message", EXAMPLES, ids=by_type)
def test_every_truncation_is_a_codec_error(message):
    frame = encode(message)
    for end in range(len(frame)):
        with pytest.raises(CodecError):
            decode_untrusted(frame[:end])
    with pytest.raises(CodecError):
        decode_untrusted(frame + b"\x00")


def frame_of(**fields: object) -> bytes:
    return bytes(msgpack.packb({"v": 1, **fields}))


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (b"", "a frame has"),
        (b"\xc1", "not used here"),
        (b"\xd4\x01\x00", "not used here"),  # an extension type
        (msgpack.packb([1, 2]), "a frame is a map"),
        (msgpack.packb({"type": "heartbeat", "id": 0}), "protocol version None"),
        (msgpack.packb({"v": 2, "type": "heartbeat", "id": 0}), "protocol version 2"),
        (msgpack.packb({"v": True, "type": "heartbeat", "id": 0}), "protocol version True"),
        (frame_of(type="hello", id=0), "'hello' is unknown"),
        (frame_of(type=["x"], id=0), "is unknown"),
        (frame_of(type="heartbeat", id=-1), "id"),
        (frame_of(type="heartbeat", id="x"), "id"),
        (frame_of(type="welcome", id=0, node="x" * 300, heartbeat=1.0), "node"),
        (frame_of(type="welcome", id=0, node="", heartbeat=1.0), "node"),
        (frame_of(type="describe", id=0, layout="text, not bytes"), "layout"),
        (msgpack.packb({1: 2}), "not MessagePack"),
        (b"\x81\xa1v\xa1\xff", "not MessagePack"),  # a string that is no UTF-8
    ],
)
def test_what_is_no_message_is_refused_in_words(frame, words):
    with pytest.raises(CodecError) as caught:
        decode_untrusted(frame)
    assert words in str(caught.value)


def test_an_unknown_version_is_answered_with_the_versions_spoken():
    with pytest.raises(CodecError) as caught:
        decode_untrusted(msgpack.packb({"v": 99, "type": "heartbeat"}))
    assert caught.value.hint == "versions spoken: 1"


@pytest.mark.parametrize(
    "frame",
    [
        b"\xdd\xff\xff\xff\xff" + b"\x00" * 100,  # an array of 4 billion
        b"\xdf\xff\xff\xff\xff" + b"\x00" * 100,
        b"\xc6\xff\xff\xff\xff" + b"\x00" * 100,
        b"\xdb\xff\xff\xff\xff" + b"\x00" * 100,
        b"\x91" * 1000 + b"\x00",  # nested a thousand deep
        (b"\xdc\x03\xe8") * 900 + b"\x00" * 1000,  # nested, each of a thousand
        b"\xdd\x00\x0f\x42\x41" + b"\xc0" * 1_000_001,  # a million and one
    ],
)
def test_hostile_lengths_cost_nothing(frame):
    import tracemalloc

    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            decode_untrusted(frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000


def test_only_messages_that_grow_with_the_model_may_be_large():
    large = msg.Describe(layout=b"x" * (codec.SMALL_FRAME + 1))
    assert decode_untrusted(encode(large)) == large
    with pytest.raises(CodecError, match="at most"):
        decode_untrusted(frame_of(type="lease", id=0, bucket=0, bridge=0, slot=0, more=b"x" * (codec.SMALL_FRAME + 1)))


def test_a_field_of_a_later_version_is_passed_over():
    assert decode_untrusted(frame_of(type="heartbeat", id=0, mood="good")) == msg.Heartbeat()


def test_the_limit_on_frames_holds(monkeypatch):
    monkeypatch.setattr(codec, "MAX_FRAME", 100)
    with pytest.raises(CodecError, match="1 to 100 bytes, not 101"):
        decode_untrusted(b"\x00" * 101)
