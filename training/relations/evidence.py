"""Evidence per layer from adapter weights, so that composition may differ from layer to layer.

E[i, j, l] = cos_l(i, j) - mean over layers of cos(i, j);   E[i, i, l] = 0

cos_l is the weight similarity within layer l (weights.py). Where two adapters agree more than they do on average, the
other one gets more weight; the mean over layers is 0, so the prior's overall weights stay. This evidence is read off,
not learned; the learned one will replace it.
"""

from collections.abc import Mapping, Sequence

from training.relations import Matrix

Evidence = dict[str, dict[str, list[float]]]


def evidence(tasks: Sequence[str], by_layer: Matrix, edges: Mapping[tuple[str, str], float]) -> Evidence:
    """Task -> module -> evidence per layer, for the graph's edges that help, and 0 for each task's own module.

    by_layer: (num_layers, K, K) cosines. Diffusion may bring in modules further off; they have none, which counts as 0.
    """
    deviation = by_layer - by_layer.mean(axis=0)
    index = {task: k for k, task in enumerate(tasks)}
    found: Evidence = {task: {task: [0.0] * len(by_layer)} for task in tasks}
    for (i, j), weight in edges.items():
        if weight > 0 and i != j:
            found[i][j] = [round(float(value), 6) for value in deviation[:, index[i], index[j]]]
    return found
