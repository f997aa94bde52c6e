"""Fits the cost model to the machine at hand: a bare linear layer, a few adapters, every form that can serve here."""

import functools

import torch
from torch import Tensor, nn

from adapters_store.mixing import MixedBatch
from adapters_store.primitives import cost, native
from adapters_store.primitives.base import Entry, Place
from adapters_store.primitives.lowrank import LowRankBank


def calibrate_lowrank(dtype: torch.dtype, device: torch.device) -> None:
    """Measure every available form of lowrank and fit its coefficients: changes speed, never results."""

    @functools.cache
    def site(rank: int, width: int) -> tuple[LowRankBank, Tensor]:
        return _site(rank, width, dtype, device)

    def run(form: str, batch: MixedBatch, rank: int, width: int) -> None:
        bank, x = site(rank, width)
        tokens = x[: batch.num_tokens]
        with cost.forced(form), torch.no_grad():
            bank.add(tokens.clone(), tokens, tokens, batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    forms = cost.FORMS if native.supports(dtype, device) else cost.FORMS[1:]
    cost.calibrate(dtype, run, forms)


def _site(rank: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[LowRankBank, Tensor]:
    """A bank with as many adapters as a probe may ask for, and x: (tokens, width) for the largest of them."""
    linear = nn.Linear(width, width, bias=False, device="meta")  # only its widths matter
    bank = LowRankBank(Place("probe", linear, width, width, 0), dtype, device)
    generator = torch.Generator().manual_seed(0)
    for slot in range(max(num_mixes for _, num_mixes, _, _ in cost.PROBES)):
        A, B = torch.randn(rank, width, generator=generator), torch.randn(width, rank, generator=generator)
        bank.put(slot, Entry("probe", "lowrank", {"A": A, "B": B}, {"scale": 1e-3}))
    tokens = max(tokens for tokens, _, _, _ in cost.PROBES)
    return bank, torch.randn(tokens, width, generator=generator).to(device, dtype)
