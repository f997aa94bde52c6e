"""Tiny random causal models of many families, with weights large enough that attention decides what comes next."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

_USUAL = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 128, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
_PLAIN = {key: value for key, value in _USUAL.items() if key not in ("num_key_value_heads", "head_dim")}

PACKED: dict[str, dict[str, Any]] = {
    "llama": _USUAL,
    "mistral": _USUAL | {"sliding_window": 12},
    "qwen2": _USUAL,
    "qwen3": _USUAL,
    "phi3": _USUAL,
    "gemma": _USUAL,
    "gemma2": _USUAL
    | {
        "sliding_window": 12, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": _USUAL | {"sliding_window": 12},
    "gpt2": _GPT,
    "opt": {key: value for key, value in _PLAIN.items() if key != "intermediate_size"}
    | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": _PLAIN,
}  # fmt: skip
PADDED: dict[str, dict[str, Any]] = {
    "gptj": _GPT | {"rotary_dim": 4},
    "bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": _PLAIN | {"new_decoder_architecture": False},
}
FAMILIES = PACKED | PADDED
_EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32}  # fmt: skip
MASKED: dict[str, dict[str, Any]] = {  # their windows are in their masks; attention is not told
    "qwen2_moe": _USUAL | _EXPERTS | {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2},
    "phimoe": _USUAL | _EXPERTS | {"sliding_window": 40},
}


def causal(family: str, seed: int = 1, **changes: Any) -> nn.Module:
    """A random model; input and output embeddings are apart, or models would only repeat their last token."""
    config = AutoConfig.for_model(family, **((FAMILIES | MASKED)[family] | {"tie_word_embeddings": False} | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """What transformers' generate continues a prompt with."""
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=count,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return ids[0, len(prompt) :].tolist()
