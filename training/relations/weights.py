"""weights: how alike two adapters are as maps, layer by layer and as a whole.

low rank:     <DW_i, DW_j>_F = s_i s_j tr((B_i^T B_j)(A_j A_i^T)) = s_i s_j sum_ab (B_i^T B_j)_ab (A_i A_j^T)_ab
bottleneck:   the same for its linear part, up and down in the places of B and A
scale_shift:  inner product of (scale - 1, shift);   norm: of (weight - weight_0, bias - bias_0)
R[i, j] = <i, j> / sqrt(<i, i> <j, j>), inner products summed over sites; DW is never formed

Symmetric, needs no data. It says much only of adapters that were trained from the same initial values: a rank-8 adapter
of a 384-wide layer that starts from its own random A moves in its own 2 % of the directions. Measured on demo_data, 3
epochs: mean cosine within families 0.055 and across 0.004 from a common start (Spearman with measured transfer 0.42),
0.010 and 0.005 from a start of each task's own (0.29).
Source: the clustering of Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs".
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.primitives import Entry
from adapters_store.sites import Sites
from training.relations import Matrix
from training.relations.embedding import from_gram
from training.relations.factors import FACTORS, of_entry


def similarity(adapters: Sequence[Adapter], sites: Sites) -> Matrix:
    """(K, K) cosines of the adapters over all their sites; 0 for adapters without any."""
    grams = grams_by_layer(adapters, sites)
    return from_gram(sum(grams.values(), np.zeros((len(adapters), len(adapters)))))


def similarity_by_layer(adapters: Sequence[Adapter], sites: Sites) -> Matrix:
    """(num_layers, K, K) cosines within each layer; 0 off the diagonal in layers that no adapter touches."""
    grams = grams_by_layer(adapters, sites)
    none = np.zeros((len(adapters), len(adapters)))
    return np.stack([from_gram(grams.get(layer, none)) for layer in range(sites.num_layers)])


def grams_by_layer(adapters: Sequence[Adapter], sites: Sites) -> dict[int, Matrix]:
    """Layer -> (K, K) inner products of the adapters' deltas at the layer's sites."""
    together: dict[tuple[str, str], dict[int, Entry]] = defaultdict(dict)
    for k, adapter in enumerate(adapters):
        for entry in adapter.entries:
            together[entry.site, entry.primitive][k] = entry
    grams: dict[int, Matrix] = defaultdict(lambda: np.zeros((len(adapters), len(adapters))))
    for (site, primitive), entries in together.items():
        layer = sites.add(site).place.layer
        gram = _of_factors(entries) if primitive in FACTORS else _of_vectors(entries, sites)
        ks = np.array(list(entries))
        grams[layer][np.ix_(ks, ks)] += gram
    return dict(grams)


def _of_factors(entries: Mapping[int, Entry]) -> Matrix:
    """(k, k) inner products of low-rank deltas of any ranks, from the Grams of their factors side by side."""
    A, B, owner = [], [], []
    for n, entry in enumerate(entries.values()):
        first, second = of_entry(entry)
        A.append(first)
        B.append(second)
        owner += [n] * first.shape[0]
    ranks = (torch.cat(A) @ torch.cat(A).mT) * (torch.cat(B, dim=1).mT @ torch.cat(B, dim=1))  # (sum r, sum r)
    member = np.eye(len(entries))[owner]  # (sum r, k)
    gram: Matrix = member.T @ ranks.numpy() @ member
    return gram


def _of_vectors(entries: Mapping[int, Entry], sites: Sites) -> Matrix:
    """(k, k) inner products of affine deltas."""
    vectors = torch.stack([_vector(entry, sites) for entry in entries.values()])
    gram: Matrix = (vectors @ vectors.mT).numpy()
    return gram


def _vector(entry: Entry, sites: Sites) -> Tensor:
    """(2 d,) float64: what the entry adds to the identity, or to the norm's own parameters."""
    place = sites[entry.site].place
    if entry.primitive == "scale_shift":
        gain, shift, zero = "scale", "shift", {"scale": torch.ones(place.d_out), "shift": torch.zeros(place.d_out)}
    elif entry.primitive == "norm":
        gain, shift, own = "weight", "bias", dict(place.module.named_parameters(recurse=False))
        zero = {"weight": own["weight"].detach().cpu(), "bias": torch.zeros(place.d_out)}
        zero |= {"bias": own["bias"].detach().cpu()} if "bias" in own else {}
    else:
        raise NotImplementedError(f"our bug: weight similarity knows no primitive {entry.primitive!r}")
    return torch.cat([entry.tensors.get(name, zero[name]).double() - zero[name].double() for name in (gain, shift)])
