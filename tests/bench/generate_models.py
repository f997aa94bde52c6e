"""What the generation benchmark runs on: random Llamas, requests of random lengths, random LoRA adapters, mixes."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from adapters_store.mixing import Mix
from adapters_store.primitives import Entry

LAYERS, VOCABULARY, RANK, SCALE, ADAPTERS = 8, 8192, 16, 2.0, 32
PROMPT, NEW = (16, 256), (16, 128)  # tokens of a request: uniform, both ends included


@dataclass(frozen=True)
class Request:
    """A prompt, and how many tokens are wanted behind it; nothing ends it earlier."""

    ids: list[int]
    new_tokens: int


def requests_of(count: int, longest_prompt: int = PROMPT[1], most_new: int = NEW[1]) -> list[Request]:
    """Random requests, the same at every call."""
    rng = random.Random(count)
    return [
        Request([rng.randrange(1, VOCABULARY) for _ in range(rng.randint(PROMPT[0], longest_prompt))],
                rng.randint(NEW[0], most_new))
        for _ in range(count)
    ]  # fmt: skip


def llama(hidden: int, dtype: str) -> Any:
    """A random LlamaForCausalLM of 8 layers, heads of 64, two query heads to a key head; embeddings untied.

    Tied ones would make a random model repeat its last token, and hide any error of attention.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, vocab_size=VOCABULARY,
        max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


Factors = dict[str, tuple[Tensor, Tensor]]  # linear layer of the backbone -> A (r, d_in), B (d_out, r)


def adapters_of(model: Any) -> list[Factors]:
    """32 random LoRA adapters of rank 16 on all linear layers of the backbone, rounded to the model's dtype."""
    generator = torch.Generator().manual_seed(0)
    return [_factors(model, generator) for _ in range(ADAPTERS)]


def _factors(model: Any, generator: torch.Generator) -> Factors:
    found = {}
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear):
            A = torch.randn(RANK, module.in_features, generator=generator) / module.in_features**0.5
            B = torch.randn(module.out_features, RANK, generator=generator) * 0.02
            found[name] = (A.to(model.dtype), B.to(model.dtype))
    return found


def entries_of(factors: Factors) -> list[Entry]:
    """The adapter as our sites take it."""
    return [Entry(name, "lowrank", {"A": A, "B": B}, {"scale": SCALE}) for name, (A, B) in factors.items()]


def alone(index: int) -> Mix:
    """The adapter of a request's index by itself, at weight 1."""
    return Mix.one_hot(index % ADAPTERS, LAYERS)


def compositions(count: int, top_k: int) -> Sequence[Mix]:
    """So many different compositions: k adapters each, and weights of their own at each layer.

    top_k 1: a weight between 0.5 and 1 at each layer, so that no two compositions are equal; else they sum to 1.
    """
    rng = np.random.default_rng(count)
    mixes = []
    for index in range(count):
        slots = tuple((index + i * 9) % ADAPTERS for i in range(top_k))
        weights = rng.dirichlet(np.ones(top_k), LAYERS).T if top_k > 1 else rng.uniform(0.5, 1, (1, LAYERS))
        mixes.append(Mix(slots, weights.astype(np.float32)))
    return mixes
