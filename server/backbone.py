"""Loads the frozen backbone and its tokenizer, once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from adapters_store import backbones
from adapters_store.encoder import Encoder
from adapters_store.manifest import Backbone
from adapters_store.packing import PACKED, no_mask, packed_attention


@dataclass(frozen=True)
class Served:
    """The backbone as it is served."""

    name: str
    folder: Path
    fingerprint: Backbone
    encoder: Encoder
    tokenizer: Any
    default_pooling: str

    @property
    def max_length(self) -> int:
        """Longest row in tokens that both the model and its tokenizer allow."""
        return min(self.encoder.max_length, int(self.tokenizer.model_max_length))

    def tokenize(self, texts: Sequence[str], max_lengths: Sequence[int | None]) -> list[list[int]]:
        """Token ids of each text, cut to its own limit and the backbone's. Thread-safe."""
        limits = [min(limit or self.max_length, self.max_length) for limit in max_lengths]
        rows: list[list[int]] = [[] for _ in texts]
        for limit in set(limits):
            chosen = [i for i, mine in enumerate(limits) if mine == limit]
            ids = self.tokenizer([texts[i] for i in chosen], truncation=True, max_length=limit)["input_ids"]
            for i, row in zip(chosen, ids, strict=True):
                rows[i] = row
        return rows


def load(name: str | None, dtype: str, device: str) -> Served:
    """The backbone of a hub id or folder, or the demo's default. Raises BackboneNotFoundError."""
    transformers_logging.disable_progress_bar()
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, no_mask)
    folder = backbones.locate(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    pad_id = tokenizer.pad_token_id
    encoder = Encoder(model, pad_id=0 if pad_id is None else pad_id)
    is_causal = bool(getattr(model.config, "is_decoder", False)) or not hasattr(tokenizer, "cls_token_id")
    pooling = "last" if is_causal or tokenizer.cls_token_id is None else "mean"
    shown = (name or "all-MiniLM-L6-v2").rstrip("/").rsplit("/", 1)[-1]
    return Served(shown, folder, backbones.fingerprint(folder, dtype), encoder, tokenizer, pooling)
