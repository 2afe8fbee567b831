"""Checkpoints on disk: sound ones are read box by box, damaged ones refused before anything is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.plan_kit import filled, read_back
from weightsync.errors import SourceError
from weightsync.plan.buckets import plan_push
from weightsync.sources import CheckpointSource, Source, source_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for i, dtype in enumerate(DTYPES):
        raw = torch.randint(0, 2, (4 + i, 3, 16), dtype=torch.uint8, generator=generator)
        made[f"layers.{i}.w"] = raw.view(dtype)
    return made | {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3)}


def in_two_files(directory: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of two files and their index."""
    made = tensors()
    names = list(made)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, some in files.items():
        save_file({name: made[name] for name in some}, directory / file)
    weight_map = {name: file for file, some in files.items() for name in some}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return made


def by_hand(path: Path, header: object, data: bytes = b"\0" * 16, length: int | None = None) -> Path:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def read(
    source: Source, shard: int, offset: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype)
    source.read_into(shard, offset, shape, out)
    return out


def test_files_and_index(tmp_path):
    made = in_two_files(tmp_path)
    with CheckpointSource(tmp_path) as source:
        layout = source.layout()
        assert sorted(layout.tensors.names) == sorted(made)
        assert source.nbytes == sum(t.nbytes for t in made.values())
        for i in range(len(layout)):
            tensor = made[layout.shard(i).name]
            assert source.box_bytes(i, (0,) * tensor.dim(), tuple(tensor.shape)) is None
            out = read(source, i, (0,) * tensor.dim(), tuple(tensor.shape), tensor.dtype)
            np.testing.assert_array_equal(raw(out), raw(tensor))
        assert source_of(source) is source


def test_a_single_file(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with CheckpointSource(tmp_path) as whole, CheckpointSource(str(tmp_path / "model.safetensors")) as file:
        assert whole.layout() == file.layout()


def test_every_box_into_any_memory(tmp_path):
    tensor = torch.arange(6 * 5 * 7, dtype=torch.int32).reshape(6, 5, 7)
    save_file({"t": tensor}, tmp_path / "model.safetensors")
    boxes = [
        ((0, 0, 0), (6, 5, 7)),
        ((2, 0, 0), (3, 5, 7)),
        ((1, 2, 0), (4, 2, 7)),
        ((1, 2, 3), (4, 2, 3)),
        ((5, 4, 6), (1, 1, 1)),
    ]
    with CheckpointSource(tmp_path) as source:
        for (a, b, c), shape in boxes:
            expected = tensor[a : a + shape[0], b : b + shape[1], c : c + shape[2]]
            assert read(source, 0, (a, b, c), shape, torch.int32).equal(expected)
            slot = torch.zeros(8, 8, 8, dtype=torch.int32)
            window = (
                slot[1 : 1 + shape[0], ::2][:, : shape[1], : shape[2]]
                if shape[1] <= 4
                else slot[: shape[0], : shape[1], : shape[2]]
            )
            source.read_into(0, (a, b, c), shape, window)
            assert window.equal(expected)
        assert read(source, 0, (0, 0, 0), (0, 5, 7), torch.int32).numel() == 0


def test_scratch_is_bounded(tmp_path, monkeypatch):
    """Boxes far larger than scratch, into memory and out of files that force the use of it."""
    monkeypatch.setattr("weightsync.sources.checkpoint._SCRATCH", 64)
    monkeypatch.setattr("weightsync.sources.checkpoint._DIRECT", 128)
    tensor = torch.arange(40 * 50, dtype=torch.int16).reshape(40, 50)
    save_file({"t": tensor, "v": tensor.reshape(-1).clone()}, tmp_path / "model.safetensors")
    with CheckpointSource(tmp_path) as source:
        names = source.layout().tensors.names
        t, v = names.index("t"), names.index("v")
        slot = torch.zeros(50, 80, dtype=torch.int16)
        source.read_into(t, (3, 5), (30, 40), slot[10:40, 20:60])
        assert slot[10:40, 20:60].equal(tensor[3:33, 5:45])
        assert read(source, t, (3, 5), (30, 2), torch.int16).equal(tensor[3:33, 5:7])
        columns = torch.zeros(50, 40, dtype=torch.int16).T
        source.read_into(t, (0, 0), (40, 50), columns)
        assert columns.equal(tensor)
        every_other = torch.zeros(4000, dtype=torch.int16)[::2]
        source.read_into(v, (0,), (2000,), every_other)
        assert every_other.equal(tensor.reshape(-1))


def test_a_whole_push_of_it(tmp_path):
    made = in_two_files(tmp_path)
    with CheckpointSource(tmp_path) as source:
        layout = source.layout()
        plan = plan_push([layout], slot_bytes=100, owners=2, alignment=8)
        data = []
        for i in range(len(layout)):
            tensor = made[layout.shard(i).name]
            out = read(source, i, (0,) * tensor.dim(), tuple(tensor.shape), tensor.dtype)
            data.append(raw(out).view(f"u{tensor.itemsize}").reshape(tuple(tensor.shape)))
        back = read_back(plan.manifest, filled(plan, [layout], [data]))
        for name, tensor in made.items():
            np.testing.assert_array_equal(back[name].reshape(-1).view(np.uint8), raw(tensor))


def test_a_box_never_converts(tmp_path):
    save_file({"t": torch.zeros(2)}, tmp_path / "model.safetensors")
    with CheckpointSource(tmp_path) as source, pytest.raises(ValueError, match="does not go into"):
        source.read_into(0, (0,), (2,), torch.empty(2, dtype=torch.float64))


def test_closing(tmp_path, no_leaks):
    in_two_files(tmp_path)
    source = CheckpointSource(tmp_path)
    source.close()
    source.close()
    with pytest.raises(SourceError, match="closed"):
        read(source, 0, (0,), (1,), torch.float32)
    CheckpointSource(tmp_path)  # forgotten: its files go with it


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    save_file({"t": torch.zeros(100)}, tmp_path / "model.safetensors")
    with CheckpointSource(tmp_path) as source:
        os.truncate(tmp_path / "model.safetensors", 200)
        with pytest.raises(SourceError, match=r"model.safetensors has become shorter"):
            read(source, 0, (0,), (100,), torch.float32)


def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"t": entry(offsets=[0, 20])}, "'t' in .* has data_offsets 0 to 20, but the file holds 16 bytes"),
        ({"t": entry(offsets=[16, 0])}, "data_offsets 16 to 0"),
        ({"t": entry(offsets=[-4, 12])}, "not lists of whole numbers"),
        ({"t": entry(offsets=[0])}, "not lists of whole numbers"),
        ({"t": entry(offsets=[0, 16.0])}, "not lists of whole numbers"),
        ({"t": entry(offsets=None)}, "not lists of whole numbers"),
        ({"t": entry(shape=[5])}, "'t' in .* has 16 bytes, which float32 of shape .5,. has not"),
        ({"t": entry(shape=[1 << 62])}, "whole numbers"),
        ({"t": entry(shape=[1 << 61, 1 << 61])}, "has 16 bytes"),
        ({"t": entry(shape=[True, 4])}, "whole numbers"),
        ({"t": entry(shape="4")}, "whole numbers"),
        ({"t": entry(dtype="F4")}, "'t' in .* has dtype 'F4'"),
        ({"t": entry(dtype=[])}, "has dtype"),
        ({"t": {"dtype": "F32"}}, "lacks"),
        ({"t": 3}, "lacks"),
        ({"": entry()}, "cannot be sent"),
        ([], "JSON object"),
        (b"{", "JSON"),
        (b"\xff\xff", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"t": 1, "t": 2}', "'t' occurs twice"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, no_leaks, header, why):
    path = by_hand(tmp_path / "model.safetensors", header)
    with pytest.raises(SourceError, match=why) as caught:
        CheckpointSource(path)
    if not why.startswith("cannot"):
        assert str(path) in caught.value.message


@pytest.mark.parametrize("length", [3, 1 << 30, (1 << 64) - 1])
def test_a_header_longer_than_its_file_is_refused(tmp_path, length):
    path = by_hand(tmp_path / "model.safetensors", b"", b"", length)
    if length == 3:
        path.write_bytes(b"abc")
    with pytest.raises(SourceError, match="no safetensors file, or is cut short"):
        CheckpointSource(path)


def test_a_truncated_file_is_refused(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    os.truncate(tmp_path / "model.safetensors", size - 1)
    with pytest.raises(SourceError, match="data_offsets"):
        CheckpointSource(tmp_path)


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ({"weight_map": {"t": "missing.safetensors"}}, "cannot open .*missing.safetensors: No such file"),
        ({"weight_map": {"u": "there.safetensors"}}, "there.safetensors does not have tensor 'u'"),
        ({"weight_map": {"t": "../there.safetensors"}}, "no name of a file beside it"),
        ({"weight_map": {"t": "/etc/passwd"}}, "no name of a file beside it"),
        ({"weight_map": {"t": ".."}}, "no name of a file beside it"),
        ({"weight_map": {"t": 3}}, "no name of a file beside it"),
        ({"weight_map": ["t"]}, "no weight_map"),
        ({}, "no weight_map"),
        ([], "JSON object"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, no_leaks, index, why):
    save_file({"t": torch.zeros(1)}, tmp_path / "there.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match=why):
        CheckpointSource(tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SourceError, match="no safetensors checkpoint") as caught:
            CheckpointSource(path)
        assert "model.safetensors.index.json" in str(caught.value)


STREAM = """
import sys
import torch
from weightsync.plan.buckets import plan_push
from weightsync.plan.parts import parts_by_bucket
from weightsync.sources import CheckpointSource

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024

slot_bytes = 4 << 20
with CheckpointSource(sys.argv[1]) as source:
    layout = source.layout()
    plan = plan_push([layout], slot_bytes=slot_bytes, owners=1)
    slot = torch.zeros(slot_bytes, dtype=torch.uint8)
    before = status("VmRSS:")
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    m = plan.manifest
    for parts in parts_by_bucket(m, layout, plan.fills[0]):
        for part in parts:
            begin = int(m.piece_offset[part.piece])
            out = slot[begin : begin + int(m.piece_nbytes[part.piece])].view(torch.bfloat16).view(part.shape)
            source.read_into(part.shard, part.src_offset, part.shape, out)
    print(status("VmHWM:") - before, m.nbytes, m.buckets)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    for file in range(2):
        save_file(
            {f"f{file}.{i}": torch.ones(3 << 20, dtype=torch.bfloat16) for i in range(8)},
            tmp_path / f"{file}.safetensors",
        )
    weight_map = {f"f{file}.{i}": f"{file}.safetensors" for file in range(2) for i in range(8)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    grown, nbytes, buckets = map(int, done.stdout.split())
    assert (nbytes, buckets) == (96 << 20, 32)
    assert grown < 3 * (4 << 20), f"reading {nbytes} bytes took {grown} bytes more"
