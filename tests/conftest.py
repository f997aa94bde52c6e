"""Shared fixtures: tiny real models from configs, a temporary store. No network, no GPU."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, BertConfig
from transformers.utils import logging as transformers_logging

from adapters_store.packing import PACKED, no_mask, packed_attention

settings.register_profile("espalier", deadline=None, derandomize=True)  # a busy machine is no failure
settings.load_profile("espalier")
transformers_logging.disable_progress_bar()
AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, no_mask)

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other


@pytest.fixture
def two_threads() -> None:
    """For this test; the next one begins with one again."""
    torch.set_num_threads(2)


def tiny_bert(**changes: object) -> nn.Module:
    """A random BERT of 2 layers x 32, without a task head."""
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, **changes,
    )  # fmt: skip
    return AutoModel.from_config(config)


@pytest.fixture
def bert() -> nn.Module:
    return tiny_bert()
