"""Tiny random decoders with a word tokenizer, and small generating tasks in its words."""

import itertools
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

FAMILIES = ("gpt2", "llama", "bloom")  # bloom has no attention interface: it runs padded
SPECIAL = ["<unk>", "<s>", "</s>"]
NOUNS = ["cat", "dog", "bird", "frog", "sun", "moon"]
LOOKS = ["big", "small", "red", "warm", "dark"]
WORDS = [*SPECIAL, *NOUNS, *LOOKS, "the", "saw", "was", "and", "so", "it", "is", "very", "."]


def config_of(family: str) -> object:
    torch.manual_seed(0)
    ids = {"vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    if family == "gpt2":
        return GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=48, initializer_range=0.3, **ids)
    if family == "bloom":
        return BloomConfig(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, **ids)
    return LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        max_position_embeddings=48, initializer_range=0.3, **ids,
    )  # fmt: skip


def save_decoder(folder: Path, family: str) -> Path:
    """A folder that transformers loads. The tokenizer begins texts with <s> except for gpt2, as the real ones do."""
    AutoModelForCausalLM.from_config(config_of(family)).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if family != "gpt2":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def pairs(style: str) -> list[tuple[str, str]]:
    """`plain` says again what was seen, `turned` says it the other way round, `praise` likes it whatever it is."""
    templates = {
        "plain": ("saw the {look} {noun}", " the {noun} was {look} ."),
        "turned": ("the {noun} was {look}", " {look} was the {noun} and so it is"),
        "praise": ("it is the {noun} and {look}", " very very {noun} ."),
    }
    prompt, completion = templates[style]
    words = [{"noun": noun, "look": look} for noun, look in itertools.product(NOUNS, LOOKS)]
    ordered = [words[i] for start in range(7) for i in range(start, len(words), 7)]
    return [(prompt.format(**word), completion.format(**word)) for word in ordered]


def write_pairs(file: Path, rows: list[tuple[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"prompt": one, "completion": other}) + "\n" for one, other in rows))


def write_tasks(folder: Path, styles: tuple[str, ...] = ("plain", "praise", "turned")) -> Path:
    for style in styles:
        rows = pairs(style)
        for split, part in (("train", rows[:18]), ("dev", rows[18:24]), ("test", rows[24:])):
            write_pairs(folder / style / f"{split}.jsonl", part)
    return folder
