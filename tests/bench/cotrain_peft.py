"""PEFT's sides of cotrain_cost.py: one task after another through transformers' Trainer, as its users write it."""

import tempfile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from tests.bench.cotrain_turns import ALPHA, BATCH, RANK, Turns, now
from training.suite.workbench import Workbench

TARGETS = {"all-linear": ["query", "key", "value", "dense"], "query,value": ["query", "value"]}


class Classifier(nn.Module):
    """A backbone with mean pooling and a linear head, as users of Trainer write it."""

    def __init__(self, backbone: Any, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(hidden_size, num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss and logits."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        mask = attention_mask[..., None].float()
        logits = self.head((hidden * mask).sum(1) / mask.sum(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class _Clock(TrainerCallback):
    """Seconds from the end of the first step to the end of the last: fetching batches is in, starting up is not."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:  # Trainer's signature
        self.ends.append(now())


def classifier(bench: Workbench, sites: str, t: int) -> Classifier:
    """PEFT's LoRA on the sites that ours adapts, with a head; adapters in float32, as PEFT makes them."""
    transformers_logging.set_verbosity_error()
    dtype = getattr(torch, bench.setting.dtype)
    model: Any = AutoModel.from_pretrained(bench.backbone.folder, dtype=dtype, add_pooling_layer=False)
    layers = list(range(bench.setting.first_layer, bench.num_layers))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS[sites],
                        layers_to_transform=layers)  # fmt: skip
    return Classifier(get_peft_model(model, config), bench.hidden_size, len(bench.tasks[t].labels))


def arguments(folder: str, steps: int, *, autocast: bool) -> TrainingArguments:
    """Trainer's own defaults (AdamW, linear schedule, clipping) without evaluation, checkpoints and logs."""
    return TrainingArguments(
        folder, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=2e-3, weight_decay=0.0,
        warmup_steps=0, save_strategy="no", eval_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=True, bf16=autocast, dataloader_pin_memory=False,
    )  # fmt: skip


def peft_side(bench: Workbench, sites: str, rounds: int, turns: Turns, *, autocast: bool = False) -> None:
    """(c) PEFT and Trainer, one task after another; of each a step to warm up and one that counts."""
    for _ in range(rounds):
        turns.wait()
        # every second task: the same share of long and of short texts as the whole suite
        chosen = range(0, len(bench.tasks), 2)
        seconds = sum(_train_alone(bench, sites, t, autocast=autocast) for t in chosen)
        turns.tell(seconds, sum(min(BATCH, len(bench.train[t])) for t in chosen))
    turns.wait()


def _train_alone(bench: Workbench, sites: str, t: int, *, autocast: bool) -> float:
    texts, clock = bench.train[t], _Clock()
    examples = [
        {"input_ids": row, "attention_mask": [1] * len(row), "labels": int(target)}
        for row, target in zip(texts.rows[:BATCH], texts.targets[:BATCH], strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            classifier(bench, sites, t), arguments(folder, 2, autocast=autocast), train_dataset=examples,
            data_collator=DataCollatorWithPadding(bench.backbone.tokenizer), callbacks=[clock],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.ends[-1] - clock.ends[0]


def peft_autocast_side(bench: Workbench, sites: str, rounds: int, turns: Turns) -> None:
    """(c) with Trainer's bf16=True."""
    peft_side(bench, sites, rounds, turns, autocast=True)


def peft_kept_side(bench: Workbench, sites: str, rounds: int, turns: Turns) -> None:
    """The same with memory kept as our commands keep it, which Trainer's users do not get by themselves."""
    peft_autocast_side(bench, sites, rounds, turns)
