"""Which rank keeps which whole tensor."""

from __future__ import annotations

from types import SimpleNamespace

from weightsync.integrations.shares import share


def test_ranks_share_the_tensors_and_take_all_of_them_from_the_generator():
    sizes = [100, 1, 1, 60, 40, 100, 2]
    seen = []

    def weights():
        for i, nbytes in enumerate(sizes):
            seen.append(i)
            yield f"t{i}", SimpleNamespace(nbytes=nbytes)

    shares = [dict(share(weights(), rank, 3)) for rank in range(3)]
    assert seen == list(range(len(sizes))) * 3
    names = [name for share in shares for name in share]
    assert sorted(names) == [f"t{i}" for i in range(len(sizes))]
    assert max(sum(t.nbytes for t in share.values()) for share in shares) <= 104 + max(sizes) // 2
