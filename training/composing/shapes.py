"""What weights and a training were like, for results: width, redundancy, paths, steadiness.

The formulas are in metrics.py and interference.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from adapters_store.adapter import Adapter
from adapters_store.sites import Sites
from training.composing import interference, metrics
from training.relations import Matrix
from training.relations.weights import grams_by_layer
from training.suite.heads import HeadTensors, logits
from training.suite.joint import History
from training.suite.methods import Nodes, pooled_under
from training.suite.workbench import Texts, Workbench

LEFT_OUT_TEXTS = 32  # of each task


def of_weights(weights: Tensor, adapters: Sequence[Adapter], sites: Sites) -> dict[str, Any]:
    """Means over tasks, at the layers where adapters act. weights: (T, K, num_layers); K = T, module t is task t's."""
    grams = grams_by_layer(adapters, sites)
    layers = sorted(grams)
    acting = weights.double().numpy()[:, :, layers]  # (T, K, layers)
    own = np.stack([metrics.shares(task)[t] for t, task in enumerate(acting)])
    overlaps = [
        interference.overlap(grams[layer], metrics.shares(task)[:, n])
        for task in acting
        for n, layer in enumerate(layers)
    ]
    found = {
        "own_weight": own.mean(),
        "effective_modules": np.mean([metrics.effective_modules(task) for task in acting]),
        "active_slots": np.mean([metrics.active_slots(task, _ranks(adapters, sites, layers)) for task in acting]),
        "overlap": np.mean(overlaps),
        "path_flips": np.mean([metrics.path_flips(task) for task in acting]),
    }
    return {name: round(float(value), 4) for name, value in found.items()}


def _ranks(adapters: Sequence[Adapter], sites: Sites, layers: Sequence[int]) -> np.ndarray:
    """(K, layers) rank slots of low-rank adapters, summed over the sites of a layer."""
    ranks = np.zeros((len(adapters), len(layers)), np.int64)
    for k, adapter in enumerate(adapters):
        for entry in adapter.entries:
            if entry.primitive == "lowrank":
                ranks[k, layers.index(sites[entry.site].place.layer)] += entry.tensors["A"].shape[0]
    return ranks


def of_leaving_out(bench: Workbench, nodes: Nodes, weights: Tensor, heads: Sequence[HeadTensors]) -> dict[str, Any]:
    """Whether weight lies where it helps: what leaving module k out does to the log-likelihood of a few test texts.

    gain_tk = log-likelihood with all - without k, the others scaled up; means over tasks of the share of weight on
    modules with a gain, of precision at 5, and of Spearman's correlation of weights and gains.
    """
    few = [part.take(range(min(LEFT_OUT_TEXTS, len(part)))) for part in bench.test]
    whole = _likelihoods(bench, nodes, weights, heads, few)
    left = np.stack([
        _likelihoods(bench, nodes, _without(weights, k), heads, few) for k in range(weights.shape[1])
    ])  # fmt: skip
    gains, alpha = whole[:, None] - left.T, weights.double().mean(dim=2).numpy()
    agreed = [metrics.rank_agreement(a, g) for a, g in zip(alpha, gains, strict=True)]
    return {
        "useful_share": round(
            float(np.mean([metrics.useful_share(a, g) for a, g in zip(alpha, gains, strict=True)])), 4
        ),
        "precision_at_5": round(
            float(np.mean([metrics.precision_at(a, g, 5) for a, g in zip(alpha, gains, strict=True)])), 4
        ),
        "gain_agreement": round(float(np.mean([value for value in agreed if value is not None] or [0.0])), 4),
    }


def _without(weights: Tensor, k: int) -> Tensor:
    """(T, K, num_layers) module k left out everywhere."""
    return torch.from_numpy(np.stack([metrics.without(task, k) for task in weights.double().numpy()])).float()


def _likelihoods(
    bench: Workbench, nodes: Nodes, weights: Tensor, heads: Sequence[HeadTensors], few: Sequence[Texts]
) -> Matrix:
    """(T,) mean log-likelihood of each task's texts."""
    pooled = pooled_under(bench, nodes, weights, few)
    found = [F.cross_entropy(logits(h, p), part.targets) for h, p, part in zip(heads, pooled, few, strict=True)]
    return -np.array([float(loss) for loss in found])


def of_training(history: History) -> dict[str, Any]:
    """How steady it was."""
    return {
        "loss_spikes": metrics.loss_spikes(history.losses),
        "norm_variation": round(metrics.norm_variation(history.norms), 4),
    }
