"""Every family generates what transformers' generate does, token for token, together with others; or is refused."""

import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from adapters_store import linear, linear_layers
from adapters_store.errors import UnsupportedError
from adapters_store.language import LanguageModel
from server.generation import native_attention
from server.generation.batcher import Batcher
from server.generation.decoder import Decoder
from tests.server.generation.decoding import decoder_of, finish, output, sequence
from tests.server.generation.families import FAMILIES, MASKED, PACKED, causal, greedy


def prompts(seed: int, count: int = 8) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 96) for _ in range(rng.randrange(1, 45))] for _ in range(count)]


@cache
def language(family: str) -> LanguageModel:
    return LanguageModel(causal(family))


@cache
def expected(family: str) -> list[list[int]]:
    model = causal(family)
    return [greedy(model, prompt, 6 + 3 * i) for i, prompt in enumerate(prompts(0))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("step_tokens", "pages"), [(512, 4096), (24, 7)], ids=["roomy", "tight"])
def test_together_they_are_what_generate_gives_each_alone(family: str, step_tokens: int, pages: int) -> None:
    batcher = Batcher(decoder_of(language(family), pages), step_tokens=step_tokens, max_sequences=6)
    sequences = [sequence(prompt, 6 + 3 * i) for i, prompt in enumerate(prompts(0))]
    late = sequences[4:]
    for one in sequences[:4]:
        batcher.add(one)

    finish(batcher, lambda step: [batcher.add(one) for one in late] if step == 3 else None)

    assert [output(one) for one in sequences] == expected(family)
    assert len({token for row in expected(family) for token in row}) > 10, "the model does not repeat itself"
    assert batcher.pool.num_held == 0
    assert (batcher.counters.preemptions > 0) == (pages == 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_laid_out_for_the_cpu_a_family_still_does(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not linear.status().active:
        pytest.skip(linear.status().detail)
    monkeypatch.setattr(linear_layers, "_MIN_WEIGHTS", 1)
    language = LanguageModel(causal(family))
    assert language.lay_out()
    batcher = Batcher(decoder_of(language), step_tokens=64, max_sequences=6)
    sequences = [sequence(prompt, 6 + 3 * i) for i, prompt in enumerate(prompts(0))]
    for one in sequences:
        batcher.add(one)

    finish(batcher)

    assert [output(one) for one in sequences] == expected(family)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4} | LLAMA3}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("gemma2", {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 16}),
    ("gemma3_text", {"sliding_window": 8, "num_hidden_layers": 3}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5}),
    ("falcon", {"alibi": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_other_members_of_a_family_are_right_too(family: str, changes: dict[str, Any]) -> None:
    batcher = Batcher(decoder_of(LanguageModel(causal(family, **changes))), step_tokens=40, max_sequences=6)
    sequences = [sequence(prompt, 6 + 3 * i) for i, prompt in enumerate(prompts(0))]
    for one in sequences:
        batcher.add(one)

    finish(batcher)

    model = causal(family, **changes)
    assert [output(one) for one in sequences] == [greedy(model, p, 6 + 3 * i) for i, p in enumerate(prompts(0))]


@pytest.mark.parametrize("family", PACKED)
def test_long_prompts_in_chunks_are_what_generate_gives_too(family: str) -> None:
    model = causal(family, max_position_embeddings=512)  # GPT-2 has another name for it, and knows this one too
    rng = random.Random(5)
    long = [[rng.randrange(3, 96) for _ in range(length)] for length in (150, 301, 64)]
    batcher = Batcher(decoder_of(LanguageModel(model)), step_tokens=90, max_sequences=3)
    sequences = [sequence(prompt, 9) for prompt in long]
    for one in sequences:
        batcher.add(one)

    finish(batcher)

    fresh = causal(family, max_position_embeddings=512)
    assert [output(one) for one in sequences] == [greedy(fresh, prompt, 9) for prompt in long]


@pytest.mark.parametrize("is_native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_begin_alike_share_what_their_own_step_computes(
    family: str, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_native:
        monkeypatch.setattr(native_attention, "supports", lambda *_: False)
    [long] = prompts(4, 1)
    alike = [[*long, *range(3, 45 - len(long) + 3)][:length] for length in (45, 45, 33, 20)]
    batcher = Batcher(decoder_of(language(family)), step_tokens=512)
    sequences = [sequence(prompt, 6, salt=b"s" * 32) for prompt in alike]
    for one in sequences:
        batcher.add(one)
    batcher.step()

    assert batcher.counters.tokens == 45 + 13 + 1 + 4, "pages of 16 tokens are the first one's"
    finish(batcher)
    model = causal(family)
    assert [output(one) for one in sequences] == [greedy(model, prompt, 6) for prompt in alike]


@pytest.mark.parametrize("family", FAMILIES)
def test_which_way_a_family_goes(family: str) -> None:
    assert Decoder(language(family), kv_bytes=2**20).is_packed == (family in PACKED)


@pytest.mark.parametrize("family", MASKED)
@pytest.mark.parametrize("has_window", [True, False])
def test_windows_that_only_masks_know_are_kept(family: str, has_window: bool) -> None:
    changes: dict[str, Any] = {} if has_window else {"use_sliding_window": False, "sliding_window": None}
    decoder = decoder_of(LanguageModel(causal(family, **changes)))
    batcher = Batcher(decoder)
    [one] = [sequence([3 + (37 * i + i * i) % 90 for i in range(90)], 10)]
    batcher.add(one)

    finish(batcher)

    assert output(one) == greedy(causal(family, **changes), one.ids[:90], 10)
    assert decoder.is_packed == (not has_window)


def test_a_family_with_another_state_is_refused_by_name() -> None:
    config = AutoConfig.for_model("mamba", vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = LanguageModel(AutoModelForCausalLM.from_config(config))

    with pytest.raises(UnsupportedError, match="MambaForCausalLM"):
        Decoder(model, kv_bytes=2**20)


def test_a_model_whose_logits_are_made_in_another_way_is_refused_by_name() -> None:
    class Shifted(nn.Module):
        def __init__(self, own: nn.Linear) -> None:
            super().__init__()
            self.own, self.weight = own, own.weight

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.own(hidden)

    model = causal("llama")
    model.get_output_embeddings = lambda: Shifted(nn.Linear(32, 97))

    with pytest.raises(UnsupportedError, match="LlamaForCausalLM"):
        LanguageModel(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_bfloat16_decodes_as_its_own_plain_forward(family: str) -> None:
    model = LanguageModel(causal(family).to(torch.bfloat16))
    batcher = Batcher(decoder_of(model, 64), step_tokens=32)
    one = sequence(prompts(3, 1)[0], 20)
    batcher.add(one)

    finish(batcher)

    with torch.no_grad():
        logits = model.logits(model.encoder.states([one.ids], [None])[0])
    best = logits.max(dim=-1).values
    chosen = [float(best[at - 1] - logits[at - 1, one.ids[at]]) for at in range(one.num_prompt, len(one.ids))]
    assert max(chosen) < 0.1 * float(logits.abs().max()), "each token is the best, or as good as rounding can tell"
