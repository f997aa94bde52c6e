"""Our sides of cotrain_cost.py: the mixed batch under the prior and apart, and what bounds it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapters_store.graph import Knobs
from tests.bench.cotrain_turns import BATCH, RANK, StepTurns, Turns
from training.composing.cotrain import KNOBS, Settings, cotrain
from training.step import micro_batches
from training.suite import joint, relating
from training.suite.heads import Heads
from training.suite.joint import USUAL, Recipe
from training.suite.modules import Modules, mixes, one_hot
from training.suite.workbench import Workbench


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
