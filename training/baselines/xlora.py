"""xlora: a small network reads a text once without adapters and says how much of each adapter every layer gets.

h = pooled state of the bare backbone, standardised;   scalings (layer, K) = softmax_k(MLP(h)),  MLP d -> 64 -> layers K
y = W x + sum_k scalings[layer, k] s_k B_k A_k x in a second pass
Source: X-LoRA, Buehler & Buehler 2024 (arXiv 2402.07148); PEFT's xlora. Lighter in one thing: scalings are per text
where theirs are per token. The network is trained on the N examples of all tasks at once, adapters and heads frozen;
its last layer starts at zero, which is uniform.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import seeds
from training.baselines.answering import RECIPE, answered
from training.baselines.learning import learn
from training.baselines.tokenwise import At, Gate, Stack, pool, pool_all, stacks
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result, pooled_bare
from training.suite.workbench import Texts, Workbench

WIDTH, LR = 64, 5e-3


class Scaler(nn.Module):
    """(n, d) pooled states -> (n, num_layers, K) scalings, summing to 1 over the adapters."""

    def __init__(self, bench: Workbench, count: int) -> None:
        super().__init__()
        self.shape = (bench.num_layers, count)
        generator = seeds.generator(bench.setting.seed, "xlora")
        first = torch.randn(WIDTH, bench.hidden_size, generator=generator) / bench.hidden_size**0.5
        self.first, self.bias = nn.Parameter(first), nn.Parameter(torch.zeros(WIDTH))
        self.last = nn.Parameter(torch.zeros(bench.num_layers * count, WIDTH))
        self.out = nn.Parameter(torch.zeros(bench.num_layers * count))

    def forward(self, pooled: Tensor) -> Tensor:
        """See the class."""
        inner = F.relu(F.linear(F.layer_norm(pooled, pooled.shape[1:]), self.first, self.bias))
        return F.linear(inner, self.last, self.out).view(-1, *self.shape).softmax(dim=2)


def by_row(scalings: Tensor) -> Gate:
    """Each token gets its text's scalings (rows, num_layers, K) at the site's layer."""

    def gate(at: At) -> Tensor:
        found: Tensor = scalings[at.row, at.stack.layer]
        return found

    return gate


def trained(bench: Workbench, nodes: Nodes, stacked: Sequence[Stack], recipe: Recipe) -> tuple[Scaler, list[float]]:
    """The network and its losses."""
    scaler, bare = Scaler(bench, len(nodes.adapters)), _first_pass(bench)

    def pooled(texts: Texts, tasks: Tensor) -> Tensor:  # noqa: ARG001  # one network for all tasks
        return pool(bench, stacked, texts, by_row(scaler(torch.stack([bare[id(row)] for row in texts.rows]))))

    return scaler, learn(bench, [(list(scaler.parameters()), LR)], nodes.heads, pooled, recipe)


def _first_pass(bench: Workbench) -> dict[int, Tensor]:
    """Pooled states of the bare backbone by identity of a training text's row: they never change."""
    found = zip(bench.train, pooled_bare(bench, bench.train), strict=True)
    return {id(row): state for part, states in found for row, state in zip(part.rows, states, strict=True)}


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:
    """See the module."""
    stacked = stacks(bench, nodes.adapters)
    scaler, history = trained(bench, nodes, stacked, recipe)

    def pool_split(split: Sequence[Texts]) -> list[Tensor]:
        return [_pooled(bench, stacked, scaler, texts) for texts in split]

    return answered(bench, nodes.heads, pool_split, None, {"losses": [round(loss, 5) for loss in history]})


@torch.no_grad()
def _pooled(bench: Workbench, stacked: Sequence[Stack], scaler: Scaler, texts: Texts) -> Tensor:
    scalings = scaler(bench.pooled(texts, None))
    return pool_all(bench, stacked, texts, lambda chosen: by_row(scalings[chosen]))
