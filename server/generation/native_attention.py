"""Builds, checks and calls attention.c and prefill.c: attention over pages of keys and values, on the CPU.

Without a compiler, or on a GPU, or where the check fails, the torch forms of attention.py serve; `status()` says which
and why. ESPALIER_NATIVE=0 switches the kernel off.
"""

import ctypes
import functools
import itertools
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters_store import compiled, tape
from adapters_store.compiled import Status
from adapters_store.packing import Scoring
from server.generation.pages import PAGE

_SOURCES = [Path(__file__).with_name(name) for name in ("attention.c", "prefill.c")]
_INCLUDED = [Path(__file__).with_name("attention.h"), Path(compiled.__file__).with_name("prefetch.h")]
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


class _Call(ctypes.Structure):
    """The C struct `call`."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                *("query", "query_head", "query_row", "key", "key_head", "key_row", "value", "value_head", "value_row"),
                *("keys", "values", "out", "pages", "kv_heads", "group", "d", "d_v"),
                *("tables", "most", "rows", "lengths", "num_threads", "window"),
            )
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class _Appended(ctypes.Structure):
    """The C struct `appended`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("new", "places", "pages")),
        *((name, ctypes.c_int64) for name in ("head_stride", "token_stride", "tokens", "num_pages", "heads", "bytes")),
    ]


@dataclass(frozen=True)
class _Kernel:
    """The functions of the library. They release the GIL while they run, and share torch's threads (same soname)."""

    of_decode: dict[torch.dtype, Callable[..., int]]
    of_prefill: dict[torch.dtype, Callable[..., int]]
    of_append: Callable[..., int]

    @staticmethod
    def of(path: Path) -> "_Kernel":
        library = ctypes.CDLL(str(path))
        decode, prefill = (
            {dtype: getattr(library, f"attention_{name}_{suffix}") for dtype, suffix in _SUFFIX.items()}
            for name in ("decode", "prefill")
        )
        for function in (*decode.values(), *prefill.values(), library.attention_append):
            function.restype = ctypes.c_int64
        return _Kernel(decode, prefill, library.attention_append)

    def decode(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, keys: Tensor, values: Tensor,
        tables: Tensor, lengths: Tensor, scoring: Scoring,
    ) -> Tensor:  # fmt: skip
        """See the function of this name."""
        assert len(lengths) == query.shape[1], "a sequence for each row"
        return self._attended(self.of_decode, query, key, value, keys, values, tables, lengths, scoring)

    def prefill(
        self, query: Tensor, keys: Tensor, values: Tensor, table: Tensor, length: int, scoring: Scoring
    ) -> Tensor:
        """See the function of this name."""
        lengths = torch.tensor([length])
        return self._attended(self.of_prefill, query, None, None, keys, values, table[None], lengths, scoring)

    def _attended(
        self, functions: dict[torch.dtype, Callable[..., int]], query: Tensor, key: Tensor | None, value: Tensor | None,
        keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scoring: Scoring,
    ) -> Tensor:  # fmt: skip
        (heads, rows, d), (num_pages, kv_heads, _, d_v), (sequences, most) = query.shape, values.shape, tables.shape
        out, dtype = values.new_empty(rows, heads, d_v), keys.dtype
        call = _Call(
            *_located(query, (heads, rows, d), dtype),
            *_located(key, (kv_heads, rows, d), dtype), *_located(value, (kv_heads, rows, d_v), dtype),
            _address(keys, (num_pages, kv_heads, PAGE, d), dtype),
            _address(values, (num_pages, kv_heads, PAGE, d_v), dtype),
            out.data_ptr(), num_pages, kv_heads, heads // kv_heads, d, d_v,
            _address(tables, (sequences, most), torch.int64), most, rows, _address(lengths, (sequences,), torch.int64),
            torch.get_num_threads(), scoring.window or 0, scoring.scale, scoring.softcap or 0.0,
        )  # fmt: skip
        failed = tape.call(functions[dtype], call)
        assert not failed, "tokens are in no page, heads are too long, or no memory is left"
        return out

    def append(self, new: Tensor, pages: Tensor, places: Tensor) -> None:
        """Write one of keys and values; see the function of this name."""
        (num_pages, kv_heads, _, d), tokens, size = pages.shape, len(places), pages.element_size()
        start, head_stride, token_stride = _located(new, (kv_heads, tokens, d), pages.dtype)
        kept = _address(pages, (num_pages, kv_heads, PAGE, d), pages.dtype)
        call = _Appended(
            start, _address(places, (tokens,), torch.int64), kept, head_stride * size, token_stride * size, tokens,
            num_pages, kv_heads, d * size,
        )  # fmt: skip
        failed = tape.call(self.of_append, call)
        assert not failed, "places name tokens that are in no page"


def status() -> Status:
    """Which form of attention serves on the CPU."""
    return _load()[1]


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """True if the kernel can attend over pages of this dtype on this device."""
    return device.type == "cpu" and dtype in _SUFFIX and _load()[1].active


def decode(
    query: Tensor, key: Tensor | None, value: Tensor | None, keys: Tensor, values: Tensor,
    tables: Tensor, lengths: Tensor, scoring: Scoring,
) -> Tensor:  # fmt: skip
    """Write each row's new key and value into its last page, and attend from it to all of its sequence.

    query: (heads, rows, d); key: (kv_heads, rows, d) and value: (kv_heads, rows, d_v), or None if they are in pages
    already; any strides but the last dimension's. keys: (pages, kv_heads, PAGE, d) and values likewise with d_v,
    contiguous. tables: (rows, most pages) int64; lengths: (rows,) int64 with the new token. Returns (rows, heads, d_v),
    as attention.attend_rows has it.
    """
    return _kernel().decode(query, key, value, keys, values, tables, lengths, scoring)


def prefill(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, length: int, scoring: Scoring) -> Tensor:
    """Attend causally from the last tokens of one sequence, which are in pages already, to all of it.

    query: (heads, count, d) of the last `count` of its `length` tokens; table: (pages,) int64; keys and values as
    `decode` has them. Returns (count, heads, d_v): attention.attend_chunk's, tokens first.
    """
    return _kernel().prefill(query, keys, values, table, length, scoring)


def append(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> None:
    """Write new keys and values into pages, in place: token t into page places[t] // PAGE at places[t] % PAGE.

    key: (kv_heads, tokens, d) and value: (kv_heads, tokens, d_v) with any strides but the last dimension's;
    keys: (pages, kv_heads, PAGE, d), values: (pages, kv_heads, PAGE, d_v), contiguous; places: (tokens,) int64.
    """
    for new, pages in ((key, keys), (value, values)):
        _kernel().append(new, pages, places)


def _kernel() -> _Kernel:
    kernel = _load()[0]
    assert kernel is not None, "asked for what supports() denies"
    return kernel


def _address(part: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Of contiguous numbers; the kernel would read past anything else."""
    assert (part.shape, part.dtype, part.is_contiguous()) == (shape, dtype, True), "shape, dtype and order as agreed"
    return part.data_ptr()


def _located(part: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int, int]:
    """Address, and strides of heads and of tokens; zeros for None."""
    if part is None:
        return 0, 0, 0
    head_stride, token_stride, unit = part.stride()
    assert (part.shape, part.dtype, unit) == (shape, dtype, 1), "shape and dtype as agreed, a head's elements together"
    return part.data_ptr(), head_stride, token_stride


@functools.cache
@tape.apart
def _load() -> tuple[_Kernel | None, Status]:
    """The kernel and its status; built at the first call."""
    try:
        kernel = _Kernel.of(compiled.build("attention", _SOURCES, included=_INCLUDED))
    except compiled.FAILURES as error:
        return None, Status(False, f"torch forms attend: {compiled.reason(error)}")
    if not _agrees_with_torch(kernel):
        return None, Status(False, "built, but its results differ from torch's; torch forms attend")
    return kernel, Status(True, f"native attention for {platform.machine()}, checked against torch")


def _agrees_with_torch(kernel: _Kernel) -> bool:
    """Odd sizes, each dtype, with and without window and softcap: both ways to attend, against plain torch."""
    generator = torch.Generator().manual_seed(0)
    lengths, order = [1, 40, 300], torch.randperm(30, generator=generator)
    for dtype, (window, softcap) in itertools.product(_SUFFIX, ((None, None), (21, 3.0))):
        scoring = Scoring(0.2, is_causal=True, window=window, softcap=softcap)
        query, key, value = (
            torch.randn(n, 3, d, generator=generator).to(dtype) for n, d in ((6, 43), (2, 43), (2, 70))
        )
        keys, values = (torch.randn(30, 2, PAGE, d, generator=generator).to(dtype) for d in (43, 70))
        tables = torch.stack([order[:20], order[1:21], order[10:]])
        places = torch.tensor([int(tables[n, (x - 1) // PAGE]) * PAGE + (x - 1) % PAGE for n, x in enumerate(lengths)])
        kernel.append(key, keys, places)
        kernel.append(value, values, places)
        rows = [(tables[n], length) for n, length in enumerate(lengths)]
        last = [(tables[2], length) for length in (298, 299, 300)]
        for found, seen in (
            (kernel.decode(query, key, value, keys, values, tables, torch.tensor(lengths), scoring), rows),
            (kernel.prefill(query, keys, values, tables[2], 300, scoring), last),
        ):
            expected = [
                _attended(query[:, row], keys[table], values[table], length, scoring)
                for row, (table, length) in enumerate(seen)
            ]
            if not torch.allclose(found.float(), torch.stack(expected), atol=2e-2 if dtype == torch.bfloat16 else 1e-4):
                return False
    return True


def _attended(query: Tensor, keys: Tensor, values: Tensor, length: int, scoring: Scoring) -> Tensor:
    """(heads, d_v) float32 of one row (heads, d) whose pages are keys and values."""
    first, group = max(0, length - (scoring.window or length)), query.shape[0] // keys.shape[1]
    key, value = (
        part.float().transpose(0, 1).flatten(1, 2)[:, first:length].repeat_interleave(group, 0)
        for part in (keys, values)
    )  # (heads, tokens, d)
    scores = scoring.scale * (key @ query.float()[:, :, None])[:, :, 0]
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    return (scores.softmax(-1)[:, None] @ value)[:, 0]
