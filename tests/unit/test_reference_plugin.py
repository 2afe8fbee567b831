"""Manifests judged, and slices loaded out of slots into parameters: numpy alone, no process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from tests.hand_push import Tensors, fill_slot, manifest_of, sent
from weightsync.adapters.reference.admission import admit
from weightsync.adapters.reference.commands import MANIFESTS_KEPT
from weightsync.adapters.reference.config import ModelConfig
from weightsync.adapters.reference.host import HostParameters
from weightsync.adapters.reference.plugin import BucketLoader
from weightsync.adapters.reference.sharding import EMBED, HEAD, RankLayout, checkpoint_tensors, rank_layout
from weightsync.adapters.verify import Verifier
from weightsync.errors import LocalProtocolError, TransportBroken
from weightsync.plan.dtypes import BY_NAME
from weightsync.transports.base import BucketReceiver, Lease

if TYPE_CHECKING:
    from typing import Any

    from weightsync.plan.manifest import Manifest

MOE = ModelConfig(
    architecture="Qwen3MoeForCausalLM",
    vocab_size=149,
    hidden_size=12,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=4,
    num_experts=3,
    num_experts_per_tok=1,
    moe_intermediate_size=8,
    decoder_sparse_step=2,
    dtype="bfloat16",
)
TIED = msgspec.structs.replace(MOE, tie_word_embeddings=True, dtype="float32")
NAMES = tuple(checkpoint_tensors(MOE))


def random_tensors(config: ModelConfig, seed: int = 0) -> Tensors:
    generator = np.random.default_rng(seed)
    itemsize = BY_NAME[config.dtype].itemsize
    return {
        name: (config.dtype, shape, generator.bytes(int(np.prod(shape)) * itemsize))
        for name, shape in checkpoint_tensors(config).items()
    }


def shown(held: Rank, manifest: Manifest) -> set[str]:
    """Names of the tensors that this rank holds boxes of."""
    return {manifest.tensors.names[i] for i in held.loader.residents(manifest.digest).tensor}


class SlotReceiver(BucketReceiver):
    """Hands out buckets; the ticket is the bucket's number. Counts leases not released."""

    def __init__(self, manifest: Manifest, tensors: Tensors) -> None:
        super().__init__()
        self.slots = [np.full(int(size), 0xEE, dtype=np.uint8) for size in manifest.bucket_nbytes]
        for bucket, slot in enumerate(self.slots):
            fill_slot(manifest, bucket, tensors, slot.data)
        self.offers: list[bytes] = []
        self.open = 0

    def accept(self, offer: bytes, *, deadline: float) -> None:
        self.offers.append(offer)

    def receive(self, ticket: bytes, *, deadline: float, verify: bool = True) -> Lease:
        slot = self.slots[int(ticket)]
        self.open += 1

        def on_release() -> None:
            self.open -= 1
            slot.fill(0xDD)  # whoever still looks at it sees garbage

        return Lease(sequence=0, nbytes=len(slot), lent=slot.data.toreadonly(), on_release=on_release)

    def close(self) -> None:
        self._ended.set()

    def abort(self) -> None:
        self._ended.set()


class Rank:
    """One rank's parameters and loader."""

    def __init__(self, config: ModelConfig, tp: int, rank: int, manifest: Manifest, tensors: Tensors) -> None:
        self.layout: RankLayout = rank_layout(config, tp, rank)
        kind = f"u{BY_NAME[config.dtype].itemsize}"
        self.arrays: dict[str, np.ndarray[Any, Any]] = {
            name: np.zeros(shape, kind) for name, shape in self.layout.params.items()
        }
        self.receiver = SlotReceiver(manifest, tensors)
        self.loader = BucketLoader(config, self.layout, HostParameters(self.arrays), self.receiver)
        self.loader.accept(manifest)

    def load_all(self, manifest: Manifest) -> None:
        self.loader.begin(manifest.digest, [b"offer"], deadline=0)
        for bucket in reversed(range(manifest.buckets)):  # the order does not matter where slots are mapped
            self.loader.load(bucket, str(bucket).encode(), deadline=0)
        self.loader.finish(deadline=0)
        assert self.receiver.open == 0


def expected_params(config: ModelConfig, layout: RankLayout, tensors: Tensors) -> dict[str, np.ndarray[Any, Any]]:
    """The rank's parameters worked out the slow way, from whole tensors."""
    kind = f"u{BY_NAME[config.dtype].itemsize}"
    params: dict[str, np.ndarray[Any, Any]] = {name: np.zeros(shape, kind) for name, shape in layout.params.items()}
    for name, boxes in layout.slices.items():
        _, shape, data = tensors[name]
        whole = np.frombuffer(data, kind).reshape(shape)
        for box in boxes:
            source = whole[tuple(slice(a, a + n) for a, n in zip(box.offset, box.shape, strict=True))]
            padded = source[(None,) * (len(box.at) - len(box.shape))]
            place = tuple(slice(a, a + n) for a, n in zip(box.at, padded.shape, strict=True))
            params[box.param][place] = padded
    return params


@pytest.mark.parametrize("config", [MOE, TIED], ids=["untied bfloat16", "tied float32"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("slot_bytes", [1 << 12, 1 << 20], ids=["many buckets", "one bucket"])
def test_every_rank_gets_its_slices_and_fingerprints_add_up(config: ModelConfig, tp: int, slot_bytes: int) -> None:
    tensors = random_tensors(config)
    manifest = manifest_of(tensors, slot_bytes=slot_bytes)
    if slot_bytes == 1 << 12 and config is TIED:
        assert manifest.pieces > len(tensors), "some tensor should come in pieces"
    residents, sums = [], []
    for rank in range(tp):
        held = Rank(config, tp, rank, manifest, tensors)
        held.load_all(manifest)
        assert held.receiver.offers == [b"offer"]
        expected = expected_params(config, held.layout, tensors)
        for name, array in held.arrays.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
        residents.append(held.loader.residents(manifest.digest))
        sums.append(held.loader.fingerprints(manifest.digest).tobytes())
    assert Verifier(residents, manifest.tensors).compare(sums, sent(manifest, tensors)) == len(tensors)


@pytest.fixture
def rank() -> tuple[Rank, Manifest]:
    tensors = random_tensors(MOE)
    manifest = manifest_of(tensors, slot_bytes=1 << 12)
    return Rank(MOE, 2, 1, manifest, tensors), manifest


def test_residents_show_the_parameters_and_not_the_slot(rank: tuple[Rank, Manifest]) -> None:
    held, manifest = rank
    held.load_all(manifest)
    before = held.loader.fingerprints(manifest.digest)
    held.arrays["model.layers.1.mlp.experts.w2.weight"][2, 5, 1] ^= 1
    after = held.loader.fingerprints(manifest.digest)
    changed = held.loader.residents(manifest.digest).tensor[before != after]
    assert [manifest.tensors.names[i] for i in changed] == ["model.layers.1.mlp.experts.2.down_proj.weight"]


def test_residents_are_those_of_an_accepted_manifest(rank: tuple[Rank, Manifest]) -> None:
    held, manifest = rank
    assert shown(held, manifest) == set(NAMES)
    some = {name: tensor for name, tensor in random_tensors(MOE, 1).items() if "norm" in name}
    part = manifest_of(some, slot_bytes=1 << 12)
    for ask in (held.loader.residents, held.loader.fingerprints):
        with pytest.raises(LocalProtocolError, match="was not accepted"):
            ask(part.digest)
    held.loader.accept(part)
    assert shown(held, part) == set(some)
    assert shown(held, manifest) == set(NAMES)


def test_order_of_commands(rank: tuple[Rank, Manifest]) -> None:
    held, manifest = rank
    loader = held.loader
    with pytest.raises(LocalProtocolError, match="begin first"):
        loader.load(0, b"0", deadline=0)
    with pytest.raises(LocalProtocolError, match="begin first"):
        loader.finish(deadline=0)
    with pytest.raises(LocalProtocolError, match="was not accepted"):
        loader.begin(b"x" * 16, [], deadline=0)
    loader.begin(manifest.digest, [], deadline=0)
    with pytest.raises(LocalProtocolError, match=f"buckets 0 to {manifest.buckets - 1}"):
        loader.load(manifest.buckets, b"0", deadline=0)
    loader.load(0, b"0", deadline=0)
    with pytest.raises(LocalProtocolError, match="loaded before"):
        loader.load(0, b"0", deadline=0)
    missing = manifest.tensors.names[int(manifest.piece_tensor[manifest.bucket_first[1]])]
    with pytest.raises(LocalProtocolError, match=f"tensor '{missing}' was not loaded"):
        loader.finish(deadline=0)
    loader.begin(manifest.digest, [], deadline=0)  # gives the unfinished update up
    loader.load(0, b"0", deadline=0)


def test_a_bucket_of_another_size_is_refused_and_its_lease_released(rank: tuple[Rank, Manifest]) -> None:
    held, manifest = rank
    other = next(b for b in range(manifest.buckets) if manifest.bucket_nbytes[b] != manifest.bucket_nbytes[0])
    held.loader.begin(manifest.digest, [], deadline=0)
    with pytest.raises(TransportBroken, match="its manifest says"):
        held.loader.load(0, str(other).encode(), deadline=0)
    assert held.receiver.open == 0


def test_old_plans_are_forgotten(rank: tuple[Rank, Manifest]) -> None:
    held, manifest = rank
    tensors = random_tensors(MOE)
    for count in range(1, MANIFESTS_KEPT + 1):
        held.loader.begin(manifest.digest, [], deadline=0)
        held.loader.accept(manifest_of({name: tensors[name] for name in NAMES[:count]}, slot_bytes=1 << 12))
    with pytest.raises(LocalProtocolError, match="was not accepted"):
        held.loader.begin(manifest.digest, [], deadline=0)


def problems(config: ModelConfig, tensors: Tensors, required: tuple[str, ...] = (), **more: Any) -> tuple[str, ...]:
    return admit(config, manifest_of(tensors, slot_bytes=1 << 20, **more), required).problems


def test_a_manifest_that_fits_has_no_problems_and_names_what_it_leaves_alone() -> None:
    tensors = random_tensors(MOE)
    part = {name: tensors[name] for name in NAMES[3:]}
    assert problems(MOE, tensors, required=NAMES) == ()
    assert admit(MOE, manifest_of(part, slot_bytes=1 << 20), ()).untouched == NAMES[:3]


def test_problems_name_the_tensor_and_what_would_be_right() -> None:
    tensors = random_tensors(MOE)
    norm = "model.norm.weight"
    dtype, shape, data = tensors[norm]
    assert problems(MOE, tensors | {norm: (dtype, (6,), data[:12])}) == (
        f"{norm}: shape [6], but this engine's is [12]",
    )
    assert problems(MOE, tensors | {norm: ("float32", shape, data * 2)}) == (
        f"{norm}: dtype float32, but this engine's is bfloat16",
    )
    assert problems(MOE, tensors | {"model.norms.weight": tensors[norm]}) == (
        f"model.norms.weight: this engine has no such tensor; it has {norm}",
    )
    assert problems(MOE, {name: tensors[name] for name in NAMES[1:]}, required=NAMES) == (
        f"{EMBED}: not in this push, but the engine holds no whole version of it; push it too",
    )


def test_a_tied_head_comes_as_an_alias_or_not_at_all() -> None:
    tensors = random_tensors(TIED)
    assert problems(TIED, tensors) == ()
    assert problems(TIED, tensors, aliases=[(HEAD, EMBED)]) == ()
    assert problems(TIED, tensors | {HEAD: tensors[EMBED]}) == (
        f"{HEAD}: this model ties it to {EMBED}; push it as an alias of that",
    )
    untied = random_tensors(MOE)
    del untied[HEAD]
    assert problems(MOE, untied, aliases=[(HEAD, EMBED)]) == (
        f"{HEAD}: pushed as an alias, but this engine holds it apart; push it as a tensor of its own",
    )


def test_a_tied_matrix_pushed_under_the_name_of_the_head_is_loaded_and_shown_under_that_name() -> None:
    tensors = random_tensors(TIED)
    renamed = {HEAD if name == EMBED else name: tensor for name, tensor in tensors.items()}
    manifest = manifest_of(renamed, slot_bytes=1 << 20, aliases=[(EMBED, HEAD)])
    assert admit(TIED, manifest, tuple(tensors)) == ((), ())
    held = Rank(TIED, 2, 0, manifest, renamed)
    held.load_all(manifest)
    np.testing.assert_array_equal(held.arrays[EMBED], expected_params(TIED, held.layout, tensors)[EMBED])
    assert shown(held, manifest) == renamed.keys()
