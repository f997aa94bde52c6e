"""One training step over several tasks in one mixed batch: gradients of each task as if it trained alone.

loss = sum over tasks of the mean cross-entropy over the targets of that task's own batch. Rows never see their
neighbours and no two tasks share a parameter, so the gradient of a task is the same in whatever company it trains.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapters_store.encoder import Encoder
from adapters_store.mixing import Mix
from training.objectives import Answers, Asked, Score, Texts
from training.trainable import TrainableAdapter

Place = tuple[int, int]  # a row: which of the tasks that are asked, which of its texts


@dataclass(frozen=True, eq=False)
class Part:
    """One task's share of a mixed batch."""

    slot: int
    adapter: TrainableAdapter
    texts: Texts


def put(encoder: Encoder, parts: Sequence[Part], *, frozen: bool = False) -> list[Asked]:
    """Export every part's entries once and make them resident in their slots; what is to be asked of each part."""
    asked = []
    for part in parts:
        entries = part.adapter.frozen_entries() if frozen else part.adapter.entries()
        if entries:
            encoder.sites.put(part.slot, entries)
        mix = Mix.one_hot(part.slot, encoder.num_layers) if entries else None
        asked.append(Asked(part.adapter.objective, part.texts, mix))
    return asked


def drop(encoder: Encoder, parts: Sequence[Part]) -> None:
    """Empty the parts' slots."""
    for part in parts:
        encoder.sites.drop(part.slot)


def micro_batches(encoder: Encoder, lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices of neighbouring rows, in order, whose tokens (padding included) fit the budget; at least one row each."""
    chosen: list[int] = []
    for i, length in enumerate(lengths):
        if chosen and encoder.tokens_run([*(lengths[j] for j in chosen), length]) > token_budget:
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen


def _forwards(
    encoder: Encoder, asked: Sequence[Asked], places: Sequence[Place], token_budget: int
) -> Iterator[list[Place]]:
    """The rows, in order, in as many forwards as the budget needs; tasks of one objective share forwards."""
    for objective in dict.fromkeys(type(one.objective) for one in asked):
        mine = [(a, i) for a, i in places if type(asked[a].objective) is objective]
        for batch in micro_batches(encoder, [len(asked[a].texts.rows[i]) for a, i in mine], token_budget):
            yield [mine[n] for n in batch]


def _answers(encoder: Encoder, asked: Sequence[Asked], batch: Sequence[Place]) -> dict[int, tuple[list[int], Answers]]:
    """One forward: of each task in it the rows that ran, and their answers."""
    rows: dict[int, list[int]] = {}
    for a, i in batch:
        rows.setdefault(a, []).append(i)
    parts = [replace(asked[a], texts=asked[a].texts.take(mine)) for a, mine in rows.items()]
    found = parts[0].objective.read(encoder, parts)
    answers = [part.objective.answers(one, part.texts) for part, one in zip(parts, found, strict=True)]
    return {a: (mine, answer) for (a, mine), answer in zip(rows.items(), answers, strict=True)}


def backward(encoder: Encoder, parts: Sequence[Part], token_budget: int) -> list[float]:
    """Add every task's gradient to its parameters; the mean cross-entropy of each part, in order.

    Rows go in task by task: a forward with few adapters computes few ranks that are not its rows' own.
    """
    asked = put(encoder, parts)
    targets = [sum(part.adapter.objective.counts(part.texts)) for part in parts]
    places = [(p, i) for p, part in enumerate(parts) for i in range(len(part.texts))]
    batches = list(_forwards(encoder, asked, places, token_budget))
    losses = torch.zeros(len(parts), device=encoder.device)
    for n, batch in enumerate(batches):
        answers = _answers(encoder, asked, batch)
        shares = {p: answer.losses.sum() / targets[p] for p, (_, answer) in answers.items()}
        # what exporting and put computed is shared by all forwards: only the last may free it
        _backward(shares, losses, retain_graph=n + 1 < len(batches))
    drop(encoder, parts)
    return [float(loss) for loss in losses.tolist()]


def _backward(shares: Mapping[int, Tensor], losses: Tensor, *, retain_graph: bool) -> None:
    torch.stack(list(shares.values())).sum().backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
    for p, share in shares.items():
        losses[p] += share.detach()


@torch.no_grad()
def ask(encoder: Encoder, asked: Sequence[Asked], token_budget: int) -> list[Answers]:
    """Answers on any number of texts, in their order, on the CPU in float64; rows run by length, for speed."""
    lengths = [[len(row) for row in one.texts.rows] for one in asked]
    places = sorted(((a, i) for a, of in enumerate(lengths) for i in range(len(of))), key=lambda p: lengths[p[0]][p[1]])
    empty = [torch.zeros(len(of), dtype=torch.float64) for of in lengths]
    found = [Answers(one.clone(), one.clone()) for one in empty]
    for batch in _forwards(encoder, asked, places, token_budget):
        for a, (rows, answers) in _answers(encoder, asked, batch).items():
            found[a].losses[rows] = answers.losses.cpu().double()
            found[a].right[rows] = answers.right.cpu().double()
    return found


def score(encoder: Encoder, parts: Sequence[Part], token_budget: int) -> list[Score]:
    """Of every part on its own texts, through the sites as they serve."""
    asked = put(encoder, parts, frozen=True)
    answers = ask(encoder, asked, token_budget)
    drop(encoder, parts)
    return [score_of(one, answer) for one, answer in zip(asked, answers, strict=True)]


def score_of(asked: Asked, answers: Answers) -> Score:
    """Means over all targets."""
    count = sum(asked.objective.counts(asked.texts))
    return Score(float(answers.right.sum()) / count, float(answers.losses.sum()) / count)


@torch.no_grad()
def pool(
    encoder: Encoder, rows: Sequence[Sequence[int]], pooling: str, token_budget: int, mix: Mix | None = None
) -> Tensor:
    """(rows, hidden_size) pooled hidden states of any number of rows under a mix, or the bare backbone's.

    Rows run by length, for speed.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    pooled = torch.empty(len(rows), encoder.hidden_size, device=encoder.device)
    for batch in micro_batches(encoder, [len(rows[i]) for i in order], token_budget):
        chosen = [order[n] for n in batch]
        found = encoder.pool([rows[i] for i in chosen], [mix] * len(chosen), [pooling] * len(chosen))
        pooled[torch.tensor(chosen, device=encoder.device)] = found
    return pooled
