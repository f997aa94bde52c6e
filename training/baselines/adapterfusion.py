"""adapterfusion: attention over what the adapters say, at every site and token, learned per target.

z_k = s_k B_k A_k x,   a = softmax_k((Q y) . (K z_k) / sqrt(m)),   y + V sum_k a_k z_k
Source: Pfeiffer et al. 2021 (arXiv 2005.00247). For adapters at every linear layer instead of one per block it is
lighter: Q and K map to m = 16 dimensions instead of d, y is taken at unit root mean square and z_k relative to the size
of all z at the token, so that attention starts near uniform; V is a diagonal that starts at the identity and is drawn
to it (0.01 ||V - I||^2) as theirs is. Q, K, V and the target's head, from the published one on, train on its N
examples; that head answers, as the method has it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training import seeds
from training.baselines.answering import RECIPE, answered
from training.baselines.learning import learn
from training.baselines.tokenwise import At, Stack, pool, pool_all, stacks
from training.suite.heads import HeadTensors
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result
from training.suite.workbench import Texts, Workbench

WIDTH, LR, DRIFT = 16, 5e-3, 0.01
HEAD_SHARE = 0.1  # of the recipe's learning rate: the head begins trained


@dataclass(frozen=True, eq=False)
class Part:
    """Fusion at one site. Q, K: (m, d_out); V: (d_out,) the diagonal."""

    Q: Tensor
    K: Tensor
    V: Tensor


class Fusion:
    """Attention over adapters at all sites, for one target."""

    def __init__(self, stacked: Sequence[Stack], *names: object) -> None:
        self.parts: Mapping[str, Part] = {stack.site: _part(stack, *names) for stack in stacked}

    def tensors(self) -> list[Tensor]:
        """All that is trained."""
        return [tensor for part in self.parts.values() for tensor in (part.Q, part.K, part.V)]

    def gate(self, at: At) -> Tensor:
        """(n, K) attention. K z_k comes from the ranks: (K B_k) (A_k x), never z_k itself."""
        part, stack = self.parts[at.stack.site], at.stack
        hidden, B = at.hidden.float(), stack.B.float()
        query = _standard(at.y.float()) @ part.Q.mT  # (n, m)
        scores = (query @ (part.K @ B)) * hidden  # (n, R) what each rank brings
        member = torch.zeros(len(stack.owner), stack.count).scatter_(1, stack.owner[:, None], 1.0)
        size = (hidden**2 @ (B**2).sum(dim=0, keepdim=True).mT / stack.count).sqrt()  # (n, 1) about |z_k|
        found: Tensor = (scores @ member / (size.clamp(min=1e-8) * WIDTH**0.5)).softmax(dim=1)
        return found

    def value(self, at: At, summed: Tensor) -> Tensor:
        """(n, d_out) V times the attended sum."""
        return summed * self.parts[at.stack.site].V.to(summed.dtype)

    def drift(self) -> Tensor:
        """How far V is from the identity, weighed."""
        return DRIFT * torch.stack([((part.V - 1) ** 2).sum() for part in self.parts.values()]).sum()


def _part(stack: Stack, *names: object) -> Part:
    generator, d_out = seeds.generator("adapterfusion", *names, stack.site), stack.B.shape[0]
    Q, K = (torch.randn(WIDTH, d_out, generator=generator) / d_out**0.5 for _ in range(2))
    return Part(Q.requires_grad_(), K.requires_grad_(), torch.ones(d_out, requires_grad=True))


def _standard(states: Tensor) -> Tensor:
    return states / states.pow(2).mean(dim=1, keepdim=True).sqrt().clamp(min=1e-8)


@dataclass(frozen=True, eq=False)
class Fused:
    """What a target learned."""

    fusion: Fusion
    head: HeadTensors
    losses: list[float]


def trained(bench: Workbench, head: HeadTensors, stacked: Sequence[Stack], recipe: Recipe) -> Fused:
    """The fusion of the bench's one task."""
    fusion = Fusion(stacked, bench.setting.seed, bench.names[0])
    weight, bias = (tensor.detach().clone().requires_grad_() for tensor in head)

    def pooled(texts: Texts, tasks: Tensor) -> Tensor:  # noqa: ARG001  # one task
        return pool(bench, stacked, texts, fusion.gate, fusion.value)

    groups = [(fusion.tensors(), LR), ([weight, bias], HEAD_SHARE * recipe.head_lr)]
    losses = learn(bench, groups, [(weight, bias)], pooled, recipe, fusion.drift)
    return Fused(fusion, (weight.detach(), bias.detach()), losses)


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:
    """See the module."""
    stacked = stacks(bench, nodes.adapters)
    found = [trained(bench.only([t]), nodes.heads[t], stacked, recipe) for t in range(len(bench.tasks))]

    def pool_split(split: Sequence[Texts]) -> list[Tensor]:
        return [_pooled(bench, stacked, one.fusion, texts) for texts, one in zip(split, found, strict=True)]

    facts = {"losses": [round(one.losses[-1], 5) for one in found]}
    return answered(bench, [one.head for one in found], pool_split, None, facts)


def _pooled(bench: Workbench, stacked: Sequence[Stack], fusion: Fusion, texts: Texts) -> Tensor:
    return pool_all(bench, stacked, texts, lambda _: fusion.gate, fusion.value)
