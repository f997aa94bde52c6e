"""The native kernel is built once, checked before it serves, and never missed: torch serves where it cannot."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adapters_store.mixing import Mix, MixedBatch
from adapters_store.primitives import cost, native
from adapters_store.primitives.calibration import calibrate_lowrank
from tests import strategies
from tests.strategies import OneSite

ROOT = Path(__file__).parents[2]
HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C compiler")
# Says the status, and answers a mixed batch through a linear layer and through the reference.
ANSWER = """
import json, torch
from adapters_store.mixing import Mix, MixedBatch
from adapters_store.primitives import Entry, native
from adapters_store.sites import Sites
torch.manual_seed(0)
backbone = torch.nn.ModuleDict({"l": torch.nn.Linear(20, 30)})
sites = Sites(backbone, 20, keeps_reference=True)
sites.put(0, [Entry("l", "lowrank", {"A": torch.randn(4, 20), "B": torch.randn(30, 4)}, {"scale": 0.5})])
batch, x = MixedBatch.of([(5, Mix.one_hot(0, 1)), (4, None)], 1), torch.randn(9, 20)
with torch.no_grad():
    with sites.mixing(batch):
        found = backbone["l"](x)
    with sites.mixing(batch, reference=True):
        expected = backbone["l"](x)
status = native.status()
print(json.dumps([status.active, status.detail, torch.allclose(found, expected, atol=1e-5)]))
"""


def _start(cache: Path, **changes: str) -> subprocess.Popen:
    environment = os.environ | {"ESPALIER_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | changes
    environment.pop("CC", None)
    return subprocess.Popen(
        [sys.executable, "-c", ANSWER], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _answer(process: subprocess.Popen) -> tuple[bool, str, bool]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return tuple(json.loads(out.splitlines()[-1]))


def test_switched_off_torch_serves_and_the_status_says_so(tmp_path: Path) -> None:
    active, detail, right = _answer(_start(tmp_path, ESPALIER_NATIVE="0"))

    assert (active, right) == (False, True)
    assert "ESPALIER_NATIVE=0" in detail
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_torch_serves_and_the_status_says_why(tmp_path: Path) -> None:
    active, detail, right = _answer(_start(tmp_path, PATH=""))

    assert (active, right) == (False, True)
    assert "no C compiler" in detail


def test_a_cache_that_cannot_be_written_leaves_torch_serving(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    active, detail, right = _answer(_start(tmp_path / "file" / "cache"))

    assert (active, right) == (False, True)
    assert "not built" in detail


@needs_compiler
def test_two_processes_that_build_at_once_leave_one_library_which_the_next_reuses(tmp_path: Path) -> None:
    both = [_start(tmp_path) for _ in range(2)]

    answers = [_answer(process) for process in both]

    assert [(active, right) for active, _, right in answers] == [(True, True)] * 2
    built = list(tmp_path.iterdir())
    assert [path.suffix for path in built] == [".so"]
    before = built[0].stat().st_mtime_ns
    active, _, right = _answer(_start(tmp_path, PATH=os.environ["PATH"]))
    assert (active, right) == (True, True)
    assert built[0].stat().st_mtime_ns == before


@needs_compiler
def test_the_kernel_serves_here() -> None:
    assert native.status().active, native.status().detail


def test_tables_grow_and_keep_what_they_hold() -> None:
    table = native.Table()

    table.fill(2, 3, None)
    table.reach(1000)
    table.fill(7, 9, None)

    assert len(table.ranks) > 1000
    assert (table.ranks[2], table.ranks[7], table.ranks[1000]) == (3, 9, 0)
    assert table.ranks.sum() == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibration_fits_every_form_and_leaves_results_alone(dtype: torch.dtype) -> None:
    one, generator = OneSite.of(lambda: torch.nn.Linear(64, 64), dtype), torch.Generator().manual_seed(0)
    one.sites.put(0, [strategies.lowrank(one.place, generator)])
    x, rows = strategies.randn(generator, 9, 64).to(dtype), [(9, Mix.one_hot(0, 3))]

    calibrate_lowrank(dtype, torch.device("cpu"))

    fitted = cost._coefficients[dtype]
    assert all(len(fitted[form]) == 3 and min(fitted[form]) >= 0 and max(fitted[form]) > 0 for form in cost.FORMS)
    with torch.no_grad(), one.sites.mixing(MixedBatch.of(rows, 3)):
        found = one.place.module(x)
    with torch.no_grad(), one.sites.mixing(MixedBatch.of(rows, 3), reference=True):
        torch.testing.assert_close(found, one.place.module(x), rtol=2e-2, atol=2e-2)


@pytest.fixture(autouse=True)
def _own_coefficients() -> object:
    """Calibrating here must not decide the forms of other tests."""
    kept = dict(cost._coefficients)
    yield
    cost._coefficients.clear()
    cost._coefficients.update(kept)


# tokens, mixes, rank, width: unlike the probes that calibrate
CASES = [(32, 1, 4, 256), (300, 12, 8, 512), (900, 3, 32, 384), (128, 32, 8, 768), (600, 30, 16, 256)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_calibration_the_chosen_form_is_near_the_best(dtype: torch.dtype) -> None:
    start = time.perf_counter()
    calibrate_lowrank(dtype, torch.device("cpu"))
    assert time.perf_counter() - start < 1.5

    for tokens, num_mixes, rank, width in CASES:
        one = OneSite.of(lambda width=width: torch.nn.Linear(width, width), dtype)
        generator = torch.Generator().manual_seed(0)
        for slot in range(num_mixes):
            one.sites.put(slot, [strategies.lowrank(one.place, generator, rank)])
        bank, x = one.sites[one.place.name].banks["lowrank"], strategies.randn(generator, tokens, width).to(dtype)
        batch = MixedBatch.of([(tokens // num_mixes, Mix.one_hot(slot, 3)) for slot in range(num_mixes)], 3)
        x = x[: batch.num_tokens]
        ranks, times = torch.full((num_mixes,), rank).numpy(), {}
        for form in cost.FORMS:
            with cost.forced(form), torch.no_grad():
                times[form] = cost._microseconds(lambda bank=bank, x=x, batch=batch: bank.add(x.clone(), x, x, batch))
        chosen = cost.cheapest(batch, ranks, width, width, dtype, native.is_active())
        assert times[chosen] <= 4 * min(times.values()), (tokens, num_mixes, rank, width, chosen, times)
