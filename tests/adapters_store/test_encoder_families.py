"""The encoder gives, for rows of any lengths side by side, what the model library gives for each row alone."""

import copy
from collections.abc import Iterator

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    BloomConfig,
    DebertaV2Config,
    ErnieConfig,
    Gemma2Config,
    Gemma3TextConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    RoFormerConfig,
)

from adapters_store import linear, linear_layers
from adapters_store.encoder import Encoder
from tests.adapters_store.peft_cases import FAMILIES, GROUPED, SMALL, hidden_of


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny models: on a shared machine torch's threads wait for each other far longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


WINDOWED = {
    "mistral 16": MistralConfig(**GROUPED, sliding_window=16),
    "mistral 6": MistralConfig(**GROUPED, sliding_window=6),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=16),
    "modernbert": ModernBertConfig(
        **SMALL | {"num_hidden_layers": 4}, local_attention=16, cls_token_id=2, sep_token_id=3
    ),
}
OTHERS = {
    "gemma2": Gemma2Config(**GROUPED, sliding_window=16),
    "deberta-v2": DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "mpnet": MPNetConfig(**SMALL),
    "ernie": ErnieConfig(**SMALL),
    "phi3": Phi3Config(**GROUPED),
    "opt": OPTConfig(**SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4),
    "roformer": RoFormerConfig(**SMALL),
    "albert": AlbertConfig(**SMALL, embedding_size=16),
}
ALL: dict[str, PreTrainedConfig] = FAMILIES | WINDOWED | OTHERS
ROWS = [[(7 * i + n) % 90 + 4 for i in range(n)] for n in (30, 5, 41, 30)]


def _both(family: str) -> tuple[torch.nn.Module, Encoder]:
    model = AutoModel.from_config(ALL[family]).eval()
    return model, Encoder(copy.deepcopy(model), pad_id=int(ALL[family].pad_token_id or 0))


@pytest.mark.parametrize("family", ALL)
def test_laid_out_it_gives_the_same_or_is_put_back(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not linear.status().active:
        pytest.skip(linear.status().detail)
    monkeypatch.setattr(linear_layers, "_MIN_WEIGHTS", 1)
    _, encoder = _both(family)
    poolings = ["mean", "cls", "last", "mean" if encoder.pooler is None else "pooler"]
    expected = encoder.pool(ROWS, [None] * 4, poolings)

    encoder.lay_out()

    assert encoder.is_laid_out
    torch.testing.assert_close(encoder.pool(ROWS, [None] * 4, poolings), expected, atol=1e-4, rtol=1e-4)
    encoder.sites.detach()
    assert not any(parameter.is_meta for parameter in encoder.model.parameters())


@pytest.mark.parametrize("family", ALL)
def test_rows_side_by_side_are_as_alone(family: str) -> None:
    model, encoder = _both(family)

    for pooling in ("mean", "cls", "last"):
        with torch.no_grad():
            found = encoder.pool(ROWS, [None] * 4, [pooling] * 4)
        torch.testing.assert_close(found, hidden_of(model, ROWS, pooling), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "albert", "ernie", "mpnet"])
def test_pooler_is_the_models_own(family: str) -> None:
    model, encoder = _both(family)

    with torch.no_grad():
        found = encoder.pool(ROWS, [None] * 4, ["pooler"] * 4)
        expected = torch.cat([model(input_ids=torch.tensor([row])).pooler_output for row in ROWS])

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", WINDOWED)
def test_sliding_windows_are_packed(family: str) -> None:
    assert _both(family)[1].is_packed
