"""Laws of composition on whole backbones: what weights, rows, neighbours and slots may and may not change."""

import copy
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig

from adapters_store.encoder import Encoder
from adapters_store.errors import UnknownSiteError
from adapters_store.mixing import Mix, MixedBatch
from adapters_store.places import is_linear
from adapters_store.primitives import Entry
from adapters_store.sites import Sites, num_filled
from tests import strategies
from tests.strategies import light
from tests.tolerances import assert_close, assert_same_bits

SMALL = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "bert": BertConfig(**SMALL),
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0),
    "gpt2": GPT2Config(
        vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
}
NUM_LAYERS = 3
LENGTHS = (5, 17, 1, 30, 17, 8)
ROWS = [[(7 * i + 3 * n) % 90 + 4 for i in range(length)] for n, length in enumerate(LENGTHS)]


def _checksum(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _adapter(sites: Sites, seed: int, rank: int = 5) -> list[Entry]:
    """Every primitive somewhere, several at the same sites."""
    generator, entries = torch.Generator().manual_seed(seed), []
    for number, (name, site) in enumerate(sites.items()):
        place, turn = site.place, (number + seed) % 4
        if is_linear(place.module) and turn != 0:
            entries.append(strategies.lowrank(place, generator, rank + turn))
        if turn == 1:
            entries.append(strategies.scale_shift(place, generator, size=0.1))
        if is_linear(place.module) and turn == 2:
            source = "xy"[number % 2]
            entries.append(strategies.bottleneck(place, generator, activation="gelu", source=source))
        if not is_linear(place.module):
            entries.append(strategies.norm(sites[name].place, generator, size=0.1))
    return entries


@pytest.fixture(scope="module", params=CONFIGS)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    """A backbone with four adapters of all primitives in the slots 0, 1, 2 and 7; no test may change it."""
    torch.manual_seed(0)
    encoder = Encoder(AutoModel.from_config(copy.deepcopy(CONFIGS[request.param])), keeps_reference=True)
    for slot in (0, 1, 2, 7):
        encoder.sites.put(slot, _adapter(encoder.sites, slot))
    before = _checksum(encoder.model)
    yield encoder
    assert _checksum(encoder.model) == before, "the shared W was changed"


def _mix(**weights: float) -> Mix:
    """_mix(s0=1, s7=-.5): slots and one weight for all layers."""
    return Mix(
        tuple(int(name[1:]) for name in weights),
        np.repeat(np.array(list(weights.values()), np.float32)[:, None], NUM_LAYERS, axis=1),
    )


def _pool(
    encoder: Encoder, mixes: Sequence[Mix | None], rows: Sequence[Sequence[int]] = ROWS, **options: bool
) -> Tensor:
    with torch.no_grad():
        return encoder.pool(rows, mixes, [("mean", "cls", "last")[len(row) % 3] for row in rows], **options)


def _padded(encoder: Encoder) -> Encoder:
    """The same backbone served by padding."""
    other = copy.copy(encoder)
    other.is_packed = False
    other.model.set_attn_implementation("sdpa")
    return other


@light
@given(data=st.data())
def test_batched_is_the_reference_through_the_whole_backbone(encoder: Encoder, data: st.DataObject) -> None:
    slots = np.array([0, 1, 2, 7])
    drawn = [data.draw(strategies.mixes(4, NUM_LAYERS)) for _ in range(3)]
    mixes = [None, *(Mix(tuple(slots[list(mix.slots)].tolist()), mix.weights) for mix in drawn), None, None]
    mixes[4] = mixes[1]

    found, expected = _pool(encoder, mixes), _pool(encoder, mixes, reference=True)

    assert_close(found, expected, factor=10)


@pytest.mark.parametrize(
    "mix",
    [
        Mix((), np.zeros((0, NUM_LAYERS), np.float32)),
        _mix(s0=0.0),
        _mix(s0=0.0, s1=-0.0, s2=0.0, s7=0.0),
        _mix(s5=1.0),
    ],
    ids=["empty", "one zero", "all zero", "a slot that is not resident"],
)
def test_zero_weights_are_the_bare_backbone_bit_for_bit(encoder: Encoder, mix: Mix) -> None:
    bare = _pool(encoder, [None] * 6)

    assert_same_bits(_pool(encoder, [mix] * 6), bare)
    assert_same_bits(_pool(encoder, [mix, None, mix, None, None, mix]), bare)


def test_zero_weights_keep_the_signs_of_zeros() -> None:
    class Negative(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full_like(x, -0.0)

    one = strategies.OneSite.of(lambda: Negative(4, 4))
    one.sites.put(0, [strategies.lowrank(one.place, torch.Generator().manual_seed(0))])

    with torch.no_grad(), one.sites.mixing(MixedBatch.of([(3, _mix(s0=0.0))], 3)):
        found = one.place.module(torch.ones(3, 4))

    assert_same_bits(found, torch.full((3, 4), -0.0))


def test_rows_without_a_mix_keep_their_bits_in_a_mixed_batch(encoder: Encoder) -> None:
    bare = _pool(encoder, [None] * 6)

    mixed = _pool(encoder, [None, _mix(s0=1), None, _mix(s1=0.5, s7=-1), _mix(s2=1), None])

    assert_same_bits(mixed[[0, 2, 5]], bare[[0, 2, 5]])
    assert (mixed[[1, 3, 4]] - bare[[1, 3, 4]]).abs().amax(dim=1).min() > 1e-3


def test_one_hot_is_that_adapter_alone(encoder: Encoder) -> None:
    alone = Encoder(_fresh_backbone(encoder))
    alone.sites.put(0, _adapter(alone.sites, 2))

    assert_same_bits(_pool(encoder, [_mix(s2=1)] * 6), _pool(alone, [_mix(s0=1)] * 6))
    assert_same_bits(_pool(encoder, [_mix(s0=0, s2=1, s7=0)] * 6), _pool(alone, [_mix(s0=1)] * 6))


def _fresh_backbone(encoder: Encoder) -> nn.Module:
    """A plain copy of the encoder's backbone, without sites and with the usual attention."""
    config = copy.deepcopy(encoder.model.config)
    fresh = AutoModel.from_config(config, attn_implementation="sdpa")
    fresh.load_state_dict(encoder.model.state_dict(), strict=False)  # the encoder keeps the pooler elsewhere
    return fresh.eval()


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_a_row_ignores_its_neighbours_their_order_and_their_padding(encoder: Encoder, padded: bool) -> None:
    mixes = [_mix(s0=1), None, _mix(s1=0.5, s7=-1), _mix(s2=0.3, s0=0.2), _mix(s0=1), _mix(s7=2)]
    own = Encoder(_fresh_backbone(encoder))
    for slot in (0, 1, 2, 7):
        own.sites.put(slot, _adapter(own.sites, slot))
    own = _padded(own) if padded else own
    alone = torch.cat([_pool(own, [mix], [row]) for mix, row in zip(mixes, ROWS, strict=True)])
    order = [3, 0, 5, 1, 4, 2]

    together = _pool(own, mixes)
    shuffled = _pool(own, [mixes[i] for i in order], [ROWS[i] for i in order])

    assert_close(together, alone, factor=10)
    assert_close(shuffled, alone[order], factor=10)
    assert_close(_pool(encoder, mixes), alone, factor=10)


def test_order_of_adapters_in_a_mix_does_not_matter(encoder: Encoder) -> None:
    one = _pool(encoder, [_mix(s0=0.5, s1=-1, s7=0.25)] * 6)

    assert_same_bits(_pool(encoder, [_mix(s7=0.25, s0=0.5, s1=-1)] * 6), one)


def test_weights_of_a_layer_act_at_that_layer_only() -> None:
    encoder = Encoder(AutoModel.from_config(copy.deepcopy(CONFIGS["bert"])))
    entries = _adapter(encoder.sites, 1)
    encoder.sites.put(0, entries)
    layer_1 = [entry for entry in entries if encoder.sites[entry.site].place.layer == 1]
    encoder.sites.put(1, layer_1)
    weights = np.array([[0, 0.7, 0]], np.float32)

    found = _pool(encoder, [Mix((0,), weights)] * 6)

    assert_close(found, _pool(encoder, [_mix(s1=0.7)] * 6))


def test_a_mixture_is_linear_at_one_linear_site() -> None:
    one = strategies.OneSite.of(lambda: nn.Linear(20, 30))
    generator = torch.Generator().manual_seed(0)
    for slot in range(3):
        one.sites.put(slot, [strategies.lowrank(one.place, generator, 3 + slot)])
    x = strategies.randn(generator, 25, 20)

    def delta(mix: Mix) -> Tensor:
        with torch.no_grad(), one.sites.mixing(MixedBatch.of([(25, mix)], 3)):
            mixed = one.place.module(x)
        return mixed - one.place.module(x).detach()

    parts = [delta(_mix(**{f"s{slot}": 1.0})) for slot in range(3)]

    assert_close(delta(_mix(s0=0.5, s1=-2, s2=0.1)), 0.5 * parts[0] - 2 * parts[1] + 0.1 * parts[2])


def test_explicit_weights_are_the_dense_merge_of_deltas() -> None:
    backbone = AutoModel.from_config(copy.deepcopy(CONFIGS["bert"]))
    encoder = Encoder(copy.deepcopy(backbone))
    weights, generator, merged = {0: 0.8, 1: -0.5}, torch.Generator().manual_seed(0), copy.deepcopy(backbone)
    for slot, weight in weights.items():
        linears = [site.place for name, site in encoder.sites.items() if "query" in name or "dense" in name]
        entries = [strategies.lowrank(place, generator, 3 + 2 * slot) for place in linears]
        encoder.sites.put(slot, entries)
        for entry in entries:
            product = entry.tensors["B"] @ entry.tensors["A"] * entry.options["scale"]
            merged.get_submodule(entry.site).weight.data += weight * product

    found = _pool(encoder, [_mix(s0=0.8, s1=-0.5)] * 6)

    assert_close(found, _pool(Encoder(merged), [None] * 6), factor=10)


def test_mixes_with_equal_content_are_merged() -> None:
    same = [_mix(s0=0.5, s1=1), _mix(s1=1, s0=0.5), _mix(s0=0.5, s4=0, s1=1)]

    batch = MixedBatch.of([(3, same[0]), (4, None), (5, same[1]), (6, same[2]), (7, _mix(s0=0.5)), (1, _mix(s3=0))], 3)

    assert list(batch.mix_of_row) == [0, -1, 0, 0, 1, -1]
    assert [mix.slots for mix in batch.mixes] == [(0, 1), (0,)]


@pytest.mark.parametrize("family", CONFIGS)
def test_detaching_gives_back_classes_and_outputs(family: str) -> None:
    backbone = AutoModel.from_config(copy.deepcopy(CONFIGS[family])).eval()
    ids, classes = torch.tensor([ROWS[1]]), [type(module) for module in backbone.modules()]
    before, checksum, names = _hidden(backbone, ids), _checksum(backbone), set(backbone.state_dict())
    sites = Sites(backbone, 32)
    sites.put(0, [entry for entry in _adapter(sites, 0) if "pooler" not in entry.site])  # it runs on rows, not tokens
    with sites.mixing(MixedBatch.of([(17, _mix(s0=1))], NUM_LAYERS)):
        mixed = _hidden(backbone, ids)
    assert not torch.equal(mixed, before)
    assert_same_bits(_hidden(backbone, ids), before)

    sites.detach()

    assert [type(module) for module in backbone.modules()] == classes
    assert not any("_espalier_site" in vars(module) for module in backbone.modules())
    assert_same_bits(_hidden(backbone, ids), before)
    assert (_checksum(backbone), set(backbone.state_dict())) == (checksum, names)


def _hidden(backbone: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return backbone(input_ids=ids).last_hidden_state


@pytest.mark.parametrize("empty", [Sites.drop, lambda sites, slot: None], ids=["dropped", "overwritten"])
def test_a_slots_next_tenant_finds_nothing_of_the_last(empty: Callable[[Sites, int], None]) -> None:
    encoder = Encoder(AutoModel.from_config(copy.deepcopy(CONFIGS["bert"])))
    fresh = Encoder(_fresh_backbone(encoder))
    generator = torch.Generator().manual_seed(0)
    small = [strategies.lowrank(encoder.sites["encoder.layer.1.attention.self.query"].place, generator, 2)]
    encoder.sites.put(3, _adapter(encoder.sites, 0, rank=20))
    _pool(encoder, [_mix(s3=1)] * 6)

    empty(encoder.sites, 3)
    encoder.sites.put(3, small)

    fresh.sites.put(3, small)
    assert_same_bits(_pool(encoder, [_mix(s3=1)] * 6), _pool(fresh, [_mix(s3=1)] * 6))


def test_a_dropped_slot_is_the_bare_backbone(encoder: Encoder) -> None:
    filled = num_filled(encoder.sites)
    encoder.sites.put(40, _adapter(encoder.sites, 3))
    _pool(encoder, [_mix(s40=1)] * 6)

    encoder.sites.drop(40)

    assert num_filled(encoder.sites) == filled
    assert_same_bits(_pool(encoder, [_mix(s40=1)] * 6), _pool(encoder, [None] * 6))


def test_evicting_and_reloading_gives_the_same_bits_every_time(encoder: Encoder) -> None:
    entries = _adapter(encoder.sites, 3)
    mixes = [_mix(s40=0.7, s0=0.3), None, _mix(s40=1), _mix(s1=1), None, _mix(s40=1)]
    seen = []

    for _ in range(20):
        encoder.sites.put(40, entries)
        seen.append(_pool(encoder, mixes))
        encoder.sites.drop(40)

    for again in seen[1:]:
        assert_same_bits(again, seen[0])


def test_half_an_adapter_never_stays() -> None:
    encoder = Encoder(AutoModel.from_config(copy.deepcopy(CONFIGS["bert"])))
    entries = _adapter(encoder.sites, 0)

    with pytest.raises(UnknownSiteError):
        encoder.sites.put(0, [*entries, Entry("encoder.layer.9.x", "scale_shift", {"scale": torch.ones(32)})])

    assert num_filled(encoder.sites) == 0


def test_a_block_can_be_a_site(encoder: Encoder) -> None:
    name = {"BertModel": "encoder.layer.1", "LlamaModel": "layers.1", "GPT2Model": "h.1"}[type(encoder.model).__name__]
    entry = Entry(name, "scale_shift", {"shift": torch.linspace(-1, 1, 32)})
    encoder.sites.check([entry])
    encoder.sites.put(41, [entry])

    mixed = _pool(encoder, [_mix(s41=1), None, _mix(s41=1), None, None, None])
    reference = _pool(encoder, [_mix(s41=1), None, _mix(s41=1), None, None, None], reference=True)
    encoder.sites.drop(41)

    assert_close(mixed, reference, factor=10)
    assert (mixed - _pool(encoder, [None] * 6)).abs().amax(dim=1).gt(1e-3).tolist() == [True, False, True] + [False] * 3


@pytest.mark.parametrize("name", ["embeddings", "embeddings.word_embeddings", "encoder", "encoder.layer", "x", ""])
def test_modules_that_do_not_map_vectors_to_vectors_are_no_sites(name: str) -> None:
    encoder = Encoder(AutoModel.from_config(copy.deepcopy(CONFIGS["bert"])))

    with pytest.raises(UnknownSiteError, match="no linear layer, norm or block"):
        encoder.sites.check([Entry(name, "scale_shift", {"scale": torch.ones(32)})])


def test_two_batches_at_once_are_our_bug(encoder: Encoder) -> None:
    batch = MixedBatch.of([(1, None)], NUM_LAYERS)

    with (
        encoder.sites.mixing(batch),
        pytest.raises(AssertionError, match="two batches"),
        encoder.sites.mixing(batch),
    ):
        pass


def test_a_forward_that_fails_leaves_no_batch_behind(encoder: Encoder) -> None:
    bare = _pool(encoder, [None] * 6)

    with pytest.raises(IndexError):
        _pool(encoder, [_mix(s0=1)], [[10**6]])

    assert encoder.sites.batch is None
    assert_same_bits(_pool(encoder, [None] * 6), bare)
