"""phatgoose: every adapter learns on its own task a gate that says which tokens it is for.

Training, adapters and heads frozen, task k's tokens through adapter k alone:  y = W x + sigmoid(v_k . x) s_k B_k A_k x
Afterwards, zero-shot:  alpha = softmax of the 2 largest LN(x) . LN(v_k) / sqrt(d_in) per token and site
Source: Muqeeth et al. 2024 (arXiv 2402.05859). LN standardises without affine parts. Theirs trains 100 steps; here two
epochs over the N examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from training.baselines.answering import RECIPE, answered
from training.baselines.arrow import top_softmax
from training.baselines.learning import learn
from training.baselines.tokenwise import At, Gate, Stack, always, pool, stacks
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result
from training.suite.workbench import Texts, Workbench

TOP, EPOCHS, LR = 2, 2, 5e-3

Vectors = Mapping[str, Tensor]  # site -> (K, d_in)


def trained(bench: Workbench, nodes: Nodes, stacked: Sequence[Stack], recipe: Recipe) -> tuple[Vectors, list[float]]:
    """Gate vectors of all adapters at all sites, and the losses."""
    vectors = {stack.site: torch.zeros(stack.count, stack.A.shape[1], requires_grad=True) for stack in stacked}

    def pooled(texts: Texts, tasks: Tensor) -> Tensor:
        return pool(bench, stacked, texts, own_gate(vectors, tasks))

    short = replace(recipe, epochs=min(EPOCHS, recipe.epochs))
    history = learn(bench, [(list(vectors.values()), LR)], nodes.heads, pooled, short)
    return {site: vector.detach() for site, vector in vectors.items()}, history


def own_gate(vectors: Vectors, tasks: Tensor) -> Gate:
    """Of training: sigmoid(v . x) for the adapter of a token's own task, 0 for the others. tasks: (rows,)."""

    def gate(at: At) -> Tensor:
        task = tasks[at.row]
        own = (at.x.float() * vectors[at.stack.site][task]).sum(dim=1, keepdim=True).sigmoid()
        return own * F.one_hot(task, at.stack.count)

    return gate


def router(vectors: Vectors) -> Gate:
    """Of use: see the module."""

    def gate(at: At) -> Tensor:
        width = at.x.shape[1]
        tokens, gates = (F.layer_norm(v.float(), (width,)) for v in (at.x, vectors[at.stack.site]))
        return top_softmax(tokens @ gates.mT / width**0.5, TOP)

    return gate


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:
    """See the module."""
    stacked = stacks(bench, nodes.adapters)
    vectors, history = trained(bench, nodes, stacked, recipe)
    facts = {"top": TOP, "gate_losses": [round(loss, 5) for loss in history]}
    return answered(bench, nodes.heads, always(bench, stacked, router(vectors)), None, facts)
