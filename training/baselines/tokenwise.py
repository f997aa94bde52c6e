"""All adapters at once with a weight per token: y = W x + sum_k g_k(x) s_k B_k A_k x at every site.

A mix has one weight per adapter, layer and row; routers of tokens need one per token and site. Forward hooks add it to
the sites' modules: all A side by side, the gate repeated over each adapter's ranks, all B side by side. It
differentiates through the gate. With a constant gate it is what a Mix gives.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapters_store.adapter import Adapter
from training.baselines.answering import Pool
from training.step import micro_batches
from training.suite.workbench import Texts, Workbench


@dataclass(frozen=True, eq=False)
class Stack:
    """K adapters at one site. A: (R, d_in), B: (d_out, R) with scales in it, owner: (R,) adapter of each rank."""

    site: str
    layer: int
    A: Tensor
    B: Tensor
    owner: Tensor
    count: int


@dataclass(frozen=True, eq=False)
class At:
    """What a gate sees. x: (n, d_in), y: (n, d_out), hidden: (n, R) = A x; row: (n,) the row of each token."""

    stack: Stack
    x: Tensor
    y: Tensor
    hidden: Tensor
    row: Tensor


Gate = Callable[[At], Tensor]  # -> (n, K)
Value = Callable[[At, Tensor], Tensor]  # what becomes of the sum (n, d_out)


def stacks(bench: Workbench, adapters: Sequence[Adapter]) -> list[Stack]:
    """The adapters side by side at each site of the tail, in the backbone's dtype."""
    sites, first = bench.tail.encoder.sites, bench.tail.first
    names = dict.fromkeys(entry.site for adapter in adapters for entry in adapter.entries)
    return [_stack(bench, adapters, name) for name in names if sites.add(name).place.layer >= first]


def _stack(bench: Workbench, adapters: Sequence[Adapter], site: str) -> Stack:
    here = [(k, entry) for k, adapter in enumerate(adapters) for entry in adapter.entries if entry.site == site]
    odd = [entry.primitive for _, entry in here if entry.primitive != "lowrank"]
    if odd:
        raise NotImplementedError(f"weights per token are for low-rank adapters; {site} has {odd[0]}")
    encoder = bench.tail.encoder
    A = torch.cat([entry.tensors["A"].float() for _, entry in here])
    B = torch.cat([entry.tensors["B"].float() * float(entry.options.get("scale", 1.0)) for _, entry in here], dim=1)
    owner = torch.cat([torch.full((entry.tensors["A"].shape[0],), k) for k, entry in here])
    layer = encoder.sites[site].place.layer
    return Stack(site, layer, A.detach().to(encoder.dtype), B.detach().to(encoder.dtype), owner, len(adapters))


@contextmanager
def gated(bench: Workbench, stacked: Sequence[Stack], order: Tensor, gate: Gate, value: Value | None) -> Iterator[None]:
    """While inside, the sites add what the gate lets through. order: (rows,) the rows as the forward has them."""
    sites = bench.tail.encoder.sites
    handles = []

    def hook(stack: Stack) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:  # noqa: ARG001  # torch's signature
            batch = sites.batch
            if batch is None:
                raise AssertionError("our bug: a gated forward outside an encoder's batch")
            row = torch.repeat_interleave(order, torch.tensor(list(batch.lengths)))
            x, y = args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1])
            return output + delta(stack, x, y, row, gate, value).to(output.dtype).view_as(output)

        return add

    try:
        handles += [sites[stack.site].place.module.register_forward_hook(hook(stack)) for stack in stacked]
        yield
    finally:
        for handle in handles:
            handle.remove()


def delta(stack: Stack, x: Tensor, y: Tensor, row: Tensor, gate: Gate, value: Value | None = None) -> Tensor:
    """(n, d_out) what all adapters add to the site's output under the gate."""
    at = At(stack, x, y, x @ stack.A.mT, row)
    weights = gate(at).to(x.dtype)  # (n, K)
    summed = (at.hidden * weights[:, stack.owner]) @ stack.B.mT
    return value(at, summed) if value else summed


def pool(bench: Workbench, stacked: Sequence[Stack], texts: Texts, gate: Gate, value: Value | None = None) -> Tensor:
    """(n, d) pooled hidden states of texts in one forward; gradients flow to what gate and value are made of."""
    order = torch.tensor(sorted(range(len(texts)), key=lambda i: len(texts.rows[i])), dtype=torch.int64)
    with gated(bench, stacked, order, gate, value):
        return bench.tail.pool(texts.rows, texts.states, [None] * len(texts), bench.backbone.default_pooling)


@torch.no_grad()
def pool_all(
    bench: Workbench, stacked: Sequence[Stack], texts: Texts, gate_of: Callable[[list[int]], Gate],
    value: Value | None = None,
) -> Tensor:  # fmt: skip
    """(n, d) of any number of texts. gate_of: the gate of some of them, whose tokens count rows within these."""
    order = sorted(range(len(texts)), key=lambda i: len(texts.rows[i]))
    found = torch.empty(len(texts), bench.hidden_size)
    for batch in micro_batches(bench.tail.encoder, [len(texts.rows[i]) for i in order], bench.setting.token_budget):
        chosen = [order[n] for n in batch]
        found[chosen] = pool(bench, stacked, texts.take(chosen), gate_of(chosen), value).cpu()
    return found


def always(bench: Workbench, stacked: Sequence[Stack], gate: Gate) -> Pool:
    """The pool of one gate for the texts of all tasks."""

    def pool_split(split: Sequence[Texts]) -> list[Tensor]:
        return [pool_all(bench, stacked, texts, lambda _: gate) for texts in split]

    return pool_split
