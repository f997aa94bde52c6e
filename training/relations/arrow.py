"""arrow: whether two adapters answer most strongly to the same direction of their input.

v_i = top right singular vector of DW_i = s_i B_i A_i at a site;   R[i, j] = mean over sites of |v_i . v_j|

DW is never formed: A^T = Q_a R_a and B = Q_b R_b (thin QR), R_b R_a^T = U S V^T is r x r, and v = Q_a V[:, 0].
Every site counts the same. Symmetric, needs no data. The sign of a singular vector means nothing, hence the absolute
value. The same vectors are Arrow's routing prototypes: a token x goes to the adapters of largest |v . x|.
Source: Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs" (arXiv 2405.11157).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.sites import Sites
from training.relations import Matrix
from training.relations.factors import Factors, by_site, mean_over_sites


def similarity(adapters: Sequence[Adapter]) -> Matrix:
    """(K, K) mean over sites of |v_i . v_j|, in [0, 1]; 0 for adapters without a common site."""
    tops = [{k: _numpy(top(factors)) for k, factors in mine.items()} for mine in by_site(adapters).values()]
    return mean_over_sites(len(adapters), tops, alignment)


def alignment(v: Matrix, w: Matrix) -> float:
    """|v . w| of two unit vectors, at most 1."""
    return min(1.0, float(abs(v @ w)))


def prototypes(adapters: Sequence[Adapter], sites: Sites) -> dict[str, Tensor]:
    """Site -> (K, d_in) float64 unit rows v_k, for the low-rank sites of any adapter, in the order of the layers.

    A row is zero where an adapter does nothing.
    """
    found: dict[str, Tensor] = {}
    together = {site: mine for (site, primitive), mine in by_site(adapters).items() if primitive == "lowrank"}
    for site in sorted(together, key=lambda name: (sites.add(name).place.layer, name)):
        found[site] = torch.zeros(len(adapters), sites[site].place.d_in, dtype=torch.float64)
        for k, factors in together[site].items():
            found[site][k] = top(factors)
    return found


def top(factors: Factors) -> Tensor:
    """(d_in,) top right singular vector of B A; zero if B A is."""
    A, B = factors
    Qa, Ra = torch.linalg.qr(A.mT)  # (d_in, r), (r, r)
    _, Rb = torch.linalg.qr(B)
    _, values, Vh = torch.linalg.svd(Rb @ Ra.mT)
    return Qa @ Vh[0] if float(values[0]) > 0 else torch.zeros(A.shape[1], dtype=A.dtype)


def _numpy(vector: Tensor) -> Matrix:
    found: Matrix = vector.numpy().astype(np.float64, copy=False)
    return found
