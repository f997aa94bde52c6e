"""Batching without a timer: a batch is what queued while the last forward ran.

An idle server adds no latency, a busy one fills its batches, and there is nothing to tune but the token budget. The
queue is bounded in tokens; beyond, a call is refused at once. Rows whose client has left are skipped when a batch is
formed. Every row ends with an answer or an error.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from server import logs
from server.engine import Engine, Row
from server.errors import BatchFailedError, DrainingError, OverloadedError
from server.metrics import Metrics

log = logging.getLogger("espalier")


@dataclass(frozen=True)
class Answer:
    """A row's logits or pooled state, and what its batch cost."""

    values: list[float]
    queue_s: float
    forward_s: float
    batch_rows: int


@dataclass(eq=False)
class Waiting:
    """A row in the queue with its reply channel."""

    row: Row
    since: float
    reply: "asyncio.Future[Answer]"

    @property
    def tokens(self) -> int:
        """Length of the row."""
        return len(self.row.ids)


@dataclass(eq=False)
class Admission:
    """A call that was let in. tokens: of its rows that are not in the queue yet."""

    tokens: int


class Scheduler:
    """The queue before one engine. Lives on one event loop."""

    def __init__(self, engine: Engine, metrics: Metrics, *, batch_tokens: int, queue_tokens: int) -> None:
        self._engine = engine
        self._metrics = metrics
        self.batch_tokens = batch_tokens
        self.queue_tokens = queue_tokens
        self._queue: deque[Waiting] = deque()
        self._tokens = 0  # of the rows in the queue
        self._coming = 0  # tokens of admitted calls whose rows are not in the queue yet
        self._calls = 0  # admitted and not yet answered
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._seconds_per_token = 0.0
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to run batches."""
        self._loop = asyncio.create_task(self._run())

    @contextmanager
    def admitted(self, tokens: int) -> Iterator[Admission]:
        """Room in the queue for a call of so many tokens, also while it waits for its adapters.

        Raises OverloadedError at once if there is none (an empty queue takes any call), DrainingError while stopping.
        What was admitted is answered, whatever comes.
        """
        if self._draining:
            raise DrainingError("the server is stopping; ask another replica")
        self._refuse_if_full(tokens)
        admission = Admission(tokens)
        self._coming += tokens
        self._calls += 1
        self._idle.clear()
        try:
            yield admission
        finally:
            self._coming -= admission.tokens
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    def _refuse_if_full(self, tokens: int) -> None:
        waiting = self._tokens + self._coming
        if not waiting or waiting + tokens <= self.queue_tokens:
            return
        self._metrics.rejected.inc()
        wait_s = max(1, round(waiting * self._seconds_per_token))
        raise OverloadedError(
            f"{waiting} tokens are waiting, the queue holds {self.queue_tokens}; try again in {wait_s} s", wait_s
        )

    async def submit(self, rows: Sequence[Row], admission: Admission) -> list[Answer]:
        """Answers of rows of an admitted call, which may run in one batch with any others.

        Cancelling skips the rows that have not run yet.
        """
        waiting = self._enqueue(rows, admission)
        try:
            return await asyncio.gather(*(one.reply for one in waiting))
        finally:
            for one in waiting:
                one.reply.cancel()

    def _enqueue(self, rows: Sequence[Row], admission: Admission) -> list[Waiting]:
        loop = asyncio.get_running_loop()
        now = loop.time()
        waiting = [Waiting(row, now, loop.create_future()) for row in rows]
        tokens = sum(one.tokens for one in waiting)
        self._coming -= tokens
        admission.tokens -= tokens
        self._queue.extend(waiting)
        self._tokens += tokens
        self._arrived.set()
        return waiting

    async def _run(self) -> None:
        """Schedule, run, answer; for ever."""
        while True:
            batch = self._take()
            if batch:
                await self._forward(batch)
            else:
                self._arrived.clear()
                await self._arrived.wait()

    def _take(self) -> list[Waiting]:
        """The next batch: the oldest row, then whatever else fits the budget."""
        encoder = self._engine.encoder
        self._skip_left()
        chosen: list[Waiting] = []
        lengths: list[int] = []
        for one in self._candidates(encoder.is_packed):
            run = encoder.tokens_run([*lengths, one.tokens])
            if chosen and run > self.batch_tokens:
                continue
            chosen.append(one)
            lengths.append(one.tokens)
            if run >= self.batch_tokens:
                break
        taken = set(map(id, chosen))
        self._queue = deque(one for one in self._queue if id(one) not in taken)
        self._tokens -= sum(lengths)
        self._gauge()
        return chosen

    def _candidates(self, is_packed: bool) -> list[Waiting]:
        """Rows in the order in which a batch considers them; where padding costs, those like the oldest one first."""
        window = list(islice(self._queue, self.batch_tokens))
        if is_packed or not window:
            return window
        return [window[0], *sorted(window[1:], key=lambda one: abs(one.tokens - window[0].tokens))]

    def _skip_left(self) -> None:
        """Forget rows whose client has left."""
        kept = deque(one for one in self._queue if not one.reply.done())
        left = len(self._queue) - len(kept)
        if left:
            self._metrics.rows_skipped.inc(left)
            self._queue = kept
            self._tokens = sum(one.tokens for one in kept)

    async def _forward(self, batch: list[Waiting]) -> None:
        """Run a batch; if that fails it fails its own rows, and the server goes on."""
        now = asyncio.get_running_loop().time()
        rows = [one.row for one in batch]
        try:
            done = await self._engine.run(lambda: self._engine.forward(rows))
            self._measure(batch, done.seconds, done.mixes)
            answers = [
                Answer(v, now - one.since, done.seconds, len(batch)) for one, v in zip(batch, done.outputs, strict=True)
            ]
        except Exception as error:  # noqa: BLE001  # a batch that fails fails its own rows; the server goes on
            self._metrics.forward_failures.inc()
            logs.note(log, "forward_failed", logging.ERROR, rows=len(batch), trace=logs.trace_of(error))
            for one in batch:
                if not one.reply.done():
                    one.reply.set_exception(BatchFailedError("the forward pass failed; the server's log says why"))
            return
        for one, answer in zip(batch, answers, strict=True):
            if not one.reply.done():
                one.reply.set_result(answer)

    def _measure(self, batch: list[Waiting], seconds: float, mixes: int) -> None:
        tokens = sum(one.tokens for one in batch)
        self._seconds_per_token = 0.8 * self._seconds_per_token + 0.2 * seconds / max(tokens, 1)
        self._metrics.forwards.inc()
        self._metrics.rows.inc(len(batch))
        self._metrics.forward_seconds.observe(seconds)
        self._metrics.batch_rows.observe(len(batch))
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.batch_mixes.observe(mixes)

    def _gauge(self) -> None:
        self._metrics.queue_rows.set(len(self._queue))
        self._metrics.queue_tokens.set(self._tokens)

    async def drain(self, timeout_s: float) -> bool:
        """Admit nothing new, finish what was admitted. False if time ran out first."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def stop(self) -> None:
        """Stop running batches; what still waits is told so."""
        if self._loop:
            self._loop.cancel()
        for one in self._queue:
            if not one.reply.done():
                one.reply.set_exception(DrainingError("the server stopped before this row could run"))
        self._queue.clear()
