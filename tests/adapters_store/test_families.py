"""The encoder gives every family's own hidden states: each row as if it ran alone, unpadded, in the plain model."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    CamembertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

from adapters_store.encoder import Encoder
from adapters_store.errors import NoSiteError, UnknownSiteError
from adapters_store.mixing import Mix
from adapters_store.places import is_linear
from adapters_store.primitives import Entry
from adapters_store.roles import select
from tests import strategies
from tests.tolerances import assert_close

SMALL = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
IDS = {"bos_token_id": 1, "eos_token_id": 2}
DECODER = SMALL | IDS | {"num_key_value_heads": 2, "pad_token_id": 0}
FAMILIES: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SMALL),
    "roberta": RobertaConfig(**SMALL),
    "xlm-r": XLMRobertaConfig(**SMALL),
    "distilbert": DistilBertConfig(
        vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64
    ),
    "electra": ElectraConfig(**SMALL, embedding_size=16),
    "camembert": CamembertConfig(**SMALL),
    "mpnet": MPNetConfig(**SMALL),
    "deberta-v2": DebertaV2Config(**SMALL),
    "deberta-v3": DebertaV2Config(
        **SMALL,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    ),
    "modernbert": ModernBertConfig(
        **SMALL | IDS | {"num_hidden_layers": 4}, pad_token_id=0, cls_token_id=1, sep_token_id=2, local_attention=8
    ),
    "albert": AlbertConfig(**SMALL, embedding_size=16),
    "llama": LlamaConfig(**DECODER),
    "qwen2": Qwen2Config(**DECODER),
    "qwen3": Qwen3Config(**DECODER, head_dim=8),
    "gpt2": GPT2Config(**IDS, vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0),
    "mistral": MistralConfig(**DECODER, sliding_window=20),
    "mistral, window shorter than the probe": MistralConfig(**DECODER, sliding_window=6),
    "gemma2": Gemma2Config(**DECODER, head_dim=8, sliding_window=16, attn_logit_softcapping=2.0),
}
PACKED = ("bert", "roberta", "distilbert", "electra", "llama", "qwen2", "gpt2")
ROWS = [[(7 * i + 3 * n) % 90 + 4 for i in range(length)] for n, length in enumerate((5, 30, 1, 41, 30))]
Both = tuple[nn.Module, Encoder]


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest) -> Both:
    """The plain model and an encoder on a copy of it with one adapter in slot 0 that also changes its norms."""
    torch.manual_seed(0)
    plain = AutoModel.from_config(copy.deepcopy(FAMILIES[request.param])).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a fresh model's norms and biases are ones and zeros and would hide mistakes
        for parameter in plain.parameters():
            parameter += 0.1 * strategies.randn(generator, *parameter.shape)
    encoder = Encoder(copy.deepcopy(plain), pad_id=plain.config.pad_token_id or 0, keeps_reference=True)
    encoder.sites.put(0, _low_rank(encoder))
    return plain, encoder


def _low_rank(encoder: Encoder) -> list[Entry]:
    generator = torch.Generator().manual_seed(1)
    places = [site.place for site in encoder.sites.values() if is_linear(site.place.module)]
    return [strategies.lowrank(place, generator, 3) for place in places]


def _merged(plain: nn.Module, entries: Sequence[Entry]) -> nn.Module:
    """The plain model with the adapter added to its weights: what one adapter alone must give."""
    merged = copy.deepcopy(plain)
    for entry in entries:
        module = merged.get_submodule(entry.site)
        delta = entry.options["scale"] * entry.tensors["B"] @ entry.tensors["A"]
        module.weight.data += delta if isinstance(module, nn.Linear) else delta.mT
    return merged


def _alone(model: nn.Module, row: Sequence[int], pooling: str) -> Tensor:
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([row])).last_hidden_state[0]
    return {"mean": hidden.mean(dim=0), "cls": hidden[0], "last": hidden[-1]}[pooling]


def _pool(encoder: Encoder, mixes: Sequence[Mix | None], poolings: Sequence[str], reference: bool = False) -> Tensor:
    with torch.no_grad():
        return encoder.pool(ROWS, mixes, poolings, reference=reference)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_rows_are_as_alone_in_the_plain_model_with_and_without_a_mix(both: Both, pooling: str) -> None:
    plain, encoder = both
    merged = _merged(plain, _low_rank(encoder))
    one = Mix.one_hot(0, encoder.num_layers)

    found = _pool(encoder, [one, None, one, one, None], [pooling] * 5)

    models = (merged, plain, merged, merged, plain)
    alone = torch.stack([_alone(model, row, pooling) for model, row in zip(models, ROWS, strict=True)])
    assert_close(found, alone, factor=5)
    assert_close(_pool(encoder, [one, None, one, one, None], [pooling] * 5, reference=True), alone, factor=5)


def test_rows_may_pool_differently(both: Both) -> None:
    plain, encoder = both
    poolings = ["last", "mean", "cls", "mean", "cls"]

    found = _pool(encoder, [None] * 5, poolings)

    alone = [_alone(plain, row, pooling) for row, pooling in zip(ROWS, poolings, strict=True)]
    assert_close(found, torch.stack(alone), factor=2)


def test_the_longest_row_runs(both: Both) -> None:
    plain, encoder = both
    row = [(5 * i) % 90 + 4 for i in range(encoder.max_length)]

    with torch.no_grad():
        found = encoder.pool([row, row[:3]], [None, None], ["mean", "mean"])

    assert_close(found[0], _alone(plain, row, "mean"), factor=2)


def test_the_slow_reference_serves_every_site_that_is_offered(both: Both) -> None:
    _, encoder = both
    generator = torch.Generator().manual_seed(2)
    entries = [strategies.scale_shift(site.place, generator, size=0.1) for site in encoder.sites.values()]
    encoder.sites.check(entries)
    encoder.sites.put(1, entries)
    mixes = [Mix.one_hot(1, encoder.num_layers), None, None, Mix.one_hot(0, encoder.num_layers), None]

    found = _pool(encoder, mixes, ["mean"] * 5)

    assert_close(found, _pool(encoder, mixes, ["mean"] * 5, reference=True), factor=5)


@pytest.mark.parametrize("family", PACKED)
def test_common_families_are_packed(family: str) -> None:
    model = AutoModel.from_config(copy.deepcopy(FAMILIES[family]))

    assert Encoder(model, pad_id=model.config.pad_token_id or 0).is_packed


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "mpnet"])
@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
def test_pooler_pooling_is_the_models_pooler_output(family: str, adapted: bool) -> None:
    plain = AutoModel.from_config(copy.deepcopy(FAMILIES[family])).eval()
    encoder = Encoder(copy.deepcopy(plain), pad_id=plain.config.pad_token_id)
    encoder.sites.put(0, _low_rank(encoder))
    model = _merged(plain, _low_rank(encoder)) if adapted else plain
    mix = Mix.one_hot(0, encoder.num_layers) if adapted else None

    found = _pool(encoder, [mix] * 5, ["pooler"] * 5)

    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([row])).pooler_output for row in ROWS])
    assert_close(found, expected, factor=2)


def test_pooler_pooling_without_a_pooler_says_so() -> None:
    encoder = Encoder(AutoModel.from_config(copy.deepcopy(FAMILIES["llama"])))

    with pytest.raises(ValueError, match="has no pooler"):
        _pool(encoder, [None] * 5, ["pooler"] * 5)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3", "layers.0.self_attn.q_norm"),
        ("deberta-v3", "encoder.LayerNorm"),
        ("deberta-v3", "encoder.layer.0.attention.self.query_proj"),
    ],
)
def test_modules_that_do_not_run_once_per_token_are_no_sites(family: str, name: str) -> None:
    encoder = Encoder(AutoModel.from_config(copy.deepcopy(FAMILIES[family])))

    with pytest.raises(UnknownSiteError, match="vectors in a forward of"):
        encoder.sites.check([Entry(name, "scale_shift", {"scale": torch.ones(8)})])


Q, K, V = "attention.self.query", "attention.self.key", "attention.self.value"
ROLES = {
    "bert": {
        "q": [f"encoder.layer.{{}}.{Q}"], "k": [f"encoder.layer.{{}}.{K}"], "v": [f"encoder.layer.{{}}.{V}"],
        "o": ["encoder.layer.{}.attention.output.dense"], "up": ["encoder.layer.{}.intermediate.dense"],
        "down": ["encoder.layer.{}.output.dense"],
    },
    "distilbert": {
        "q": ["transformer.layer.{}.attention.q_lin"], "v": ["transformer.layer.{}.attention.v_lin"],
        "o": ["transformer.layer.{}.attention.out_lin"], "up": ["transformer.layer.{}.ffn.lin1"],
        "down": ["transformer.layer.{}.ffn.lin2"],
    },
    "gpt2": {
        "q": ["h.{}.attn.c_attn"], "k": ["h.{}.attn.c_attn"], "v": ["h.{}.attn.c_attn"], "o": ["h.{}.attn.c_proj"],
        "up": ["h.{}.mlp.c_fc"], "down": ["h.{}.mlp.c_proj"], "norm": ["h.{}.ln_1", "h.{}.ln_2"],
    },
    "llama": {
        "q": ["layers.{}.self_attn.q_proj"], "k": ["layers.{}.self_attn.k_proj"], "o": ["layers.{}.self_attn.o_proj"],
        "gate": ["layers.{}.mlp.gate_proj"], "up": ["layers.{}.mlp.up_proj"], "down": ["layers.{}.mlp.down_proj"],
        "norm": ["layers.{}.input_layernorm", "layers.{}.post_attention_layernorm"],
    },
}  # fmt: skip
ROLES |= {"roberta": ROLES["bert"], "qwen2": ROLES["llama"]}


@pytest.mark.parametrize(("family", "role"), [(family, role) for family in ROLES for role in ROLES[family]])
def test_roles_select_the_right_sites(family: str, role: str) -> None:
    sites = Encoder(AutoModel.from_config(copy.deepcopy(FAMILIES[family]))).sites

    found = set(select(sites, [role]))

    outside = {"norm", "ln_f"}  # the last norm belongs to no layer
    assert found - outside == {name.format(layer) for name in ROLES[family][role] for layer in range(2)}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_all_linear_spares_the_pooler_and_the_norms(family: str) -> None:
    sites = Encoder(AutoModel.from_config(copy.deepcopy(FAMILIES[family]))).sites

    found = select(sites, ["all-linear"])

    assert len(found) == {"bert": 12, "gpt2": 8, "llama": 14}[family]
    assert all(is_linear(sites[name].place.module) and "pooler" not in name for name in found)


def test_a_role_that_the_family_lacks_is_refused() -> None:
    sites = Encoder(AutoModel.from_config(copy.deepcopy(FAMILIES["bert"]))).sites

    with pytest.raises(NoSiteError, match="'gate' matches no site"):
        select(sites, ["q", "gate"])
