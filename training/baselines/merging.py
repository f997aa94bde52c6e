"""Updates merged as dense matrices, site by site, into one adapter that serves all tasks.

A merged DW has no low rank any more. It is served exactly as one lowrank entry of full rank: A = identity, B = DW where
the site's input is the narrower side, A = DW, B = identity where its output is. lambda is the weight of its mix.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.primitives import Entry
from training.baselines.answering import Pool, alike, answered, choose, under
from training.suite.methods import Nodes, Result
from training.suite.workbench import Workbench

Merge = Callable[[Tensor, str], Tensor]  # updates (K, d_out, d_in), site -> (d_out, d_in)


def updates(adapters: Sequence[Adapter], site: str) -> Tensor:
    """(K, d_out, d_in) float32 DW_k = s_k B_k A_k of all adapters at a site; zero for those without one there."""
    found = [
        [_dense(e) for e in adapter.entries if e.site == site and e.primitive == "lowrank"] for adapter in adapters
    ]
    like = next(parts[0] for parts in found if parts)
    return torch.stack([torch.stack(parts).sum(dim=0) if parts else torch.zeros_like(like) for parts in found])


def _dense(entry: Entry) -> Tensor:
    return float(entry.options.get("scale", 1.0)) * entry.tensors["B"].float() @ entry.tensors["A"].float()


def sites_of(adapters: Sequence[Adapter]) -> list[str]:
    """Sites where any of the adapters has a low-rank update, in order."""
    return list(dict.fromkeys(e.site for adapter in adapters for e in adapter.entries if e.primitive == "lowrank"))


def as_entry(site: str, update: Tensor) -> Entry:
    """The lowrank entry that adds update x exactly. update: (d_out, d_in)."""
    d_out, d_in = update.shape
    wide_input = d_in > d_out
    A, B = (update, torch.eye(d_out)) if wide_input else (torch.eye(d_in), update)
    return Entry(site, "lowrank", {"A": A.contiguous(), "B": B.contiguous()})


def merged(nodes: Nodes, merge: Merge) -> Nodes:
    """One adapter out of all, with the tasks' heads."""
    entries = [as_entry(site, merge(updates(nodes.adapters, site), site)) for site in sites_of(nodes.adapters)]
    return Nodes([Adapter(entries)], nodes.heads)


def best_merge(
    bench: Workbench, nodes: Nodes, merges: dict[Any, Merge], lambdas: Sequence[float], facts: dict[str, Any]
) -> Result:
    """The merge and lambda with the least training loss, answered. Merges are made anew where used, one at a time."""

    def pool(key: tuple[Any, ...]) -> Pool:
        weights = alike(torch.tensor([key[-1]]), len(bench.tasks), bench.num_layers)
        return lambda split: under(bench, _made(nodes, merges, key[:-1], made), weights)(split)

    made: dict[Any, Nodes] = {}
    keys = [(*name, value) for name in merges for value in lambdas]
    best, found = choose(bench, nodes, {key: pool(key) for key in keys})
    return answered(bench, nodes.heads, pool(best), None, facts | found)


def _made(nodes: Nodes, merges: dict[Any, Merge], name: Any, made: dict[Any, Nodes]) -> Nodes:
    """The merged nodes of this name; only the last one is kept."""
    if name not in made:
        made.clear()
        made[name] = merged(nodes, merges[name])
    return made[name]
