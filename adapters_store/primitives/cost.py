"""Which batched form is cheapest for a batch at a site: time = c0 + c1 * GFLOP + c2 * MB, per form and dtype.

The shipped coefficients were fitted on one machine (AVX-512, one thread); `calibrate` fits them to the machine at hand
in well under a second and the server does so when it starts. A wrong guess costs time, never correctness: all forms
compute the same.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls

from adapters_store.mixing import Mix, MixedBatch

FORMS = ("native", "dense", "fold")


@dataclass(frozen=True)
class Load:
    """What one form would have to do."""

    gflop: float
    megabytes: float


Work = dict[str, Load]

# microseconds: (constant, per GFLOP, per MB)
_SHIPPED: dict[torch.dtype, dict[str, tuple[float, float, float]]] = {
    torch.float32: {"native": (6, 9000, 20), "dense": (60, 11000, 60), "fold": (150, 11000, 90)},
    torch.bfloat16: {"native": (6, 8500, 30), "dense": (80, 4000, 120), "fold": (180, 4000, 150)},
}
_coefficients = {dtype: dict(forms) for dtype, forms in _SHIPPED.items()}
_forced: list[str] = []


def work(batch: MixedBatch, slots: tuple[int, ...], ranks: Sequence[int], tokens: int, d_in: int, d_out: int) -> Work:
    """The load of each form for these adapters at one site; remembered per batch."""
    key = (slots, tuple(ranks), tokens, d_in, d_out)
    known: dict[object, Work] = batch.__dict__.setdefault("_work", {})
    if key not in known:
        known[key] = _work(batch, dict(zip(slots, ranks, strict=True)), tokens, d_in, d_out)
    return known[key]


def _work(batch: MixedBatch, rank_of: dict[int, int], tokens: int, d_in: int, d_out: int) -> Work:
    item = 2 if batch.device.type == "cpu" else 4
    width, mixes = d_in + d_out, len(batch.mixes)
    tokens_of_mix = np.zeros(mixes)
    for mix, length in zip(batch.mix_of_row, batch.lengths, strict=True):
        if mix >= 0:
            tokens_of_mix[mix] += length
    rank_of_mix = np.array([sum(rank_of.get(slot, 0) for slot in mix.slots) for mix in batch.mixes])
    all_ranks = sum(rank_of.values())
    traffic = tokens * (d_in + 2 * d_out) * item / 1e6
    padded = mixes * float(tokens_of_mix.max(initial=0)) * float(rank_of_mix.max(initial=0))
    return {
        "native": Load(2e-9 * width * float(tokens_of_mix @ rank_of_mix), traffic + all_ranks * width * 4 / 1e6),
        "dense": Load(2e-9 * width * tokens * all_ranks, traffic + (tokens + width) * all_ranks * item / 1e6),
        "fold": Load(2e-9 * width * padded, 2 * traffic + float(rank_of_mix.sum()) * width * item / 1e6),
    }


def cheapest(load: Work, dtype: torch.dtype, can_native: bool) -> str:
    """The form with the least predicted time among those that can serve."""
    if _forced and (_forced[-1] != "native" or can_native):
        return _forced[-1]
    coefficients = _coefficients.get(dtype, _coefficients[torch.float32])
    forms = FORMS if can_native else FORMS[1:]
    return min(forms, key=lambda form: _predicted(coefficients[form], load[form]))


def _predicted(coefficients: tuple[float, float, float], load: Load) -> float:
    constant, per_gflop, per_megabyte = coefficients
    return constant + per_gflop * load.gflop + per_megabyte * load.megabytes


@contextmanager
def forced(form: str) -> Iterator[None]:
    """Use one form wherever it can serve: for tests and benchmarks."""
    _forced.append(form)
    try:
        yield
    finally:
        _forced.pop()


def calibrate(dtype: torch.dtype, run: Callable[[str, MixedBatch, int, int], None], forms: Sequence[str]) -> None:
    """Fit the coefficients of a dtype to this machine.

    run(form, batch, rank, width): computes one site's delta for the batch with adapters of this rank, d_in = d_out = width.
    """
    for form in forms:
        rows, times = [], []
        for tokens, num_mixes, rank, width in _PROBES:
            mixes = [Mix.one_hot(slot, 1) for slot in range(num_mixes)]
            batch = MixedBatch.of([(tokens // num_mixes, mix) for mix in mixes], 1)
            load = _work(batch, dict.fromkeys(range(num_mixes), rank), tokens, width, width)[form]
            times.append(_microseconds(lambda b=batch, r=rank, w=width: run(form, b, r, w)))  # type: ignore[misc]
            rows.append((1.0, load.gflop, load.megabytes))
        scaled = np.array(rows) / np.array(times)[:, None]  # relative error: small cases count as much as large ones
        constant, per_gflop, per_megabyte = nnls(scaled, np.ones(len(times)))[0].tolist()
        _coefficients[dtype][form] = (constant, per_gflop, per_megabyte)


_PROBES = [(64, 4, 8, 384), (64, 16, 16, 384), (512, 4, 8, 384), (512, 16, 16, 384), (1024, 1, 16, 384), (256, 8, 16, 1024)]


def _microseconds(call: Callable[[], None]) -> float:
    call()
    times = []
    for _ in range(3):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return max(min(times) * 1e6, 1.0)
