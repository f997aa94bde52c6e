"""Which batched form is cheapest for a batch at a site: time = c0 + c1 * GFLOP + c2 * MB, per form and dtype.

The shipped coefficients were fitted on one machine (AVX-512, one thread); calibration.py fits them to the machine at
hand in about a second, when a server starts. A wrong guess costs time, never correctness: all forms
compute the same.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import nnls

from adapters_store.mixing import Mix, MixedBatch

FORMS = ("native", "dense", "fold")
FORM = "form"  # key of a batch's memo, for who knows which form must serve it


@dataclass(frozen=True)
class Load:
    """What one form would have to do."""

    gflop: float
    megabytes: float


Work = dict[str, Load]

# microseconds: (constant, per GFLOP, per MB)
_SHIPPED: dict[torch.dtype, dict[str, tuple[float, float, float]]] = {
    torch.float32: {"native": (8, 5700, 12), "dense": (46, 9400, 27), "fold": (140, 10000, 22)},
    torch.bfloat16: {"native": (8, 2600, 7), "dense": (80, 2300, 16), "fold": (195, 3000, 4)},
}
_coefficients = {dtype: dict(forms) for dtype, forms in _SHIPPED.items()}
_forced: list[str] = []


def cheapest(
    batch: MixedBatch, ranks: npt.NDArray[np.int64], d_in: int, d_out: int, dtype: torch.dtype, can_native: bool
) -> str:
    """The form with the least predicted time among those that can serve; remembered per batch.

    ranks: (active,) rank of each of batch.slots at this site, 0 where an adapter does not act.
    """
    if _forced and (_forced[-1] != "native" or can_native):
        return _forced[-1]
    if FORM in batch.memo:
        return str(batch.memo[FORM])
    key = (ranks.tobytes(), d_in, d_out, dtype, can_native)
    form: str | None = batch.memo.get(key)
    if form is None:
        load = work(batch, ranks, d_in, d_out)
        coefficients = _coefficients.get(dtype, _coefficients[torch.float32])
        forms = FORMS if can_native else FORMS[1:]
        form = batch.memo[key] = min(forms, key=lambda form: _predicted(coefficients[form], load[form]))
    return form


def work(batch: MixedBatch, ranks: npt.NDArray[np.int64], d_in: int, d_out: int) -> Work:
    """The load of each form for adapters of these ranks at one site."""
    rank_of_mix = np.bincount(batch.pair_mix, ranks[batch.pair_position], len(batch.mixes))
    tokens_of_mix = batch.tokens_of_mix * (rank_of_mix > 0)
    tokens, all_ranks, width = float(tokens_of_mix.sum()), float(ranks.sum()), d_in + d_out
    padded = float((rank_of_mix > 0).sum() * tokens_of_mix.max(initial=0) * rank_of_mix.max(initial=0))
    traffic = tokens * (d_in + 2 * d_out)  # x once, y in and out
    return {
        "native": _load(width * float(tokens_of_mix @ rank_of_mix), traffic + all_ranks * width),
        "dense": _load(width * tokens * all_ranks, traffic + (tokens + width) * all_ranks),
        "fold": _load(width * padded, 2 * traffic + float(rank_of_mix.sum()) * width),
    }


def _load(products: float, numbers: float) -> Load:
    """Multiply-adds as GFLOP, and numbers moved as MB of float32: other sizes go into a dtype's coefficients."""
    return Load(2e-9 * products, 4e-6 * numbers)


def _predicted(coefficients: tuple[float, float, float], load: Load) -> float:
    constant, per_gflop, per_megabyte = coefficients
    return constant + per_gflop * load.gflop + per_megabyte * load.megabytes


def coefficients(dtype: torch.dtype) -> dict[str, tuple[float, float, float]]:
    """Microseconds per call, per GFLOP and per MB of each form, as they stand."""
    return dict(_coefficients.get(dtype, _coefficients[torch.float32]))


def is_forced() -> bool:
    """True while `forced` says which form to use."""
    return bool(_forced)


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

    run(form, batch, rank, width): computes one site's delta for the batch with adapters of this rank in the slots
    0, 1, 2 …; d_in = d_out = width.
    """
    fitted = {form: _fit(functools.partial(run, form), form) for form in forms}
    _coefficients[dtype] = _coefficients.get(dtype, _coefficients[torch.float32]) | fitted


def _fit(run: Callable[[MixedBatch, int, int], None], form: str) -> tuple[float, float, float]:
    rows, times = [], []
    for tokens, num_mixes, rank, width in PROBES:
        mixes = [Mix.one_hot(slot, 1) for slot in range(num_mixes)]
        batch = MixedBatch.of([(tokens // num_mixes, mix) for mix in mixes], 1)
        load = work(batch, np.full(num_mixes, rank), width, width)[form]
        times.append(_microseconds(functools.partial(run, batch, rank, width)))
        rows.append((1.0, load.gflop, load.megabytes))
    scaled = np.array(rows) / np.array(times)[:, None]  # relative error: small cases count as much as large ones
    constant, per_gflop, per_megabyte = nnls(scaled, np.ones(len(times)))[0].tolist()
    return constant, per_gflop, per_megabyte


# tokens, mixes of one adapter each, rank, width
PROBES = (
    (64, 4, 8, 384),
    (64, 16, 16, 384),
    (512, 4, 8, 384),
    (512, 16, 16, 384),
    (1024, 1, 16, 384),
    (256, 8, 16, 1024),
    (256, 4, 64, 384),
    (512, 2, 128, 384),
)


def _microseconds(call: Callable[[], None]) -> float:
    """The least of a few: whatever else the machine does can only add."""
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return max(min(times) * 1e6, 1.0)
