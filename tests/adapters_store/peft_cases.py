"""Tiny random models with PEFT adapters on them, saved by PEFT, for the tests of the reader."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

from adapters_store.encoder import Encoder

SMALL = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SMALL | {"pad_token_id": 0}),
    "albert": AlbertConfig(**SMALL, embedding_size=16),
    "roberta": RobertaConfig(**SMALL),
    "xlm-roberta": XLMRobertaConfig(**SMALL),
    "camembert": CamembertConfig(**SMALL),
    "electra": ElectraConfig(**SMALL, embedding_size=16),
    "distilbert": DistilBertConfig(
        vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64, num_labels=3
    ),
    "gpt2": GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, num_labels=3, pad_token_id=1, bos_token_id=2,
        eos_token_id=3,
    ),
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED),
}  # fmt: skip
QUERY = {"distilbert": "q_lin", "gpt2": "c_attn"} | dict.fromkeys(["llama", "mistral", "qwen2", "qwen3"], "q_proj")
DOWN = {"distilbert": "lin2", "albert": "ffn_output", "gpt2": "c_proj"} | dict.fromkeys(
    ["llama", "mistral", "qwen2", "qwen3"], "down_proj"
)
HEAD = {"distilbert": ["pre_classifier", "classifier"]}
ROWS = [[5, 17, 60, 9, 44], [7, 8, 12, 90, 33, 21, 4, 65, 11], [80, 13, 6], [50, 51, 52, 53, 54]]


@dataclass
class Saved:
    """A classifier with a PEFT adapter, where PEFT saved the adapter, and a copy of the bare backbone."""

    peft: Any
    folder: Path
    backbone: nn.Module
    family: str

    def encoder(self, *, keeps_reference: bool = False) -> Encoder:
        pad_id = int(FAMILIES[self.family].pad_token_id or 0)
        return Encoder(copy.deepcopy(self.backbone), pad_id=pad_id, keeps_reference=keeps_reference)


def lora(family: str, **changes: Any) -> LoraConfig:
    """A config that targets queries and the last feed-forward layers, with a head to save."""
    targets = [QUERY.get(family, "query"), DOWN.get(family, "output.dense")]
    usual = {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": targets,
        "task_type": "SEQ_CLS",
        "fan_in_fan_out": family == "gpt2",
    }
    return LoraConfig(**usual | {"modules_to_save": HEAD.get(family)} | changes)


def randomise(model: nn.Module) -> None:
    """Give adapters and heads numbers as after training: nothing is zero."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
        elif "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)


def save(family: str, folder: Path, config: LoraConfig | None = None, classifier: nn.Module | None = None) -> Saved:
    """A random classifier of the family with a random adapter that PEFT saved into the folder."""
    model = classifier or AutoModelForSequenceClassification.from_config(FAMILIES[family])
    backbone = copy.deepcopy(getattr(model, model.base_model_prefix))
    peft = get_peft_model(copy.deepcopy(model), config or lora(family))
    randomise(peft)
    peft.eval()
    peft.save_pretrained(folder)
    return Saved(peft, folder, backbone, family)


def load(model: nn.Module, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


@torch.no_grad()
def hidden_of(backbone: nn.Module, rows: Sequence[Sequence[int]], pooling: str) -> Tensor:
    """(rows, d) by the model library's own forward, one row at a time."""
    pooled = []
    for row in rows:
        states = backbone(input_ids=torch.tensor([row])).last_hidden_state[0]
        pooled.append({"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling])
    return torch.stack(pooled)


@torch.no_grad()
def logits_of(classifier: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """(rows, labels), one row at a time."""
    return torch.cat([classifier(input_ids=torch.tensor([row])).logits for row in rows])
