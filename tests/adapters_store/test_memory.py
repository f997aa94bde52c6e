"""Tensors side by side in huge pages: each is its own, aligned, zero, and there as long as anything uses it."""

import gc
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters_store import memory
from tests.strategies import light

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
DTYPES = (torch.float32, torch.bfloat16, torch.int32)


@light
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300), st.sampled_from(DTYPES)), max_size=40))
def test_tensors_share_nothing_and_begin_as_zeros(wanted: list[tuple[int, int, torch.dtype]]) -> None:
    with memory.side_by_side(memory.HUGE):  # what does not fit comes from elsewhere
        tensors = [memory.zeros(rows, columns, dtype=dtype) for rows, columns, dtype in wanted]

    assert all(not tensor.any() for tensor in tensors)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 1)
    for number, (tensor, (rows, columns, dtype)) in enumerate(zip(tensors, wanted, strict=True)):
        assert (tensor == number + 1).all()
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((rows, columns), dtype, True)
        assert tensor.data_ptr() % 64 == 0


def test_they_lie_side_by_side_until_the_run_is_full() -> None:
    with memory.side_by_side(memory.HUGE):
        first, second = (memory.zeros(1000, dtype=torch.float32) for _ in range(2))
        too_long = memory.zeros(memory.HUGE // 4, dtype=torch.float32)

    assert first.data_ptr() % memory.HUGE == 0
    assert second.data_ptr() - first.data_ptr() == 4032  # whole lines of 64 bytes
    assert not first.data_ptr() <= too_long.data_ptr() < first.data_ptr() + memory.HUGE


def test_less_than_a_page_and_other_threads_are_not_gathered() -> None:
    found: list[torch.Tensor] = []
    with memory.side_by_side(memory.HUGE - 1):
        assert memory.zeros(8, dtype=torch.float32).untyped_storage().nbytes() == 32
    with memory.side_by_side(memory.HUGE):
        thread = threading.Thread(target=lambda: found.append(memory.zeros(8, dtype=torch.float32)))
        thread.start()
        thread.join()
    assert found[0].untyped_storage().nbytes() == 32
    assert memory.zeros(8, dtype=torch.float32).untyped_storage().nbytes() == 32


def test_a_run_stays_with_its_last_tensor_and_goes_with_it() -> None:
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * 4096

    before = mapped()
    with memory.side_by_side(64 * memory.HUGE):
        first, last = (memory.zeros(100, dtype=torch.float32) for _ in range(2))
    del first
    gc.collect()
    assert mapped() - before >= 64 * memory.HUGE
    assert last.fill_(3).sum() == 300

    del last
    gc.collect()
    assert mapped() - before < 64 * memory.HUGE


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="this system has no huge pages to give")
def test_the_pages_are_huge() -> None:
    with memory.side_by_side(8 * memory.HUGE):
        tensor = memory.zeros(2 * memory.HUGE, dtype=torch.float32)
    tensor.fill_(1)

    start, found, inside = tensor.data_ptr(), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head:
            low, high = (int(part, 16) for part in head.split("-"))
            inside = low <= start < high
        elif inside and head == "AnonHugePages:":
            found += int(line.split()[1])
    assert found > 0
