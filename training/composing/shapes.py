"""What weights and a training were like, for results: width, redundancy, paths, steadiness.

The formulas are in metrics.py and interference.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.sites import Sites
from training.composing import interference, metrics
from training.relations.weights import grams_by_layer
from training.suite.joint import History


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


def of_training(history: History) -> dict[str, Any]:
    """How steady it was."""
    return {
        "loss_spikes": metrics.loss_spikes(history.losses),
        "norm_variation": round(metrics.norm_variation(history.norms), 4),
    }
