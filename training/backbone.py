"""The frozen backbone with its tokenizer, loaded from a folder, a hub id, or the demo's package."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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

from adapters_store.backbones import BackboneNotFoundError, fingerprint, locate
from adapters_store.encoder import Encoder
from adapters_store.language import LanguageModel
from adapters_store.manifest import Backbone
from adapters_store.packing import PACKED, no_mask, packed_attention
from training.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class LoadedBackbone:
    """A frozen backbone, ready to run mixed batches of texts. language: there if tasks that generate were announced."""

    encoder: Encoder
    tokenizer: Any
    fingerprint: Backbone
    folder: Path
    default_pooling: Literal["mean", "cls", "last", "pooler"]
    language: LanguageModel | None = None

    @property
    def causal(self) -> LanguageModel:
        """The language model around the encoder."""
        if self.language is None:
            raise AssertionError("our bug: a backbone loaded without its language model")
        return self.language

    def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Token ids of each text, special tokens included, cut to max_length and to what the backbone can read."""
        if not texts:
            return []
        limit = min(max_length, self.encoder.max_length)
        rows: list[list[int]] = self.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
        return [row or [self.encoder.pad_id] for row in rows]  # a decoder's tokenizer gives nothing for an empty text


def load(
    name: str | None = None, dtype: str = "float32", device: str = "cpu", *, generates: bool = False
) -> LoadedBackbone:
    """The backbone of this name: a folder, a hub id, or None for the demo's all-MiniLM-L6-v2.

    generates: with its language model; the encoder is the same. Raises BackboneNotFoundError if there is none,
    ConfigError for an encoder that should generate and for a dtype or device that this machine does not have.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    _check_device(device)
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, no_mask)
    transformers_logging.disable_progress_bar()
    folder = locate(name)
    model, tokenizer = _from_folder(folder, dtype, generates)
    pad = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    language = LanguageModel(model.to(device), pad_id=pad) if generates else None
    encoder = language.encoder if language else Encoder(model.to(device), pad_id=pad)
    pooling: Literal["mean", "last"] = "last" if is_causal(model.config) else "mean"
    return LoadedBackbone(encoder, tokenizer, fingerprint(folder, dtype), folder, pooling, language)


def _from_folder(folder: Path, dtype: str, generates: bool) -> tuple[Any, Any]:
    """Model and tokenizer; transformers' own messages about unused weights are kept off the progress bars."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if generates and not is_causal(config):
            raise ConfigError(
                f"{folder} ({config.model_type}) is an encoder and cannot generate; "
                "tasks with completions need a decoder: --backbone"
            )
        kind = AutoModelForCausalLM if generates else AutoModel
        model = kind.from_pretrained(folder, dtype=DTYPES[dtype], local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BackboneNotFoundError(f"{folder} is not a folder that transformers can load: {reason}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    return model, tokenizer


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def is_causal(config: Any) -> bool:
    """True for decoders such as GPT-2 and Llama, whose last token alone has seen the whole text."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
