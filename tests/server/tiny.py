"""A tiny but real backbone, store and client for the server's tests."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import BertConfig, BertModel, BertTokenizerFast

from adapters_store.adapter import Adapter
from adapters_store.backbones import fingerprint
from adapters_store.graph import RelationGraph
from adapters_store.manifest import HeadSpec
from adapters_store.primitives import Entry
from adapters_store.primitives.head import Head
from adapters_store.store import AdapterStore

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
    *(f"word{i}" for i in range(80)), "good", "bad", "book", "film", "cheap", "awful", "fine", "##s", "##ly",
]  # fmt: skip
TASKS = ("books", "films", "spam")
HIDDEN, LAYERS = 32, 2


def make_backbone(folder: Path, seed: int = 0) -> Path:
    """A random BERT of 2 layers x 32 with a WordPiece tokenizer, saved as a folder."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    return folder


def lora(seed: int, rank: int = 4, scale: float = 1.0, modules: Sequence[str] = ("query", "value")) -> list[Entry]:
    """Random LoRA entries, strong enough to change answers."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Entry(
            f"encoder.layer.{layer}.attention.self.{module}", "lowrank",
            {"A": torch.randn(rank, HIDDEN, generator=generator), "B": torch.randn(HIDDEN, rank, generator=generator)},
            {"scale": scale},
        )
        for layer in range(LAYERS) for module in modules
    ]  # fmt: skip


def head(seed: int, labels: Sequence[str] = ("negative", "positive")) -> Head:
    """A random linear head."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "weight": torch.randn(len(labels), HIDDEN, generator=generator),
        "bias": torch.randn(len(labels), generator=generator),
    }
    return Head(HeadSpec(labels=tuple(labels), tensors={}), tensors)


def make_adapter(seed: int, labels: Sequence[str] = ("negative", "positive"), **changes: Any) -> Adapter:
    """A LoRA with a head."""
    return Adapter(lora(seed, **changes), head(seed, labels))


def make_store(root: Path, backbone: Path, tasks: Sequence[str] = TASKS) -> AdapterStore:
    """One adapter per task with alias prod, labels of different number, and a graph that relates neighbours."""
    store = AdapterStore(root)
    for index, task in enumerate(tasks):
        labels = [f"{task}-{i}" for i in range(2 + index % 3)]
        adapter = make_adapter(index + 1, labels, rank=2 + index % 5)
        store.publish(
            adapter, name=task, task=task, kind="lora", backbone=fingerprint(backbone, "float32"), alias="prod"
        )
    edges = dict.fromkeys(itertools.pairwise(tasks), 0.5) | {(tasks[-1], tasks[0]): 0.8}
    store.publish_graph(RelationGraph.of(dict.fromkeys(tasks), edges).to_json())
    return store


def peft_files(seed: int, rank: int = 3, alpha: float = 6.0, labels: Sequence[str] = ("no", "yes")) -> dict[str, bytes]:
    """An upload as PEFT writes it, with our optional head."""
    tensors = {
        f"base_model.model.{entry.site}.lora_{name}.weight": tensor
        for entry in lora(seed, rank) for name, tensor in entry.tensors.items()
    }  # fmt: skip
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["query", "value"], "bias": "none"}
    own = head(seed, labels)
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(tensors),
        "head.json": json.dumps({"labels": list(labels)}).encode(),
        "head.safetensors": save(dict(own.tensors)),
    }


def multipart(files: dict[str, bytes]) -> dict[str, tuple[str, bytes]]:
    """Files for httpx: each part is called like its file."""
    return {name: (name, data) for name, data in files.items()}
