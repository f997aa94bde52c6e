"""Decode attention in Triton gives what float64 says: in Triton's interpreter on the CPU, on a GPU if there is one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters_store.packing import Scoring
from server.generation.pages import PAGE
from tests.tolerances import OUTPUT, assert_same_bits
from tests.triton_cases import SHARED_BYTES, compiled, devices, run_interpreted, starts_itself

pytest.importorskip("triton", reason="needs triton")

from server.generation import triton_attention  # not without triton
from server.generation.triton_attention import SPAN, append, attend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = OUTPUT | {torch.float16: 4e-3}
few = settings(max_examples=20, deadline=None, derandomize=True)


@starts_itself
def test_all_of_this_holds_in_the_interpreter() -> None:
    run_interpreted(__file__)


class Case:
    """Rows of some lengths with random queries, keys and values; pages in random order, some of nobody's."""

    def __init__(
        self, lengths: list[int], dtype: torch.dtype, device: str = "cpu", *, heads: int = 4, kv_heads: int = 2,
        d: int = 16, d_v: int = 16, window: int | None = None, softcap: float | None = None, more_pages: int = 0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self.lengths, self.dtype, self.device = lengths, dtype, device
        self.scoring = Scoring(d**-0.5, True, window, softcap)
        held = [-(-length // PAGE) for length in lengths]
        order = torch.randperm(sum(held) + 3, generator=generator)
        self.tables = torch.zeros(len(lengths), max(held) + more_pages, dtype=torch.int64)
        for row, count in enumerate(held):
            start = sum(held[:row])
            self.tables[row, :count] = order[start : start + count]
        self.query = (3 * torch.randn(len(lengths), heads, d, generator=generator)).to(dtype)
        self.keys = torch.randn(len(order), kv_heads, PAGE, d, generator=generator).to(dtype)
        self.values = torch.randn(len(order), kv_heads, PAGE, d_v, generator=generator).to(dtype)

    def found(self, rows: list[int] | None = None) -> Tensor:
        """Of some rows, in a batch of their own."""
        chosen = list(range(len(self.lengths))) if rows is None else rows
        lengths = torch.tensor([self.lengths[row] for row in chosen], device=self.device)
        tables = self.tables[chosen].to(self.device)
        keys, values = self.keys.to(self.device), self.values.to(self.device)
        return attend(self.query[chosen].to(self.device), keys, values, tables, lengths, self.scoring).cpu()

    def expected(self) -> Tensor:
        """(rows, heads, d_v) in float64, head by head."""
        rows, heads, _ = self.query.shape
        group = heads // self.keys.shape[1]
        out = torch.zeros(rows, heads, self.values.shape[-1], dtype=torch.float64)
        for row, length in enumerate(self.lengths):
            for head in range(heads if length else 0):
                key, value = (
                    torch.cat([pages[page, head // group] for page in self.tables[row].tolist()])[:length].double()
                    for pages in (self.keys, self.values)
                )
                scores = key @ self.query[row, head].double() * self.scoring.scale
                if self.scoring.softcap:
                    scores = self.scoring.softcap * torch.tanh(scores / self.scoring.softcap)
                if self.scoring.window:
                    scores[: max(0, length - self.scoring.window)] = -torch.inf
                out[row, head] = torch.softmax(scores, 0) @ value
        return out

    def assert_right(self) -> None:
        apart = (self.found().double() - self.expected()).abs().max()
        assert apart <= TOLERANCE[self.dtype], f"apart by {apart:.1e}"


_lengths = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 100])


@devices
@few
@given(
    lengths=st.lists(_lengths, min_size=1, max_size=4), dtype=st.sampled_from(DTYPES),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (4, 4), (20, 1)]),
    sizes=st.sampled_from([(16, 16), (80, 80), (24, 40)]),
    window=st.sampled_from([None, 1, 16, 40, 1000]), softcap=st.sampled_from([None, 2.0, 50.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_lengths_heads_windows_and_caps_give_what_the_law_says(
    device: str, lengths: list[int], dtype: torch.dtype, heads: tuple[int, int], sizes: tuple[int, int],
    window: int | None, softcap: float | None, seed: int,
) -> None:  # fmt: skip
    Case(
        lengths, dtype, device, heads=heads[0], kv_heads=heads[1], d=sizes[0], d_v=sizes[1], window=window,
        softcap=softcap, seed=seed,
    ).assert_right()  # fmt: skip


@devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 20, SPAN + 30])
def test_rows_longer_than_a_span_are_joined(device: str, dtype: torch.dtype, window: int | None) -> None:
    lengths = [3 * SPAN - 7, 5, 2 * SPAN, SPAN + 1, 2 * SPAN + 10]

    Case(lengths, dtype, device, window=window).assert_right()


@devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_result_does_not_depend_on_the_batch_or_on_spare_pages(device: str, dtype: torch.dtype) -> None:
    case = Case([17, 2 * SPAN + 3, 60, 1], dtype, device)
    together = case.found()

    for row in range(4):
        assert_same_bits(case.found([row])[0], together[row])
        short = -(-case.lengths[row] // PAGE)
        case.tables = case.tables[:, :short] if row != 1 else case.tables  # one span then, where it was joined
        assert_same_bits(case.found([row])[0], together[row])
        case = Case([17, 2 * SPAN + 3, 60, 1], dtype, device)


@devices
@pytest.mark.parametrize("more_pages", [0, SPAN // PAGE])
def test_idle_rows_give_zeros_and_pages_of_others_are_not_read(device: str, more_pages: int) -> None:
    case = Case([20, 0, 3], torch.float32, device, more_pages=more_pages)
    expected = case.expected()
    own = {page for row, length in enumerate(case.lengths) for page in case.tables[row, : -(-length // PAGE)].tolist()}
    for page in set(range(len(case.keys))) - own:
        case.keys[page] = case.values[page] = float("nan")
    case.keys[case.tables[0, 1], :, 4:] = case.values[case.tables[0, 1], :, 4:] = float("nan")  # behind the row's end

    found = case.found()

    assert found[1].abs().max() == 0
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@devices
def test_no_rows_give_none(device: str) -> None:
    case = Case([20], torch.float32, device, d_v=24)

    assert case.found([]).shape == (0, 4, 24)
    none = torch.zeros(0, 0, dtype=torch.int64, device=device)  # as a step without decoding rows has it
    empty = torch.zeros(4, 0, 16, device=device).transpose(0, 1)
    assert attend(empty, case.keys, case.values, none, none.sum(1), case.scoring).shape == (0, 4, 24)


@devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_new_keys_and_values_go_to_their_places_and_nowhere_else(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(5, 2, PAGE, 24).to(dtype), torch.randn(5, 2, PAGE, 40).to(dtype)
    fused = torch.randn(4, 2, 100).to(dtype)  # (tokens, kv_heads, …): as a layer's projection gives it
    key, value = fused[:, :, 7:31].transpose(0, 1), fused[:, :, 50:90].transpose(0, 1)
    places = [4 * PAGE + 15, -1, 0, 2 * PAGE + 3]
    found = [part.to(device, copy=True) for part in (keys, values)]

    append(key.to(device), value.to(device), *found, torch.tensor(places, device=device))

    for token, place in enumerate(places):
        if place >= 0:
            keys[place // PAGE, :, place % PAGE] = key[:, token]
            values[place // PAGE, :, place % PAGE] = value[:, token]
    assert_same_bits(found[0].cpu(), keys)
    assert_same_bits(found[1].cpu(), values)


POINTERS = dict.fromkeys(("query", "keys", "values", "key", "value", "out"), "*{}") | {
    "tables": "*i64", "lengths": "*i64", "places": "*i64", "parts": "*fp32", "tops": "*fp32", "totals": "*fp32",
    "scale": "fp32", "softcap": "fp32",
}  # fmt: skip
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


@starts_itself
@pytest.mark.parametrize(
    ("kernel", "dtype", "d", "is_joined", "is_capped"),
    [
        ("_attend", "bf16", 128, True, False),  # Llama 3
        ("_attend", "bf16", 256, False, True),  # Gemma 2
        ("_attend", "fp16", 80, False, False),
        ("_attend", "fp32", 128, True, True),
        ("_attend", "fp32", 256, False, False),
        ("_join", "bf16", 128, True, False),
        ("_append", "bf16", 128, True, False),
    ],
)
def test_kernels_compile_for_sm_90_without_a_gpu(
    kernel: str, dtype: str, d: int, is_joined: bool, is_capped: bool
) -> None:
    block = triton_attention.padded(d)
    constants = {
        "D": d, "D_V": d, "BLOCK_GROUP": 16, "BLOCK_D": block, "BLOCK_V": block, "BLOCK": block, "SPAN": SPAN,
        "BLOCK_TOKENS": triton_attention.tokens_of_block(d, SIZES[dtype]), "PAGE": PAGE, "IS_CAPPED": is_capped,
        "IS_JOINED": is_joined, "WIDE": False,
    }  # fmt: skip
    pointers = POINTERS | ({"out": "*fp32"} if is_joined and kernel == "_attend" else {})

    built = compiled(getattr(triton_attention, kernel), pointers, constants, dtype)

    assert len(built.asm["cubin"]) > 1000
    assert built.metadata.shared <= SHARED_BYTES // 2  # two programs fit
    if kernel == "_attend":
        assert ("mma" in built.asm["ptx"]) == (dtype != "fp32")
