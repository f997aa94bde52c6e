"""The sides of cotrain_cost.py, each in a process of its own: it takes `run` on stdin and answers with one JSON line.

A run trains every task on one batch after a step that is not counted, and says the CPU seconds of the counted steps.
`ready` comes once texts are read; what no side is charged for (imports, reading, tokenising, loading) lies before it.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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

from training.composing.cotrain import cotrain
from training.suite import joint, relating
from training.suite.heads import Heads
from training.suite.joint import Recipe
from training.suite.modules import Modules, one_hot
from training.suite.workbench import Workbench

BATCH = 8
RANK, ALPHA = 8, 16
PEFT_TARGETS = ["query", "key", "value", "dense"]


@dataclass
class Clock:
    """CPU seconds of this process from the end of the first step to the end of the last. A progress bar to ours."""

    ends: list[float] = field(default_factory=list)

    def advance(self, count: int = 1, note: str = "") -> None:  # noqa: ARG002  # Bar's signature
        """A step is done."""
        self.ends.append(time.process_time())

    def say(self, line: str) -> None:
        """Nothing to show."""

    @property
    def seconds(self) -> float:
        """Of all steps but the first."""
        return self.ends[-1] - self.ends[0]


def recipe(steps: int) -> Recipe:
    """As many steps as asked for on tasks of one batch each."""
    return Recipe(epochs=steps, batch_size=BATCH)


def prior_side(bench: Workbench, steps: int) -> Callable[[], float]:
    """(a) Ours under the prior: every row under its task's learned weights over all modules."""
    relations = relating.estimate(relating.of_data(bench))

    def run() -> float:
        clock = Clock()
        cotrain(bench, relations, recipe(steps + 1), shown=clock)
        return clock.seconds

    return run


def apart_side(bench: Workbench, steps: int) -> Callable[[], float]:
    """(b) Ours apart: the same adapters, one-hot, in the same mixed batch."""
    weights = one_hot(len(bench.tasks), bench.num_layers)

    def run() -> float:
        clock = Clock()
        modules = Modules(bench.tail, len(bench.tasks), bench.setting.seed)
        heads = Heads(bench.tasks, bench.hidden_size, bench.setting.seed)
        joint.train(bench, modules, heads, lambda _: weights, recipe(steps + 1), shown=clock)
        return clock.seconds

    return run


def bare_side(bench: Workbench, steps: int) -> Callable[[], float]:
    """The bound: forward and backward of the mixed batch through the same frozen layers, with heads, no adapters."""
    heads = Heads(bench.tasks, bench.hidden_size, bench.setting.seed)
    none = one_hot(len(bench.tasks), bench.num_layers)[:, :0]

    def run() -> float:
        clock = Clock()
        with _gradients_from(bench):
            joint.train(bench, _Nothing(), heads, lambda _: none, recipe(steps + 1), shown=clock)
        return clock.seconds

    return run


class _Nothing:
    """No modules."""

    def __len__(self) -> int:
        return 0

    def entries(self, k: int) -> list[Any]:
        raise IndexError(k)

    def tensors(self) -> list[Tensor]:
        return []


@contextmanager
def _gradients_from(bench: Workbench) -> Iterator[None]:
    """While inside, gradients flow back to what reaches the tail's first block, as they do under adapters there."""
    stack = next(module for module in bench.tail.encoder.model.modules() if isinstance(module, nn.ModuleList))

    def begin(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001  # torch's signature
        return (args[0].detach().requires_grad_(), *args[1:])

    inner = next(iter(stack[bench.tail.first].children()))  # behind the tail's own hook, which brings what was read
    handle = inner.register_forward_pre_hook(begin)
    try:
        yield
    finally:
        handle.remove()


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


class _Ticks(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002  # Trainer's signature
        self.clock.advance()


def classifier(bench: Workbench, t: int) -> Classifier:
    """PEFT's LoRA on the layers that ours adapts, with a head; adapters in float32, as PEFT makes them."""
    transformers_logging.set_verbosity_error()
    dtype = getattr(torch, bench.setting.dtype)
    model: Any = AutoModel.from_pretrained(bench.backbone.folder, dtype=dtype, add_pooling_layer=False)
    layers = list(range(bench.setting.first_layer, bench.num_layers))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=PEFT_TARGETS,
                        layers_to_transform=layers)  # fmt: skip
    return Classifier(get_peft_model(model, config), bench.hidden_size, len(bench.tasks[t].labels))


def arguments(folder: str, steps: int, *, autocast: bool) -> TrainingArguments:
    """Trainer's own defaults (AdamW, linear schedule, clipping) without evaluation, checkpoints and logs."""
    return TrainingArguments(
        folder, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=2e-3, weight_decay=0.0,
        warmup_steps=0, save_strategy="no", eval_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=True, bf16=autocast, dataloader_pin_memory=False,
    )  # fmt: skip


def peft_side(bench: Workbench, steps: int, *, autocast: bool = False) -> Callable[[], float]:
    """(c) PEFT and Trainer, one task after another. Only whole steps are counted, Trainer's start-up is not."""

    def run() -> float:
        return sum(_train_alone(bench, t, steps, autocast=autocast) for t in range(len(bench.tasks)))

    return run


def _train_alone(bench: Workbench, t: int, steps: int, *, autocast: bool) -> float:
    texts, clock = bench.train[t], Clock()
    examples = [
        {"input_ids": row, "attention_mask": [1] * len(row), "labels": int(target)}
        for row, target in zip(texts.rows, texts.targets, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            classifier(bench, t), arguments(folder, steps + 1, autocast=autocast), train_dataset=examples,
            data_collator=DataCollatorWithPadding(bench.backbone.tokenizer), callbacks=[_Ticks(clock)],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.seconds


SIDES: dict[str, Callable[[Workbench, int], Callable[[], float]]] = {
    "ours, prior": prior_side,
    "ours, apart": apart_side,
    "peft": peft_side,
    "peft, autocast": lambda bench, steps: peft_side(bench, steps, autocast=True),
    "bare": bare_side,
}
