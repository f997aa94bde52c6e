"""One training step over several tasks in one mixed batch: gradients of each task as if it trained alone.

loss = sum over tasks of the mean cross-entropy over that task's own batch. Rows never see their neighbours and no two
tasks share a parameter, so the gradient of a task is the same in whatever company it trains.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters_store.encoder import Encoder
from adapters_store.mixing import Mix
from training.trainable import TrainableAdapter


@dataclass(frozen=True)
class Texts:
    """A split made ready to run. rows: token ids; targets: index of each row's label.

    pooled: (rows, hidden_size) the bare backbone's pooled hidden states, computed once where only a head is trained.
    """

    rows: Sequence[Sequence[int]]
    targets: Sequence[int]
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> "Texts":
        """The texts at these places."""
        pooled = None if self.pooled is None else self.pooled[torch.tensor(indices, device=self.pooled.device)]
        return Texts([self.rows[i] for i in indices], [self.targets[i] for i in indices], pooled)


@dataclass(frozen=True, eq=False)
class Part:
    """One task's share of a mixed batch."""

    slot: int
    adapter: TrainableAdapter
    texts: Texts


def put(encoder: Encoder, parts: Sequence[Part], *, frozen: bool = False) -> list[Mix | None]:
    """Export every part's entries once and make them resident in their slots; the mix of each part."""
    mixes: list[Mix | None] = []
    for part in parts:
        entries = part.adapter.frozen_entries() if frozen else part.adapter.entries()
        if entries:
            encoder.sites.put(part.slot, entries)
        mixes.append(Mix.one_hot(part.slot, encoder.num_layers) if entries else None)
    return mixes


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


def backward(encoder: Encoder, parts: Sequence[Part], token_budget: int) -> list[float]:
    """Add every task's gradient to its parameters; the mean cross-entropy of each part, in order.

    Rows go in task by task: a forward with few adapters computes few ranks that are not its rows' own.
    """
    mixes = put(encoder, parts)
    rows = [(p, i) for p, part in enumerate(parts) if part.texts.pooled is None for i in range(len(part.texts))]
    batches = list(micro_batches(encoder, [len(parts[p].texts.rows[i]) for p, i in rows], token_budget))
    losses = torch.zeros(len(parts), device=encoder.device)
    for n, batch in enumerate(batches):
        found = _losses(encoder, parts, mixes, [rows[r] for r in batch])
        # what exporting and put computed is shared by all micro-batches: only the last may free it
        _backward(found, losses, retain_graph=n + 1 < len(batches))
    ready = {p: part for p, part in enumerate(parts) if part.texts.pooled is not None}
    if ready:
        _backward({p: _loss(part, part.texts.pooled, part.texts.targets) for p, part in ready.items()}, losses)
    drop(encoder, parts)
    return [float(loss) for loss in losses.tolist()]


def _backward(found: Mapping[int, Tensor], losses: Tensor, *, retain_graph: bool = False) -> None:
    torch.stack(list(found.values())).sum().backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
    for p, loss in found.items():
        losses[p] += loss.detach()


def _losses(
    encoder: Encoder, parts: Sequence[Part], mixes: Sequence[Mix | None], rows: Sequence[tuple[int, int]]
) -> dict[int, Tensor]:
    """Each part's share of its mean cross-entropy that these rows contribute."""
    poolings = [parts[p].adapter.choice.pooling for p, _ in rows]
    pooled = encoder.pool([parts[p].texts.rows[i] for p, i in rows], [mixes[p] for p, _ in rows], poolings)
    shares = {}
    for p in dict.fromkeys(p for p, _ in rows):
        mine = [n for n, (q, _) in enumerate(rows) if q == p]
        shares[p] = _loss(parts[p], pooled[mine], [parts[p].texts.targets[rows[n][1]] for n in mine])
    return shares


def _loss(part: Part, pooled: Tensor | None, targets: Sequence[int]) -> Tensor:
    """Sum of these rows' cross-entropies over the size of the whole part."""
    if pooled is None:
        raise AssertionError("our bug: a part without hidden states")
    wanted = torch.tensor(targets, device=pooled.device)
    return F.cross_entropy(part.adapter.logits(pooled), wanted, reduction="sum") / len(part.texts)


@dataclass(frozen=True)
class Score:
    """How a task does on a split. accuracy: share of right answers; loss: mean cross-entropy."""

    accuracy: float
    loss: float


@torch.no_grad()
def score(encoder: Encoder, parts: Sequence[Part], token_budget: int) -> list[Score]:
    """Of every part on its own texts, through the sites as they serve."""
    running = [part for part in parts if part.texts.pooled is None]
    mixes = put(encoder, running, frozen=True)
    rows = [row for part in running for row in part.texts.rows]
    of_row = [p for p, part in enumerate(running) for _ in part.texts.rows]
    poolings = [running[p].adapter.choice.pooling for p in of_row]
    pooled = pool(encoder, rows, [mixes[p] for p in of_row], poolings, token_budget)
    drop(encoder, running)
    pieces = iter(torch.split(pooled, [len(part.texts) for part in running]))
    return [_score(part, next(pieces) if part.texts.pooled is None else part.texts.pooled) for part in parts]


def _score(part: Part, pooled: Tensor) -> Score:
    logits = part.adapter.logits(pooled)
    targets = torch.tensor(part.texts.targets, device=logits.device)
    right = (logits.argmax(dim=-1) == targets).double().mean()
    return Score(float(right), float(F.cross_entropy(logits, targets)))


@torch.no_grad()
def pool(
    encoder: Encoder,
    rows: Sequence[Sequence[int]],
    mixes: Sequence[Mix | None],
    poolings: Sequence[str],
    token_budget: int,
) -> Tensor:
    """(rows, hidden_size) pooled hidden states of any number of rows, without gradients, by length for speed."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    pooled = torch.empty(len(rows), encoder.hidden_size, device=encoder.device)
    for batch in micro_batches(encoder, [len(rows[i]) for i in order], token_budget):
        chosen = [order[n] for n in batch]
        found = encoder.pool([rows[i] for i in chosen], [mixes[i] for i in chosen], [poolings[i] for i in chosen])
        pooled[torch.tensor(chosen, device=encoder.device)] = found
    return pooled
