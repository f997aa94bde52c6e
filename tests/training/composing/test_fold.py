"""A composition folds exactly into one low-rank adapter: A = cat_k A_k, B = cat_k g_k s_k B_k (the method, 5)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adapters_store.mixing import Mix, MixedBatch
from adapters_store.primitives import Entry
from adapters_store.sites import Sites
from tests.strategies import light, lowrank
from tests.tolerances import assert_close

RANKS, LAYERS, FOLDED = (2, 5, 1), 3, 3


class Tiny(nn.Module):
    """Three layers of two linears."""

    def __init__(self):
        super().__init__()
        wide = lambda: nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)})  # noqa: E731
        self.layers = nn.ModuleList([wide() for _ in range(LAYERS)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return x


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = Tiny().requires_grad_(False)
    sites, generator = Sites(model, 8), torch.Generator().manual_seed(1)
    adapters = [
        [lowrank(site.place, generator, rank, scale=0.5 + k) for site in sites.values()] for k, rank in enumerate(RANKS)
    ]
    for k, entries in enumerate(adapters):
        sites.put(k, entries)
    return model, sites, adapters


def fold(adapters, g, sites):
    """One adapter of rank sum r_k over the modules with weight at the site. g: (K, num_layers)."""
    folded = []
    for parts in zip(*adapters, strict=True):
        layer = sites[parts[0].site].place.layer
        kept = [(entry, float(g[k, layer])) for k, entry in enumerate(parts) if g[k, layer]]
        A = torch.cat([entry.tensors["A"] for entry, _ in kept])
        B = torch.cat([w * entry.options["scale"] * entry.tensors["B"] for entry, w in kept], dim=1)
        folded.append(Entry(parts[0].site, "lowrank", {"A": A, "B": B}, {"scale": 1.0}))
    return folded


def run(model, sites, mixes, x):
    batch = MixedBatch.of([(len(rows), mix) for rows, mix in zip(x, mixes, strict=True)], LAYERS)
    with sites.mixing(batch), torch.no_grad():
        return model(torch.cat(x))


weights = st.lists(st.one_of(st.just(0.0), st.floats(0.0, 2.0, width=32)), min_size=9, max_size=9)


@light
@given(weights)
def test_the_fold_is_the_mixture(tiny, drawn):
    model, sites, adapters = tiny
    g = np.array(drawn, np.float32).reshape(3, LAYERS)
    g[0] += 0.1  # every layer has a module
    sites.put(FOLDED, fold(adapters, g, sites))
    x = [torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 5)]
    mixed = run(model, sites, [Mix((0, 1, 2), g), None], x)
    folded = run(model, sites, [Mix((FOLDED,), np.ones((1, LAYERS), np.float32)), None], x)
    sites.drop(FOLDED)
    assert_close(folded, mixed)


def test_averaging_factors_is_not_the_mixture(tiny):
    """What merging A and B apart leaves: cross terms."""
    _, _, adapters = tiny
    one, two = adapters[0][0], lowrank_like(adapters[0][0])
    mixture = 0.5 * (one.tensors["B"] @ one.tensors["A"] + two.tensors["B"] @ two.tensors["A"])
    averaged = (one.tensors["B"] + two.tensors["B"]) / 2 @ ((one.tensors["A"] + two.tensors["A"]) / 2)
    assert (mixture - averaged).abs().max() > 0.1


def lowrank_like(entry):
    generator = torch.Generator().manual_seed(7)
    tensors = {name: torch.randn(t.shape, generator=generator) for name, t in entry.tensors.items()}
    return Entry(entry.site, "lowrank", tensors, entry.options)
