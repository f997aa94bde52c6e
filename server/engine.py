"""The one thread that touches the backbone: forward passes, and the swaps between them.

Everything that reads or changes what is on the device goes through `run`, in order, so a forward never sees an adapter
half put. The slow parts (disk, checks, tokenizing) happen elsewhere.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from adapters_store.encoder import Encoder
from adapters_store.mixing import Mix
from adapters_store.primitives import head as head_primitive
from adapters_store.primitives.head import Head

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Row:
    """One text ready to run. head None: answer with the pooled state itself."""

    ids: Sequence[int]
    mix: Mix | None
    pooling: str
    head: Head | None


@dataclass(frozen=True, eq=False)
class Forwarded:
    """One forward's answers: per row its logits (labels,) or its pooled state (hidden_size,), as lists of float."""

    outputs: list[list[float]]
    seconds: float
    mixes: int


class Engine:
    """Runs batches on its own thread."""

    def __init__(self, encoder: Encoder, threads: int | None = None) -> None:
        self.encoder = encoder
        self._threads = threads
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine", initializer=self._prepare)

    def _prepare(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        torch.set_grad_enabled(False)  # per thread

    async def run(self, call: Callable[[], Result]) -> Result:
        """What call gives, run between forwards."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def post(self, call: Callable[[], object]) -> None:
        """Have call run between forwards, in the order of asking, without waiting for it."""
        with contextlib.suppress(RuntimeError):  # closed: nothing runs on this device any more
            self._thread.submit(call)

    def forward(self, rows: Sequence[Row]) -> Forwarded:
        """Answers of rows in one pass of the backbone. Call through `run`."""
        start = time.perf_counter()
        pooled = self.encoder.pool([row.ids for row in rows], [row.mix for row in rows], [row.pooling for row in rows])
        outputs = [state.tolist() if row.head is None else [] for row, state in zip(rows, pooled, strict=True)]
        with_head = [i for i, row in enumerate(rows) if row.head is not None]
        heads = [row.head for row in rows if row.head is not None]
        if heads:
            logits = head_primitive.batched(heads, pooled[with_head])
            for i, row_logits in zip(with_head, logits, strict=True):
                outputs[i] = row_logits.tolist()
        mixes = len({id(row.mix) for row in rows if row.mix})
        return Forwarded(outputs, time.perf_counter() - start, mixes)

    def close(self) -> None:
        """Finish what runs and stop the thread."""
        self._thread.shutdown(wait=True)
