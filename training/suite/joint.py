"""Adapters of many tasks trained together, each row under its task's weights over all modules.

loss = sum_t mean cross-entropy of the task's own batch + penalty;   AdamW, linear warm-up and decay

One-hot weights train every task's adapter apart, with the same result as alone but for the clip, which is of all
gradients together, and for the number of steps, which is the largest task's; one column trains a shared adapter;
weights from a graph co-train the modules under it. What the weights are in each step, `weigh` says.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters_store.mixing import Mix
from adapters_store.primitives import Entry
from training import seeds
from training.errors import DivergedError
from training.progress import Bar
from training.step import micro_batches
from training.suite.heads import Heads, logits
from training.suite.modules import resident
from training.suite.workbench import Workbench


class Trained(Protocol):
    """Modules 0 … K - 1: `Modules` in training, or adapters that stay as they are."""

    def __len__(self) -> int: ...

    def entries(self, k: int) -> list[Entry]:
        """What the sites run of module k."""

    def tensors(self) -> list[Tensor]:
        """What is trained of them."""


Weigh = Callable[[int], Sequence[Mix]]  # step -> of each task the mix it runs under
Row = tuple[int, int, int]  # task, text, texts of the task in this step


@dataclass(frozen=True)
class Recipe:
    """How to train. batch_size: texts per task and step; clip: largest gradient norm per task."""

    epochs: int = 5
    batch_size: int = 8
    lr: float = 2e-3
    head_lr: float = 2e-2
    warmup: float = 0.1
    clip: float = 1.0
    max_tokens: int = 6144


USUAL = Recipe()


@dataclass
class History:
    """What training looked like, step by step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Extra:
    """What trains beside modules and heads: tensors with a learning rate, and a penalty on all of it."""

    tensors: Sequence[Tensor] = ()
    lr: float = 2e-2
    penalty: Callable[[], Tensor] | None = None


def train(
    bench: Workbench, modules: Trained, heads: Heads, weigh: Weigh, recipe: Recipe, extra: Extra = Extra(),
    shown: Bar | None = None,
) -> History:  # fmt: skip
    """Train modules, heads and extra tensors in place. Raises DivergedError."""
    groups = [(modules.tensors(), recipe.lr), (heads.tensors(), recipe.head_lr), (list(extra.tensors), extra.lr)]
    trained = [(tensors, lr) for tensors, lr in groups if tensors]
    optimizer = torch.optim.AdamW([{"params": p, "lr": lr, "base_lr": lr} for p, lr in trained], weight_decay=0.0)
    history, total = History(), num_steps(bench, recipe)
    for step in range(total):
        loss = _backward(bench, modules, heads, weigh(step), batch_of(bench, recipe, step), recipe)
        if extra.penalty is not None:
            extra.penalty().backward()  # type: ignore[no-untyped-call]
        if not math.isfinite(loss):
            raise DivergedError(f"the loss became {loss} at step {step + 1}: lower the learning rates")
        history.losses.append(loss)
        history.norms.append(_advance(optimizer, schedule(step, total, recipe.warmup), recipe, len(bench.tasks)))
        if shown:
            shown.advance(note=f"loss {loss:.3f}")
    return history


def num_steps(bench: Workbench, recipe: Recipe) -> int:
    """Steps in which the largest task is seen `epochs` times; smaller ones begin again meanwhile."""
    return math.ceil(max(len(texts) for texts in bench.train) / recipe.batch_size) * recipe.epochs


def schedule(step: int, total: int, warmup: float) -> float:
    """Share of the learning rates: a linear rise, then a linear fall to 0."""
    rise = round(warmup * total)
    return (step + 1) / (rise + 1) if step < rise else (total - step) / max(1, total - rise)


def batch_of(bench: Workbench, recipe: Recipe, step: int) -> list[Row]:
    """A batch of every task; (seed, task, epoch) decide in what order a task goes through its texts.

    Task by task, so that a forward meets few adapters; by length for a backbone that pads.
    """
    rows: list[Row] = []
    for t, texts in enumerate(bench.train):
        per_epoch = math.ceil(len(texts) / recipe.batch_size)
        epoch, start = step // per_epoch, step % per_epoch * recipe.batch_size
        order = seeds.permutation(len(texts), bench.setting.seed, bench.names[t], "epoch", epoch)
        chosen = order[start : start + recipe.batch_size]
        rows += [(t, i, len(chosen)) for i in chosen]
    by_task = bench.tail.encoder.is_packed
    return sorted(rows, key=lambda row: (row[0] if by_task else 0, len(bench.train[row[0]].rows[row[1]]), row[0]))


def _backward(
    bench: Workbench, modules: Trained, heads: Heads, mixed: Sequence[Mix], rows: Sequence[Row], recipe: Recipe
) -> float:
    """Add the gradient of one step; its loss. What all forwards of the step share is freed by the last one."""
    total = 0.0
    lengths = [len(bench.train[t].rows[i]) for t, i, _ in rows]
    batches = list(micro_batches(bench.tail.encoder, lengths, recipe.max_tokens))
    with resident(bench.tail, [modules.entries(k) for k in range(len(modules))]):
        tied = [heads.of(t) for t in range(len(bench.tasks))]
        for n, batch in enumerate(batches):
            chosen = [rows[i] for i in batch]
            pooled = _pool(bench, chosen, mixed)
            losses = [_task_loss(bench, tied[t], pooled, chosen, t) for t in sorted({t for t, _, _ in chosen})]
            loss = torch.stack(losses).sum()
            loss.backward(retain_graph=n + 1 < len(batches))  # type: ignore[no-untyped-call]
            total += float(loss.detach())
    return total / len(bench.tasks)


def _pool(bench: Workbench, rows: Sequence[Row], mixed: Sequence[Mix]) -> Tensor:
    ids = [bench.train[t].rows[i] for t, i, _ in rows]
    states = [bench.train[t].states[i] for t, i, _ in rows]
    return bench.tail.pool(ids, states, [mixed[t] for t, _, _ in rows], bench.backbone.default_pooling)


def _task_loss(bench: Workbench, head: tuple[Tensor, Tensor], pooled: Tensor, rows: Sequence[Row], t: int) -> Tensor:
    """This forward's share of the mean cross-entropy of a task's batch."""
    places = [n for n, (task, _, _) in enumerate(rows) if task == t]
    targets = bench.train[t].targets[[rows[n][1] for n in places]]
    return F.cross_entropy(logits(head, pooled[places]), targets, reduction="sum") / rows[places[0]][2]


def _advance(optimizer: torch.optim.AdamW, share: float, recipe: Recipe, num_tasks: int) -> float:
    """Clip, step, forget the gradient; the gradient's norm before clipping."""
    squares = 0.0
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * share
        norm = torch.nn.utils.clip_grad_norm_(group["params"], recipe.clip * num_tasks**0.5)
        squares += float(norm) ** 2
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(squares**0.5)
