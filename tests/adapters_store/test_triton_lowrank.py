"""The Triton kernels add what the float64 law says: in Triton's interpreter on the CPU, on a GPU where there is one.

The interpreter is chosen when triton is imported, for the whole process, so these tests run in a process of their own.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters_store.mixing import Mix, MixedBatch
from adapters_store.primitives.grouping import Grouping
from tests.tolerances import OUTPUT, assert_same_bits
from tests.triton_cases import SHARED_BYTES, compiled, devices, run_interpreted, starts_itself

pytest.importorskip("triton", reason="needs triton")

from adapters_store.primitives import triton_lowrank  # not without triton
from adapters_store.primitives.triton_lowrank import GroupedPair, Table

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = OUTPUT | {torch.float16: 4e-3}
few = settings(max_examples=20, deadline=None, derandomize=True)


@starts_itself
def test_all_of_this_holds_in_the_interpreter() -> None:
    run_interpreted(__file__)


class Case:
    """Adapters of some ranks at one site, and rows under mixes of them. Slots without an adapter have rank 0."""

    def __init__(
        self, ranks: list[int], rows: list[tuple[int, Mix | None]], sizes: tuple[int, int], dtype: torch.dtype,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(sum(ranks) + len(rows))
        d_in, d_out = sizes
        self.device, self.rows = torch.device(device), rows
        self.factors, self.table = [], Table(self.device)
        for slot, rank in enumerate(ranks):
            A = (torch.randn(rank, d_in, generator=generator) / d_in**0.5).to(dtype)
            B = (torch.randn(d_out, rank, generator=generator) / max(rank, 1) ** 0.5).to(dtype)
            pair = GroupedPair.of(A, B, dtype, self.device)
            self.table.fill(slot, pair if rank else None)
            self.factors.append((A, B, pair))
        self.batch = MixedBatch.of(rows, 3, self.device)
        self.x = torch.randn(self.batch.num_tokens, d_in, generator=generator).to(dtype)
        self.y = torch.randn(self.batch.num_tokens, d_out, generator=generator).to(dtype)

    def found(self, layer: int = 1) -> Tensor:
        out = self.y.to(self.device, copy=True)
        triton_lowrank.add(out, self.x.to(self.device), self.table, self.batch, layer)
        return out.cpu()

    def expected(self, layer: int = 1) -> Tensor:
        """The law in float64, row by row, adapter by adapter."""
        out = self.y.double()
        for start, length, mix in zip(self.batch.row_start, self.batch.lengths, (m for _, m in self.rows), strict=True):
            tokens = slice(start, start + length)
            for slot, weights in zip(mix.slots, mix.weights, strict=True) if mix else ():
                A, B, _ = self.factors[slot]
                out[tokens] += float(weights[layer]) * (self.x[tokens].double() @ A.double().mT @ B.double().mT)
        return out

    def assert_right(self) -> None:
        found, expected = self.found(), self.expected()
        apart = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1.0)
        assert apart <= TOLERANCE[self.x.dtype], f"apart by {apart:.1e}"


def random_mix(num_slots: int, k: int, rng: np.random.Generator) -> Mix:
    slots = tuple(sorted(rng.choice(num_slots, size=min(k, num_slots), replace=False).tolist()))
    return Mix(slots, rng.normal(size=(len(slots), 3)).astype(np.float32))


_ranks = st.sampled_from([0, 1, 3, 8, 16, 17, 32, 40])
_lengths = st.sampled_from([1, 1, 1, 2, 15, 16, 17, 40])


@devices
@few
@given(
    ranks=st.lists(_ranks, min_size=1, max_size=5), lengths=st.lists(_lengths, min_size=1, max_size=6),
    sizes=st.tuples(st.sampled_from([8, 83, 128, 200]), st.sampled_from([5, 101, 128, 260])),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_ranks_rows_and_widths_add_what_the_law_says(
    device: str, ranks: list[int], lengths: list[int], sizes: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = [(length, random_mix(len(ranks), int(rng.integers(0, 4)), rng)) for length in lengths]

    Case(ranks, rows, sizes, dtype, device).assert_right()


@devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_inputs_are_summed_in_several_programs(device: str, dtype: torch.dtype) -> None:
    assert triton_lowrank.splits_of(2300) == 4
    rows = [(3, Mix((0, 1), np.full((2, 3), 0.5, np.float32))), (1, None), (17, Mix.one_hot(1, 3))]

    Case([16, 5], rows, (2300, 40), dtype, device).assert_right()


@devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tokens_result_does_not_depend_on_its_neighbours(device: str, dtype: torch.dtype) -> None:
    rng, ranks, sizes = np.random.default_rng(0), [16, 4, 40], (1100, 150)
    rows = [(5, random_mix(3, 2, rng)), (1, random_mix(3, 3, rng)), (20, random_mix(3, 1, rng)), (2, None)]
    together = Case(ranks, rows, sizes, dtype, device)
    found = together.found()

    for index, (start, length) in enumerate(zip(together.batch.row_start, together.batch.lengths, strict=True)):
        alone = Case(ranks, [rows[index]], sizes, dtype, device)
        alone.factors, alone.table = together.factors, together.table
        alone.x, alone.y = (part[start : start + length] for part in (together.x, together.y))
        assert_same_bits(alone.found(), found[start : start + length])


@devices
def test_tokens_without_an_adapter_here_keep_their_bits(device: str) -> None:
    rows = [(3, None), (2, Mix.one_hot(0, 3)), (2, Mix.one_hot(1, 3)), (2, Mix.one_hot(900, 3))]  # 900: never filled
    case = Case([0, 4], rows, (16, 16), torch.float32, device)
    case.y[:] = -0.0
    beyond = case.table.rows[1].repeat(1000, 1)  # what lies behind the table must not be taken for a part of it
    beyond[: len(case.table.rows)] = case.table.rows
    case.table.rows = beyond[: len(case.table.rows)]

    found = case.found()

    assert_same_bits(found[:5], case.y[:5])
    assert_same_bits(found[7:], case.y[7:])
    assert found[5:7].abs().min() > 0


@devices
def test_slices_of_wider_tensors_are_read_and_written_in_place(device: str) -> None:
    case = Case([8], [(4, Mix.one_hot(0, 3))], (24, 32), torch.float32, device)
    x, out = torch.zeros(4, 60, device=device), torch.zeros(4, 70, device=device)
    x[:, 30:54], out[:, 10:42] = case.x.to(device), case.y.to(device)

    triton_lowrank.add(out[:, 10:42], x[:, 30:54], case.table, case.batch, 1)

    torch.testing.assert_close(out[:, 10:42].cpu(), case.found(), rtol=0, atol=0)
    assert out[:, :10].abs().max() == out[:, 42:].abs().max() == 0


@devices
def test_buffers_larger_than_the_batch_serve_one_batch_after_another(device: str) -> None:
    """What a CUDA graph does: the same tensors, other contents, idle tiles."""
    rng, sizes = np.random.default_rng(3), (64, 48)
    buffers = Grouping(
        torch.zeros(9, 4, dtype=torch.int64, device=device), torch.zeros(20, dtype=torch.int64, device=device),
        torch.zeros(3, 20, device=device), max_pairs=4,
    )  # fmt: skip
    for lengths in ([1, 20, 3], [2], [1, 1, 1, 1]):
        case = Case([8, 16, 40], [(length, random_mix(3, 2, rng)) for length in lengths], sizes, torch.float32, device)
        own = Grouping.of(case.batch)
        expected = case.found()

        buffers.tiles.zero_()
        buffers.tiles[: len(own.tiles)] = own.tiles
        buffers.pair_slot[: len(own.pair_slot)] = own.pair_slot
        buffers.weights[:, : own.weights.shape[1]] = own.weights
        case.batch.memo[Grouping] = buffers

        assert_same_bits(case.found(), expected)


def test_the_table_keeps_what_it_holds_when_it_grows_and_says_that_it_moved() -> None:
    table, cpu = Table(torch.device("cpu")), torch.device("cpu")
    kept = [GroupedPair.of(torch.ones(r, 8), torch.ones(8, r), torch.float32, cpu) for r in (3, 33)]
    before = table.layout

    table.fill(2, kept[0])
    assert table.layout == before
    table.fill(5, kept[1])
    assert table.rank_room == 48
    moved = table.layout
    table.fill(1000, kept[0])
    assert table.layout != moved
    table.fill(5, None)

    assert table.rows[[2, 5, 1000], 2].tolist() == [3, 0, 3]
    assert table.rows[2].tolist() == [kept[0].A.data_ptr(), kept[0].B.data_ptr(), 3]
    assert table.rank_room == 48  # launches keep their shape


def test_a_pair_is_kept_once_for_kernels_and_torch_forms() -> None:
    A, B = torch.randn(3, 10), torch.randn(6, 3)

    kept = GroupedPair.of(A, B, torch.float32, torch.device("cpu"))

    assert kept.A.data_ptr() == A.data_ptr()
    assert kept.pair.B.data_ptr() == kept.B.data_ptr()
    torch.testing.assert_close(kept.pair.B, B)


POINTERS = {
    "x": "*{}", "y": "*{}", "hidden": "*fp32", "weights": "*fp32", "tiles": "*i64", "pair_slot": "*i64",
    "table": "*i64",
}  # fmt: skip
CONSTANTS = {"SPLITS": 4, "SPAN": 1024, "TILE": 16, "BLOCK_RANK": 16, "BLOCK_IN": 128, "BLOCK_OUT": 128, "WIDE": False}


@starts_itself
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kernel", ["_shrink", "_expand"])
def test_kernels_compile_for_sm_90_without_a_gpu(kernel: str, dtype: str) -> None:
    built = compiled(getattr(triton_lowrank, kernel), POINTERS, CONSTANTS, dtype)

    assert len(built.asm["cubin"]) > 1000
    assert built.metadata.shared <= SHARED_BYTES
    assert "ld.global.b16" not in built.asm["ptx"]  # adapters are read 16 bytes at once, not number by number
    assert ("mma" in built.asm["ptx"]) == (dtype != "fp32")  # sums of float32 products are not left to TF32
