"""The fingerprint against its definition, and its values that peers of other versions rely on."""

from __future__ import annotations

import numpy as np
import pytest

from weightsync.fingerprint import combine, fingerprint
from weightsync.plan import boxes

MASK = (1 << 64) - 1


def splitmix64(i: int) -> int:
    z = (i + 1) * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def by_definition(rows: list[bytes]) -> int:
    total = 0
    for r, row in enumerate(rows):
        for c in range(0, len(row), 8):
            word = int.from_bytes(row[c : c + 8], "little")
            total += (splitmix64((1 << 63) + r) | 1) * (splitmix64(c // 8) | 1) * word
    return total & MASK


def of(data: bytes | np.ndarray, shape: tuple[int, ...], itemsize: int = 1) -> int:
    flat = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    return fingerprint(flat, itemsize=itemsize, global_shape=shape, offset=(0,) * len(shape), shape=shape)


def random_bytes(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, n, dtype=np.uint8)


def test_splitmix64_is_the_generator_everyone_knows():
    # The first outputs for seed 0, as in the public-domain reference implementation.
    first = boxes.splitmix64(np.arange(3, dtype=np.uint64)).tolist()
    assert first == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_values_never_change():
    data = bytes(range(48))
    assert of(data, (48,)) == 0x2571BB50218AD678
    assert of(data, (4, 12)) == 0x4AC59FA79D265A40
    assert of(data, (2, 3, 4), 2) == 0xD3E885E469041028
    assert of(data[:2], (), 2) == 0xDA40EAB34311B500


@pytest.mark.parametrize("columns", [1, 7, 8, 24, 4096])
def test_follows_its_definition(columns):
    data = random_bytes(5 * columns)
    rows = data.reshape(5, columns)
    assert of(data, (5, columns)) == by_definition([row.tobytes() for row in rows])
    assert of(data, (5 * columns,)) == by_definition([data.tobytes()])


def test_nothing_is_zero():
    assert of(b"", (0,)) == 0
    assert of(b"", (3, 0)) == 0
    assert combine([]) == 0


def test_sums_wrap():
    assert combine([(1 << 64) - 1, 2]) == 1


@pytest.mark.parametrize("cut", [1, 8, 8 * (1 << 15) - 3, 8 * (1 << 18) + 1])
def test_rows_longer_than_one_step_add_up(cut):
    """Runs are summed in steps of 2^15 or 2^18 words; cuts near these and in the middle of words."""
    n = 8 * ((1 << 18) + 100) + 5
    data = random_bytes(n)
    parts = [
        fingerprint(part, itemsize=1, global_shape=(n,), offset=(at,), shape=(len(part),))
        for at, part in ((0, data[:cut]), (cut, data[cut:]))
    ]
    assert combine(parts) == of(data, (n,))


def test_far_rows_and_columns_are_beyond_the_tables():
    far = 1 << 40
    data = random_bytes(16)
    column = fingerprint(data, itemsize=1, global_shape=(far,), offset=(8 * far // 16,), shape=(16,))
    words = [int.from_bytes(data[i : i + 8].tobytes(), "little") for i in (0, 8)]
    at = far // 16
    assert column == sum((splitmix64(1 << 63) | 1) * (splitmix64(at + i) | 1) * words[i] for i in (0, 1)) & MASK
    row = fingerprint(data, itemsize=1, global_shape=(far, 16), offset=(far - 1, 0), shape=(1, 16))
    assert row == sum((splitmix64((1 << 63) + far - 1) | 1) * (splitmix64(i) | 1) * words[i] for i in (0, 1)) & MASK


def test_strided_data_is_the_same_as_its_copy():
    data = random_bytes(6 * 10 * 32).reshape(6, 10, 32)
    strided = data[::2, 1:6, 8:24]
    assert not strided.flags.c_contiguous

    def of_box(box: np.ndarray) -> int:
        return fingerprint(box, itemsize=2, global_shape=(9, 12, 20), offset=(1, 2, 3), shape=(3, 5, 8))

    assert of_box(strided) == of_box(np.ascontiguousarray(strided).reshape(-1))
    backwards = np.flip(strided, 2)
    assert of_box(backwards) == of_box(np.ascontiguousarray(backwards))


def test_unaligned_memory_is_read_alike():
    data = random_bytes(8 * 64 + 3)
    assert of(data[3:], (8, 64)) == of(data[3:].copy(), (8, 64))


@pytest.mark.parametrize(
    "box",
    [
        {"offset": (0, 0), "shape": (2, 4)},  # larger than its data
        {"offset": (2, 0), "shape": (3, 2)},  # outside the tensor
        {"offset": (-1, 0), "shape": (3, 2)},
        {"offset": (0,), "shape": (6,)},  # not as many dimensions
    ],
)
def test_shapes_that_do_not_fit_are_refused(box):
    with pytest.raises(ValueError, match="box"):
        fingerprint(random_bytes(6), itemsize=1, global_shape=(4, 2), **box)


def test_a_transposed_array_is_refused():
    with pytest.raises(ValueError, match="shape"):
        fingerprint(random_bytes(6).reshape(2, 3), itemsize=1, global_shape=(3, 2), offset=(0, 0), shape=(3, 2))
