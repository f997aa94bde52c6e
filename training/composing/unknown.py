"""Unknown tasks: every task of a suite left out once and served by the others' adapters.

Its prior row comes from 20 unlabelled examples (or its description) through the graph of the others, pi_u S; its
weights and mass from that row as for any task; its head is trained on 20 labelled examples, starting from the mean of
the others' heads that share its labels. No adapter is trained, and none of the task's own is used.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from training.baselines import adaptersoup, arrow
from training.baselines.tokenwise import Gate, Stack, pool_all, stacks
from training.composing.mass import norm_preserving
from training.composing.pluggable import USUAL, Choices, knobs_of, prior_rows, tied_head, weights_of
from training.relations import Matrix, embedding, unknown, weights
from training.suite import relating
from training.suite.heads import HeadTensors
from training.suite.methods import Nodes, Result, accuracies, pooled_bare, pooled_under, refitted
from training.suite.modules import one_hot
from training.suite.workbench import Texts, Workbench

EXAMPLES = 20
NEIGHBOURS = 6
FREE_L2 = 1e-2
Row = Callable[[int, list[int]], np.ndarray]  # task, the others -> (others,) pi_u


def few(bench: Workbench) -> list[Texts]:
    """The examples of each task that are known when it is unknown."""
    return [texts.take(range(min(EXAMPLES, len(texts)))) for texts in bench.train]


def rows_by_texts(bench: Workbench) -> Row:
    """pi_u from the task's unlabelled examples."""
    known = [pooled.double().numpy() for pooled in pooled_bare(bench, bench.train)]
    return lambda t, others: unknown.row_from_states(known[t][:EXAMPLES], [known[k] for k in others], NEIGHBOURS)


def rows_by_description(bench: Workbench) -> Row:
    """pi_u from the task's description alone, or its name where it has none, against the others' mean texts."""
    said = [task.description or task.name.replace("_", " ") for task in bench.tasks]
    described = unknown.embed(bench.backbone, said)
    means = np.stack([pooled.double().numpy().mean(axis=0) for pooled in pooled_bare(bench, bench.train)])
    return lambda t, others: unknown.row_from_description(
        described[t] - described.mean(axis=0), means[others] - means[others].mean(axis=0), NEIGHBOURS
    )


def composed(bench: Workbench, row: Row, choices: Choices = USUAL) -> Tensor:
    """(T, T) prior rows of every task as if it were unknown: nothing on itself."""
    found = torch.zeros(len(bench.tasks), len(bench.tasks))
    pooled = [part.double().numpy() for part in pooled_bare(bench, bench.train)]
    for t in range(len(bench.tasks)):
        others = [k for k in range(len(bench.tasks)) if k != t]
        S = _prior_of(bench, [pooled[k] for k in others], others, choices)
        found[t, others] = torch.from_numpy(row(t, others)).float() @ S.float()
    return found


def _prior_of(bench: Workbench, pooled: Sequence[Matrix], kept: Sequence[int], choices: Choices) -> Tensor:
    """S of a graph that has these tasks only; pooled: theirs."""
    views = relating.of_texts([bench.tasks[k] for k in kept], lambda: pooled)
    return prior_rows(views.tasks, relating.estimate(views), knobs_of(choices))


def answered(bench: Workbench, nodes: Nodes, rows: Tensor, choices: Choices = USUAL) -> Result:
    """The result of prior rows (T, T): weights, mass, heads from 20 labelled examples, test texts."""
    mixed = weights_of(bench.names, rows, knobs_of(choices), bench.num_layers)
    grams = weights.grams_by_layer(nodes.adapters, bench.tail.encoder.sites)
    final = mixed * norm_preserving(mixed, grams)[:, None]
    heads = _heads(bench, nodes, rows, pooled_under(bench, nodes, final, few(bench)), choices)
    return Result(accuracies(heads, pooled_under(bench, nodes, final, bench.test), bench.test), final)


def _heads(
    bench: Workbench, nodes: Nodes, rows: Tensor, pooled: Sequence[Tensor], choices: Choices
) -> list[HeadTensors]:
    """Of each task: the others' heads for its labels, where they have them, refitted on its 20 examples."""
    blank = [(torch.zeros_like(weight), torch.zeros_like(bias)) for weight, bias in nodes.heads]
    found = []
    for t, part in enumerate(few(bench)):
        known = [head if k != t else blank[t] for k, head in enumerate(nodes.heads)]
        start = tied_head(bench, known, rows[t], t, 0.0)
        near = choices.l2 if start[0].any() else FREE_L2  # nothing to stay near: no other task has these labels
        found.append(refitted(start, pooled[t], part.targets, near))
    return found


def ours(bench: Workbench, nodes: Nodes) -> Result:
    """By 20 unlabelled examples."""
    return answered(bench, nodes, composed(bench, rows_by_texts(bench)))


def ours_described(bench: Workbench, nodes: Nodes) -> Result:
    """By its description."""
    return answered(bench, nodes, composed(bench, rows_by_description(bench)))


def similar_to_few(bench: Workbench) -> Matrix:
    """(T, T) row t: how alike each other task's texts are to the few that are known of task t; -inf for itself."""
    known, whole = (
        [part.double().numpy() for part in pooled_bare(bench, split)] for split in (few(bench), bench.train)
    )
    found = np.stack([embedding.similarity([*whole[:t], known[t], *whole[t + 1 :]])[t] for t in range(len(whole))])
    np.fill_diagonal(found, -np.inf)
    return found


def soup(bench: Workbench, nodes: Nodes) -> Result:
    """AdapterSoup of the 5 nearest others, with a head of its own from 20 examples."""
    similar = similar_to_few(bench)
    rows = adaptersoup.rows(np.where(np.isfinite(similar), similar, -9), 6)
    rows.fill_diagonal_(0)
    return _zero_shot(bench, nodes, (rows / rows.sum(dim=1, keepdim=True))[:, :, None].expand(-1, -1, bench.num_layers))


def nearest(bench: Workbench, nodes: Nodes) -> Result:
    """The most similar other task's adapter, with a head of its own from 20 examples."""
    chosen = torch.from_numpy(similar_to_few(bench).argmax(axis=1))
    return _zero_shot(bench, nodes, one_hot(len(chosen), bench.num_layers)[chosen])


def bare(bench: Workbench, nodes: Nodes) -> Result:
    """No adapter at all, with a head of its own from 20 examples."""
    return _zero_shot(bench, nodes, torch.zeros(len(bench.tasks), len(bench.tasks), bench.num_layers))


def arrows(bench: Workbench, nodes: Nodes) -> Result:
    """Arrow over the other tasks' adapters, with a head of its own from 20 examples."""
    stacked = stacks(bench, nodes.adapters)
    gates = [arrow.gate_of(stacked, without=t) for t in range(len(bench.tasks))]

    def pooled(split: Sequence[Texts]) -> list[Tensor]:
        return [_routed(bench, stacked, texts, gate) for texts, gate in zip(split, gates, strict=True)]

    train, test = pooled(few(bench)), pooled(bench.test)
    return _best_head(bench, nodes, train, test, None)


def _routed(bench: Workbench, stacked: list[Stack], texts: Texts, gate: Gate) -> Tensor:
    return pool_all(bench, stacked, texts, lambda _: gate)


def _zero_shot(bench: Workbench, nodes: Nodes, final: Tensor) -> Result:
    train, test = (pooled_under(bench, nodes, final, split) for split in (few(bench), bench.test))
    return _best_head(bench, nodes, train, test, final)


def _best_head(
    bench: Workbench, nodes: Nodes, train: Sequence[Tensor], test: Sequence[Tensor], final: Tensor | None
) -> Result:
    """With a head from nothing; facts: with our head, which starts from the others' heads for the same labels."""
    blank = [(torch.zeros_like(weight), torch.zeros_like(bias)) for weight, bias in nodes.heads]
    own = [
        refitted(head, pooled, part.targets, FREE_L2)
        for head, pooled, part in zip(blank, train, few(bench), strict=True)
    ]
    alike = torch.ones(len(bench.tasks), len(bench.tasks)).fill_diagonal_(0)
    tied = _heads(bench, nodes, alike, train, USUAL)
    return Result(
        accuracies(own, test, bench.test), final, {"accuracy_with_our_head": accuracies(tied, test, bench.test)}
    )
