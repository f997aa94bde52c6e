"""Loads the frozen backbone and its tokenizer, once."""

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from adapters_store import backbones
from adapters_store.encoder import Encoder
from adapters_store.errors import UnsupportedError
from adapters_store.language import LanguageModel
from adapters_store.manifest import Backbone, HeadSpec
from adapters_store.packing import PACKED, no_mask, packed_attention


@dataclass(frozen=True)
class Served:
    """The backbone as it is served."""

    name: str
    folder: Path
    fingerprint: Backbone
    encoder: Encoder
    language: LanguageModel | None  # what the encoder is part of, where the backbone generates
    tokenizer: Any  # for the event loop's thread only: a call sets its limits on the object
    default_pooling: str
    bulk: "BulkTokenizer" = field(init=False)
    num_special_tokens: int = field(init=False)  # that the tokenizer adds to a text

    def __post_init__(self) -> None:
        object.__setattr__(self, "bulk", BulkTokenizer(copy.deepcopy(self.tokenizer), threading.Lock()))
        object.__setattr__(self, "num_special_tokens", int(self.tokenizer.num_special_tokens_to_add()))

    @property
    def max_length(self) -> int:
        """Longest row in tokens that both the model and its tokenizer allow."""
        return min(self.encoder.max_length, int(self.tokenizer.model_max_length))

    @property
    def num_embeddings(self) -> int:
        """Token ids that the model can read, from 0 on; its tokenizer may know fewer, or more."""
        model: Any = self.encoder.model
        return int(model.get_input_embeddings().weight.shape[0])

    def check_head(self, head: HeadSpec) -> None:
        """Refuse a head whose texts would be cut to special tokens alone. Raises UnsupportedError."""
        if head.max_length is not None and head.max_length <= self.num_special_tokens:
            least = self.num_special_tokens + 1
            raise UnsupportedError(
                f"the head's max_length is {head.max_length}, of which this backbone's tokenizer takes "
                f"{self.num_special_tokens} for special tokens; give at least {least}, or leave it out"
            )

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a text, as the model and its tokenizer say."""
        said: Any = getattr(self.language and self.language.model, "generation_config", None)
        ends = getattr(said, "eos_token_id", None)
        listed = ends if isinstance(ends, list) else [ends]
        return frozenset(token for token in (*listed, self.tokenizer.eos_token_id) if token is not None)

    def tokenize(self, texts: Sequence[str], max_lengths: Sequence[int | None]) -> list[list[int]]:
        """Token ids of each text, cut to its own limit and the backbone's. For the event loop's thread."""
        return _tokenize(self.tokenizer, texts, self._limits(max_lengths))

    def tokenize_many(self, texts: Sequence[str], max_lengths: Sequence[int | None]) -> list[list[int]]:
        """The same for any other thread; calls take turns."""
        with self.bulk.turn:
            return _tokenize(self.bulk.tokenizer, texts, self._limits(max_lengths))

    def _limits(self, max_lengths: Sequence[int | None]) -> list[int]:
        return [min(limit or self.max_length, self.max_length) for limit in max_lengths]


class BulkTokenizer(NamedTuple):
    """A tokenizer of its own for worker threads: one object would cut one thread's texts to another's limit."""

    tokenizer: Any
    turn: threading.Lock


def _tokenize(tokenizer: Any, texts: Sequence[str], limits: Sequence[int]) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in texts]
    for limit in set(limits):
        chosen = [i for i, mine in enumerate(limits) if mine == limit]
        ids = tokenizer([texts[i] for i in chosen], truncation=True, max_length=limit)["input_ids"]
        for i, row in zip(chosen, ids, strict=True):
            # a tokenizer does not cut at all where its own tokens leave no room for the text
            rows[i] = row[:limit] or [tokenizer.pad_token_id or 0]  # an empty text of a tokenizer that adds nothing
    return rows


def load(name: str | None, dtype: str, device: str, *, generate: bool | None = None) -> Served:
    """The backbone of a hub id or folder, or the demo's default.

    generate: load it as a causal language model; None: if it is one. Raises BackboneNotFoundError, or UnsupportedError
    for a model that should generate and cannot.
    """
    transformers_logging.disable_progress_bar()
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, no_mask)
    folder = backbones.locate(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    is_causal = _is_causal(AutoConfig.from_pretrained(folder))
    if generate and not is_causal:
        raise UnsupportedError(f"{folder.name} is no causal language model: it cannot generate; leave --generate out")
    generates = is_causal and generate is not False
    auto = AutoModelForCausalLM if generates else AutoModel
    model = auto.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    language = LanguageModel(model, pad_id=pad_id) if generates else None
    encoder = language.encoder if language else Encoder(model, pad_id=pad_id)
    (language or encoder).lay_out()
    shown = (name or "all-MiniLM-L6-v2").rstrip("/").rsplit("/", 1)[-1]
    fingerprint = backbones.fingerprint(folder, dtype)
    return Served(shown, folder, fingerprint, encoder, language, tokenizer, "last" if is_causal else "mean")


def _is_causal(config: Any) -> bool:
    """True for decoders such as GPT-2 and Llama, whose last token alone has seen the whole text."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
