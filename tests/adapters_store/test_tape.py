"""A tape gives what its forward gives, bit for bit, for whatever its inputs hold by then; else there is no tape."""

import ctypes
import shutil
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from adapters_store import tape
from adapters_store.arena import Arena
from adapters_store.linear import Strips, linear
from adapters_store.rms_norm import rms_norm
from adapters_store.tape import Tape, record
from tests.strategies import light
from tests.tolerances import assert_same_bits

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")
ROWS, WIDTH = 6, 8
WEIGHT = torch.linspace(-1, 1, WIDTH * WIDTH).view(WIDTH, WIDTH)
BIG = torch.linspace(-1, 1, 256 * 256).view(256, 256)

# Each from (ROWS, WIDTH) to (ROWS, WIDTH)
STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x + x.flip(0),
    "double": lambda x: x + x,
    "scale": lambda x: x * 0.5,
    "mul": lambda x: x * x.roll(1, 0),
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "linear": lambda x: F.linear(x, WEIGHT),
    "turned": lambda x: x.T.contiguous().T,
    "copied": lambda x: x.reshape(WIDTH, ROWS).T.reshape(ROWS, WIDTH),
    "softmax": lambda x: torch.softmax(x, dim=-1),
    "halves": lambda x: torch.cat((-x[:, WIDTH // 2 :], x[:, : WIDTH // 2]), dim=-1),
    "chunks": lambda x: torch.cat(x.chunk(2, dim=1)[::-1], dim=1),
    "in place": lambda x: x.clone().mul_(2).add_(x),
    "into a view": lambda x: _with_first_row(x, 3.0),
    "rounded": lambda x: F.silu(x.to(torch.bfloat16)).float(),
    "wider": lambda x: x.to(torch.float64).cumsum(0).float(),
    "dropped nothing": lambda x: F.dropout(x, 0.5, training=False),
    "mean": lambda x: x - x.mean(dim=-1, keepdim=True),
    "constant": lambda x: x + torch.arange(WIDTH, dtype=torch.float32),
    "none of it": lambda x: torch.cat((x[:0], x)),
}  # fmt: skip


def _with_first_row(x: Tensor, number: float) -> Tensor:
    filled = torch.empty_like(x)
    filled[0] = number
    filled[1:].copy_(x[1:])
    return filled


def taped(forward: Callable[[], Tensor], nbytes: int = 1 << 20) -> Tape:
    with torch.inference_mode():
        made = record(forward, Arena(nbytes))
    assert isinstance(made, Tape), made
    return made


def refusal(forward: Callable[[], Tensor], nbytes: int = 1 << 20) -> str:
    with torch.inference_mode():
        made = record(forward, Arena(nbytes))
    assert isinstance(made, str)
    return made


def refill(x: Tensor, seed: int) -> None:
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))


@light
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=12), st.integers(0, 99))
def test_any_program_is_played_as_it_runs(names: list[str], seed: int) -> None:
    x = torch.zeros(ROWS, WIDTH)

    def forward() -> Tensor:
        made = [x]
        for name in names:
            made.append(STEPS[name](made[-1]))
        return made[-1] + made[len(made) // 2]

    played = taped(forward)
    for more in range(3):
        refill(x, seed + more)
        with torch.inference_mode():
            assert_same_bits(played.play(), forward())


@torch.inference_mode()
def test_kernels_are_played_among_operators() -> None:
    x, weight, strips = torch.zeros(1, 5, 256), torch.rand(256), Strips.of(BIG)

    def forward() -> Tensor:
        residual = x
        for _ in range(3):
            residual = residual + F.silu(linear(rms_norm(residual, weight, 1e-5), strips)) * residual.cos()
        return residual

    played = taped(forward)
    for seed in range(3):
        refill(x, seed)
        assert_same_bits(played.play(), forward())


@torch.inference_mode()
def test_what_dies_gives_its_place_to_others() -> None:
    x, nbytes = torch.zeros(64, 64), 64 * 64 * 4

    def forward() -> Tensor:
        found = x
        for _ in range(50):
            found = found.cos() + 1
        return found

    played = taped(forward, 3 * nbytes)
    refill(x, 1)
    assert_same_bits(played.play(), forward())
    assert "does not fit" in refusal(lambda: torch.cat([x.cos() + n for n in range(3)]), 3 * nbytes)


def test_tapes_of_one_arena_play_in_turns() -> None:
    x, arena = torch.zeros(ROWS, WIDTH), Arena(1 << 20)
    forwards = [lambda: F.silu(x) + 1, lambda: torch.softmax(x, -1) * 3]
    with torch.inference_mode():
        tapes = [record(forward, arena) for forward in forwards]
        for seed in range(4):
            refill(x, seed)
            played = tapes[seed % 2]
            assert isinstance(played, Tape)
            assert_same_bits(played.play(), forwards[seed % 2]())


def _in_words(x: Tensor) -> Tensor:
    return x * 2 if float(x.sum()) > 0 else x * 3


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (_in_words, "aten.item"),
        (lambda x: x[x > 0] * 2, "aten.index"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: x + torch.rand(WIDTH), "aten.rand"),
        (lambda x: F.dropout(x, 0.5, training=True), "dropout"),
        (lambda x: x.max(dim=0).values, "aten.max"),
        (lambda x: x, "not of its making"),
        (lambda x: x.view(5, 5), "RuntimeError"),
    ],
)  # fmt: skip
def test_what_cannot_be_played_is_refused_with_the_reason(forward: Callable[[Tensor], Tensor], reason: str) -> None:
    x = torch.ones(ROWS, WIDTH)

    assert reason in refusal(lambda: forward(x))


class _Nothing(ctypes.Structure):
    _fields_ = [("none", ctypes.c_int64)]


KERNEL = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)


def test_kernels_wait_for_the_tape_and_their_failure_is_told() -> None:
    calls: list[int] = []

    def kernel(_: int) -> int:
        calls.append(1)
        return int(len(calls) == 2)

    function, x = KERNEL(kernel), torch.ones(3)

    def forward() -> Tensor:
        tape.call(function, _Nothing())
        return x.cos()

    played = taped(forward)
    assert not calls
    with torch.inference_mode():
        played.play()
        assert len(calls) == 1
        with pytest.raises(MemoryError, match="found no memory"):
            played.play()


def test_after_a_refusal_kernels_run_again() -> None:
    x, strips = torch.ones(2, 256), Strips.of(BIG)
    expected = linear(x, strips)

    refusal(lambda: linear(x, strips).view(7, 7))

    assert_same_bits(linear(x, strips), expected)


def test_other_threads_compute_meanwhile() -> None:
    x, strips = torch.ones(2, 256), Strips.of(BIG)
    expected, found = linear(x, strips), []

    def forward() -> Tensor:
        other = threading.Thread(target=lambda: found.append(linear(x, strips)))
        other.start()
        other.join()
        return x.cos()

    assert taped(forward).num_calls == 1
    assert_same_bits(found[0], expected)


def test_constants_that_only_kernels_know_live_on() -> None:
    x, strips = torch.zeros(2, 256), Strips.of(BIG)

    def forward() -> Tensor:
        return linear(x + 1, strips, torch.tensor([0.5]).repeat(256))

    played = taped(forward)
    with torch.inference_mode():
        assert_same_bits(played.play(), forward())
