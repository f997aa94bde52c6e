"""Batching without a timer: a batch is what queued while the last forward ran.

An idle server adds no latency, a busy one fills its batches, and there is nothing to tune but the token budget. The
queue is bounded in tokens; beyond, a call is refused at once. Rows whose client has left are skipped when a batch is
formed. Every row ends with an answer or an error.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from server.engine import Engine, Row
from server.errors import DrainingError, OverloadedError
from server.metrics import Metrics


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
    reply: "asyncio.Future[Answer]" = field(init=False)

    @property
    def tokens(self) -> int:
        """Length of the row."""
        return len(self.row.ids)


class Scheduler:
    """The queue before one engine. Lives on one event loop."""

    def __init__(self, engine: Engine, metrics: Metrics, *, batch_tokens: int, queue_tokens: int) -> None:
        self._engine = engine
        self._metrics = metrics
        self.batch_tokens = batch_tokens
        self.queue_tokens = queue_tokens
        self._queue: deque[Waiting] = deque()
        self._tokens = 0
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._seconds_per_token = 0.0
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to run batches."""
        self._loop = asyncio.create_task(self._run())

    async def submit(self, rows: Sequence[Row]) -> list[Answer]:
        """Answers of rows, which may run in one batch with any others.

        Raises OverloadedError at once if they do not fit in the queue (an empty queue takes any call), DrainingError
        while stopping. Cancelling skips the rows that have not run yet.
        """
        if self._draining:
            raise DrainingError("the server is stopping; ask another replica")
        tokens = sum(len(row.ids) for row in rows)
        if self._queue and self._tokens + tokens > self.queue_tokens:
            self._metrics.rejected.inc()
            wait_s = max(1, round(self._tokens * self._seconds_per_token))
            raise OverloadedError(f"{self._tokens} tokens are waiting, the queue holds {self.queue_tokens}; try again in {wait_s} s", wait_s)
        waiting = self._enqueue(rows, tokens)
        try:
            return await asyncio.gather(*(one.reply for one in waiting))
        finally:
            for one in waiting:
                one.reply.cancel()

    def _enqueue(self, rows: Sequence[Row], tokens: int) -> list[Waiting]:
        loop = asyncio.get_running_loop()
        waiting = [Waiting(row, loop.time()) for row in rows]
        for one in waiting:
            one.reply = loop.create_future()
        self._queue.extend(waiting)
        self._tokens += tokens
        self._idle.clear()
        self._arrived.set()
        return waiting

    async def _run(self) -> None:
        """Schedule, run, answer; for ever."""
        while True:
            batch = self._take()
            if not batch:
                if not self._queue:
                    self._idle.set()
                    self._arrived.clear()
                    await self._arrived.wait()
                continue
            await self._forward(batch)

    def _take(self) -> list[Waiting]:
        """The next batch: the oldest row, then whatever else fits the budget."""
        encoder = self._engine.encoder
        self._skip_left()
        chosen: list[Waiting] = []
        lengths: list[int] = []
        for one in self._candidates(encoder.is_packed):
            if chosen and encoder.tokens_run([*lengths, one.tokens]) > self.batch_tokens:
                continue
            chosen.append(one)
            lengths.append(one.tokens)
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
        now = asyncio.get_running_loop().time()
        try:
            done = await self._engine.run(lambda: self._engine.forward([one.row for one in batch]))
        except Exception as error:  # noqa: BLE001  # a batch that fails fails its own rows, and the server goes on
            for one in batch:
                if not one.reply.done():
                    one.reply.set_exception(error)
            return
        for one, values in zip(batch, done.outputs, strict=True):
            if not one.reply.done():
                one.reply.set_result(Answer(values, now - one.since, done.seconds, len(batch)))
        self._measure(batch, done.seconds, done.mixes)

    def _measure(self, batch: list[Waiting], seconds: float, mixes: int) -> None:
        tokens = sum(one.tokens for one in batch)
        self._seconds_per_token = 0.8 * self._seconds_per_token + 0.2 * seconds / tokens
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
        """Take nothing new, finish what is queued. False if time ran out first."""
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
