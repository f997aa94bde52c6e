"""The sides of cotrain_cost.py, each in a process of its own, so that each has a peak of memory of its own.

They take turns step by step: a line on stdin is a turn, the answer is a line of JSON with the seconds it took. What
no side is charged for (imports, reading and tokenising texts, loading models, Trainer's start-up) lies outside turns.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

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

from adapters_store.graph import Knobs
from training.composing.cotrain import KNOBS, Settings, cotrain
from training.memory import keep_freed
from training.step import micro_batches
from training.suite import joint, relating
from training.suite.heads import Heads
from training.suite.joint import USUAL, Recipe
from training.suite.modules import Modules, mixes, one_hot
from training.suite.workbench import Setting, Workbench, prepare

BATCH = 8
RANK, ALPHA = 8, 16
PEFT_TARGETS = {"all-linear": ["query", "key", "value", "dense"], "query,value": ["query", "value"]}


class Turns(Protocol):
    """When a side may go on, and whom it tells what it did: sides take turns step by step."""

    def wait(self) -> bool:
        """Block until it is this side's turn; False if no more is wanted."""

    def tell(self, seconds: float, examples: int) -> None:
        """Seconds that so many examples took."""


def now() -> float:
    """CPU seconds of one thread; where there are several, what counts is the clock."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class StepTurns:
    """A progress bar to training that waits after each step for the next turn. The first step warms up, uncounted."""

    def __init__(self, turns: Turns, examples: int) -> None:
        self._turns, self._examples = turns, examples
        self._began: float | None = None

    def advance(self, count: int = 1, note: str = "") -> None:  # Bar's signature
        """A step is done."""
        if self._began is not None:
            self._turns.tell(now() - self._began, self._examples)
        self._turns.wait()
        self._began = now()

    def say(self, line: str) -> None:
        """Nothing to show."""


def recipe(rounds: int) -> Recipe:
    """A step to warm up and one per round, on tasks of one batch each."""
    return Recipe(epochs=rounds + 1, batch_size=BATCH)


def _bar(bench: Workbench, turns: Turns) -> StepTurns:
    return StepTurns(turns, sum(min(BATCH, len(texts)) for texts in bench.train))


def modules_of(bench: Workbench, sites: str) -> Modules:
    """An adapter per task at these sites."""
    return Modules(
        bench.tail, len(bench.tasks), bench.setting.seed, hyperparameters={"target_modules": sites.split(",")}
    )


def prior_side(bench: Workbench, sites: str, rounds: int, turns: Turns, knobs: Knobs = KNOBS) -> None:
    """(a) Ours under the prior: every row under its task's learned weights over all modules."""
    relations, modules = relating.estimate(relating.of_data(bench)), modules_of(bench, sites)
    cotrain(bench, relations, recipe(rounds), Settings(knobs), shown=_bar(bench, turns), modules=modules)


def narrow_side(bench: Workbench, sites: str, rounds: int, turns: Turns) -> None:
    """(a) under a prior that keeps a task's 8 nearest: a third of the adapters' arithmetic."""
    prior_side(bench, sites, rounds, turns, KNOBS.model_copy(update={"neighbours": 8}))


def apart_side(bench: Workbench, sites: str, rounds: int, turns: Turns) -> None:
    """(b) Ours apart: the same adapters, one-hot, in the same mixed batch."""
    apart = mixes(one_hot(len(bench.tasks), bench.num_layers))
    modules = modules_of(bench, sites)
    heads = Heads(bench.tasks, bench.hidden_size, bench.setting.seed)
    joint.train(bench, modules, heads, lambda _: apart, recipe(rounds), shown=_bar(bench, turns))


def bare_side(bench: Workbench, sites: str, rounds: int, turns: Turns) -> None:  # has none
    """The bound: forward and backward of the mixed batch through the same frozen layers, with heads, no adapters."""
    heads = Heads(bench.tasks, bench.hidden_size, bench.setting.seed)
    none = mixes(one_hot(len(bench.tasks), bench.num_layers)[:, :0])
    with _gradients_from(bench):
        joint.train(bench, _Nothing(), heads, lambda _: none, recipe(rounds), shown=_bar(bench, turns))


@contextmanager
def _gradients_from(bench: Workbench) -> Iterator[None]:
    """While inside, gradients flow back to what reaches the tail's first block, as they do under adapters there."""
    stack = next(module for module in bench.tail.encoder.model.modules() if isinstance(module, nn.ModuleList))

    def begin(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:  # torch's signature
        return (args[0].detach().requires_grad_(), *args[1:])

    inner = next(iter(stack[bench.tail.first].children()))  # behind the tail's own hook, which brings what was read
    handle = inner.register_forward_pre_hook(begin)
    try:
        yield
    finally:
        handle.remove()


def products_side(bench: Workbench, sites: str, rounds: int, turns: Turns) -> None:
    """What (a) cannot be faster than: the matrix products of the linear layers and of all adapters, nothing else."""
    shown, dtype = _bar(bench, turns), getattr(torch, bench.setting.dtype)
    layers, adapted = modules_of(bench, "all-linear").places, modules_of(bench, sites).places
    lengths = [len(row) for texts in bench.train for row in texts.rows]
    batches = micro_batches(bench.tail.encoder, lengths, USUAL.max_tokens)
    forwards = [sum(lengths[i] for i in batch) for batch in batches]
    for _ in range(rounds + 1):
        for tokens in forwards:
            for name, place in layers.items():
                rank = RANK * len(bench.tasks) if name in adapted else 0
                _multiply(*(torch.zeros(tokens, width, dtype=dtype) for width in (place.d_in, place.d_out, rank)))
        shown.advance()


def _multiply(x: Tensor, y: Tensor, h: Tensor) -> None:
    """The products of one layer, forward and backward. x: (n, d_in); y: (n, d_out); h: (n, R) of all adapters."""
    W, A, B = (torch.zeros(rows.shape[1], to.shape[1], dtype=x.dtype) for rows, to in ((y, x), (h, x), (h, y)))
    _ = x @ W.mT, y @ W
    if h.shape[1]:
        _ = x @ A.mT, h @ B, y @ B.mT, h @ A, h.mT @ x, h.mT @ y


class _Nothing:
    """No modules."""

    def __len__(self) -> int:
        return 0

    def entries(self, k: int) -> list[Any]:
        raise IndexError(k)

    def tensors(self) -> list[Tensor]:
        return []


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
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=PEFT_TARGETS[sites],
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


Side = Callable[[Workbench, str, int, Turns], None]
SIDES: dict[str, Side] = {
    "ours, prior": prior_side,
    "ours, 8 neighbours": narrow_side,
    "ours, apart": apart_side,
    "peft": peft_side,
    "peft, autocast": peft_autocast_side,
    "kept memory: peft, autocast": peft_kept_side,
    "bare": bare_side,
    "products of ours, prior": products_side,
}


class _Lines:
    """Turns over stdin and stdout. An empty line is a turn; the end of stdin ends the process."""

    def wait(self) -> bool:
        if not sys.stdin.readline():
            sys.exit(0)
        return True

    def tell(self, seconds: float, examples: int) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "examples": examples, "peak_mb": round(peak)}), flush=True)


def reading_seconds(bench: Workbench) -> float:
    """Seconds per text of what lies below the tail's first block: ours computes it once per text."""
    rows = [row for texts in bench.train for row in texts.rows]
    began = now()
    bench.tail.read(rows, bench.setting.token_budget)
    return (now() - began) / len(rows)


def main() -> None:
    """One side: says what it has read, then takes its turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES, required=True)
    parser.add_argument("--setting", type=json.loads, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--sites", choices=PEFT_TARGETS, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.side.startswith("peft"):
        keep_freed()  # as our commands do
    setting = options.setting | {"data": tuple(map(Path, options.setting["data"]))}
    bench = prepare(Setting(**setting))
    tokens = sum(len(row) for texts in bench.train for row in texts.rows)
    said = {"tasks": len(bench.tasks), "tokens": tokens, "reading_s_per_text": reading_seconds(bench)}
    print(json.dumps(said), flush=True)
    SIDES[options.side](bench, options.sites, options.rounds, _Lines())


if __name__ == "__main__":
    main()
