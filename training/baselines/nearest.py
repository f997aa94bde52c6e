"""nearest: the adapter of the other task whose texts look most alike, under the target's own head.

k*(t) = argmax over k != t of cos(m_t - c, m_k - c): m are means of frozen pooled states, c their mean. Retrieval of one
adapter by text embedding, as in AdapterSoup with l = 1 (Chronopoulou et al. 2023, arXiv 2302.07027).
"""

import numpy as np
import torch

from training.baselines.answering import RECIPE, answered, layered, under
from training.relations import Matrix, embedding
from training.suite.joint import Recipe
from training.suite.methods import Nodes, Result, pooled_bare
from training.suite.workbench import Workbench


def similarity(bench: Workbench) -> Matrix:
    """(T, T) centred cosines of the tasks' mean frozen embeddings."""
    return embedding.similarity([pooled.double().numpy() for pooled in pooled_bare(bench, bench.train)])


def run(bench: Workbench, nodes: Nodes, recipe: Recipe = RECIPE) -> Result:  # noqa: ARG001  # one signature for all
    """See the module."""
    others = similarity(bench)
    np.fill_diagonal(others, -np.inf)
    chosen = torch.from_numpy(others.argmax(axis=1))
    weights = layered(torch.eye(len(chosen))[chosen], bench.num_layers)
    facts = {"nearest": [bench.names[k] for k in chosen.tolist()]}
    return answered(bench, nodes.heads, under(bench, nodes, weights), weights, facts)
