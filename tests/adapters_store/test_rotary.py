"""The kernel turns queries and keys as model libraries do, bit for bit; what it does not know stays with them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaModel
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen3 import modeling_qwen3

from adapters_store import rotary
from tests.strategies import light, randn
from tests.tolerances import assert_same_bits
from tests.without_kernel import said, without_kernel

HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C compiler")
DTYPES = (torch.float32, torch.bfloat16)
own = modeling_llama.apply_rotary_pos_emb
Given = tuple[Tensor, Tensor, Tensor, Tensor]


def given_to(heads: int, tokens: int, d: int, dtype: torch.dtype, seed: int = 0) -> Given:
    """Queries and keys as projections leave them, cosines and sines as rotary layers make them."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (randn(generator, 1, tokens, n, d).to(dtype).transpose(1, 2) for n in (2 * heads, heads))
    angles = 100 * torch.rand(1, tokens, d // 2, generator=generator).repeat(1, 1, 2)
    return q, k, angles.cos().to(dtype), angles.sin().to(dtype)


def assert_turned_alike(given: Given) -> None:
    for found, expected in zip(rotary.rotate(*given), own(*given), strict=True):
        assert_same_bits(found, expected)


@needs_compiler
@light
@given(st.integers(1, 4), st.integers(1, 70), st.integers(1, 70), st.sampled_from(DTYPES), st.integers(0, 99))
def test_it_is_the_rotation_of_model_libraries(
    heads: int, tokens: int, half: int, dtype: torch.dtype, seed: int
) -> None:
    assert_turned_alike(given_to(heads, tokens, 2 * half, dtype, seed))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_and_keys_may_be_slices_of_one_projection(dtype: torch.dtype) -> None:
    _, _, cos, sin = given_to(1, 9, 16, dtype)
    q, k, _v = torch.randn(1, 9, 8, 16).to(dtype).split([4, 2, 2], dim=2)

    for found, expected in zip(
        rotary.rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin),
        own(q.transpose(1, 2), k.transpose(1, 2), cos, sin),
        strict=True,
    ):
        assert_same_bits(found, expected)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(two_threads: None, dtype: torch.dtype) -> None:
    assert_turned_alike(given_to(3, 300, 64, dtype))


@needs_compiler
def test_it_serves_functions_that_turn_the_same_and_no_others() -> None:
    assert rotary.status().active, rotary.status().detail
    for same in (modeling_llama, modeling_qwen3, modeling_phi3, modeling_gemma2, modeling_gpt_neox):
        assert rotary.serves(same.apply_rotary_pos_emb)
    assert not rotary.serves(modeling_cohere.apply_rotary_pos_emb)  # turns neighbouring elements


@pytest.fixture
def llama() -> LlamaModel:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaModel(config).eval()


@needs_compiler
def test_a_model_gives_the_same_bits_through_it_and_others_of_its_class_stay(
    llama: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, calls = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]), []
    kernel = rotary.rotate
    monkeypatch.setattr(rotary, "rotate", lambda *given: calls.append(given) or kernel(*given))  # type: ignore[func-returns-value]
    with torch.no_grad():
        expected = llama(ids).last_hidden_state
        assert rotary.install(llama) == 2
        calls.clear()
        found = llama(ids).last_hidden_state

    assert len(calls) == 2
    assert_same_bits(found, expected)
    assert rotary.install(llama) == 0  # as the code now calls the kernel already
    other = LlamaModel(llama.config)
    assert type(other.layers[0].self_attn) is modeling_llama.LlamaAttention
    assert modeling_llama.apply_rotary_pos_emb is own


@needs_compiler
def test_gradients_stay_torchs(llama: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rotary.install(llama)
    monkeypatch.setattr(rotary, "rotate", lambda *_: pytest.fail("the kernel knows no gradients"))

    llama(torch.tensor([[3, 1, 4]])).last_hidden_state.sum().backward()

    assert llama.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, cos, sin: (q.double(), k.double(), cos.double(), sin.double()),
        lambda q, k, cos, sin: (q.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1), cos, sin),
        lambda q, k, cos, sin: (q, k, cos.float(), sin.float()),
        lambda q, k, cos, sin: (q.mT.contiguous().mT, k, cos, sin),
    ],
    ids=["float64", "two rows", "wider angles", "elements apart"],
)
def test_what_it_does_not_know_the_librarys_function_turns(
    change: Callable[..., Given], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotary, "rotate", lambda *_: pytest.fail("not the kernel's"))
    changed = change(*given_to(2, 7, 16, torch.bfloat16))

    for found, expected in zip(rotary._or_kernel(own)(*changed), own(*changed), strict=True):
        assert_same_bits(found, expected)


@without_kernel
def test_without_a_kernel_no_layer_is_changed(tmp_path: Path, changes: dict[str, str], reason: str) -> None:
    script = """
import json
from transformers.models.llama import modeling_llama
from adapters_store import rotary

print(json.dumps([rotary.serves(modeling_llama.apply_rotary_pos_emb), rotary.status().detail]))
"""
    serves, detail = said(script, tmp_path, changes)

    assert not serves
    assert reason in detail
