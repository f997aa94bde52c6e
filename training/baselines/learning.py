"""A short training of whatever steers frozen adapters under frozen or fresh heads: gates, routers, attention.

loss = sum over tasks of the mean cross-entropy of the task's batch + penalty;   AdamW, rates falling linearly to 0
The batches are those in which adapters train together (suite/joint.py).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from training.errors import DivergedError
from training.step import micro_batches
from training.suite.heads import HeadTensors, logits
from training.suite.joint import Recipe, Row, batch_of, num_steps, schedule
from training.suite.workbench import Texts, Workbench

Pooled = Callable[[Texts, Tensor], Tensor]  # texts of any tasks, (n,) the task of each -> (n, d)
Group = tuple[Sequence[Tensor], float]  # tensors and their learning rate


def learn(
    bench: Workbench, groups: Sequence[Group], heads: Sequence[HeadTensors], pooled: Pooled, recipe: Recipe,
    penalty: Callable[[], Tensor] | None = None,
) -> list[float]:  # fmt: skip
    """Train the tensors in place; the loss of every step. Raises DivergedError."""
    optimizer = torch.optim.AdamW(
        [{"params": list(tensors), "lr": lr, "base_lr": lr} for tensors, lr in groups], weight_decay=0.0
    )
    history, total = [], num_steps(bench, recipe)
    for step in range(total):
        loss = _backward(bench, heads, pooled, batch_of(bench, recipe, step), recipe)
        if penalty is not None:
            penalty().backward()  # type: ignore[no-untyped-call]
        if not math.isfinite(loss):
            raise DivergedError(f"the loss became {loss} at step {step + 1}: lower the learning rates")
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * schedule(step, total, recipe.warmup)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append(loss / len(bench.tasks))
    return history


def _backward(
    bench: Workbench, heads: Sequence[HeadTensors], pooled: Pooled, rows: Sequence[Row], recipe: Recipe
) -> float:
    """Add the gradient of one step; its loss."""
    lengths, total = [len(bench.train[t].rows[i]) for t, i, _ in rows], 0.0
    for batch in micro_batches(bench.tail.encoder, lengths, recipe.max_tokens):
        chosen = [rows[n] for n in batch]
        tasks = torch.tensor([t for t, _, _ in chosen])
        states = pooled(gather(bench, chosen), tasks)
        loss = sum(_share(bench, heads[t], states, chosen, t) for t in sorted(set(tasks.tolist())))
        if not isinstance(loss, Tensor):
            raise AssertionError("our bug: a batch without rows")
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def _share(bench: Workbench, head: HeadTensors, states: Tensor, rows: Sequence[Row], t: int) -> Tensor:
    """This forward's part of the mean cross-entropy of a task's batch."""
    places = [n for n, (task, _, _) in enumerate(rows) if task == t]
    targets = bench.train[t].targets[[rows[n][1] for n in places]]
    return F.cross_entropy(logits(head, states[places]), targets, reduction="sum") / rows[places[0]][2]


def gather(bench: Workbench, rows: Sequence[Row]) -> Texts:
    """Training texts of several tasks side by side; their targets are of different label sets."""
    ids = [bench.train[t].rows[i] for t, i, _ in rows]
    targets = torch.stack([bench.train[t].targets[i] for t, i, _ in rows])
    return Texts(ids, targets, [bench.train[t].states[i] for t, i, _ in rows])
