"""The low-rank factors of adapters, site by site, side by side: what views of weights are computed from."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.primitives import Entry
from training.relations import Matrix

FACTORS = {"lowrank": ("A", "B"), "bottleneck": ("down", "up")}
Factors = tuple[Tensor, Tensor]  # A (r, d_in), B (d_out, r) with the scale in it, float64


def of_entry(entry: Entry) -> Factors:
    """The factors of a low-rank entry; a bottleneck's are those of its linear part."""
    first, second = (entry.tensors[name].detach().double().cpu() for name in FACTORS[entry.primitive])
    return first, second * float(entry.options.get("scale", 1.0))


def by_site(adapters: Sequence[Adapter]) -> dict[tuple[str, str], dict[int, Factors]]:
    """(site, primitive) -> index of the adapter -> its factors there. Entries of other primitives are left out."""
    found: dict[tuple[str, str], dict[int, Factors]] = defaultdict(dict)
    for k, adapter in enumerate(adapters):
        for entry in adapter.entries:
            if entry.primitive in FACTORS:
                found[entry.site, entry.primitive][k] = of_entry(entry)
    return dict(found)


def mean_over_sites(
    size: int, sites: Sequence[Mapping[int, Matrix]], compare: Callable[[Matrix, Matrix], float]
) -> Matrix:
    """(K, K) of a symmetric comparison, averaged over the sites that either of two adapters has; diagonal 1.

    sites: per site the index of each adapter that acts there, with what is compared. Where one has no part, 0 counts.
    """
    total, count = np.zeros((size, size)), np.zeros((size, size))
    for mine in sites:
        there = np.isin(np.arange(size), list(mine))
        count += there[:, None] | there[None, :]
        for i in mine:
            for j in mine:
                if i < j:
                    total[i, j] += compare(mine[i], mine[j])
    mean = np.divide(total + total.T, count, out=np.zeros_like(total), where=count > 0)
    np.fill_diagonal(mean, 1)
    return mean
