"""The bridge between calls on the event loop and the batcher on the engine's thread.

The thread runs one step after the other as jobs of its own queue, so encode batches, uploads and evictions get their
turn between steps. Tokens come back once per step; text is made of them on the event loop while the next step runs.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from weakref import WeakValueDictionary

from adapters_store.mixing import Mix
from server import logs
from server.engine import Engine
from server.errors import BadInputError, ContextLengthError, DrainingError, OverloadedError
from server.generation.batcher import Batcher
from server.generation.generation import Generation, Ticket
from server.generation.sequence import Event, TokenSequence
from server.metrics import Metrics

log = logging.getLogger("espalier")


class Generator:
    """Sequences on their way through one batcher. Methods are for the event loop unless they say otherwise."""

    def __init__(
        self, engine: Engine, batcher: Batcher, metrics: Metrics, *, end_ids: frozenset[int], queue_tokens: int
    ) -> None:
        """end_ids: tokens that end a text; queue_tokens: of prompts that have not begun to be answered, at most."""
        self.batcher = batcher
        self.end_ids = end_ids
        self.max_length = batcher.decoder.max_length
        self.vocab_size = batcher.decoder.language.vocab_size
        self.num_embeddings = batcher.decoder.num_embeddings
        self._engine = engine
        self._metrics = metrics
        self._queue_tokens = queue_tokens
        self._tickets: set[Ticket] = set()
        self._owner: dict[TokenSequence, Generation] = {}
        self._mixes: WeakValueDictionary[object, Mix] = WeakValueDictionary()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._is_going = False  # the engine's thread's own

    def check(self, ids: Sequence[int], max_tokens: int) -> None:
        """Refuse a prompt that cannot be continued so far. Raises BadInputError or ContextLengthError."""
        if not ids:
            raise BadInputError("the prompt is empty, and this backbone's tokenizer makes no tokens of it")
        if not all(0 <= token < self.num_embeddings for token in ids):
            raise BadInputError(f"token ids must be between 0 and {self.num_embeddings - 1}")
        if len(ids) + max_tokens > self.max_length:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens and {max_tokens} more are asked for; the context holds "
                f"{self.max_length} (--max-length, --kv-mb): shorten the prompt or lower max_tokens"
            )

    def admit(self, tokens: int) -> Ticket:
        """Let in a call whose prompts have so many tokens. Raises OverloadedError or DrainingError at once."""
        if self._draining:
            raise DrainingError("the server is stopping; ask another replica")
        waiting = self.waiting_tokens
        if waiting and waiting + tokens > self._queue_tokens:
            self._metrics.rejected.inc()
            wait_s = max(1, round(waiting * self.batcher.counters.seconds_per_token))
            raise OverloadedError(
                f"prompts of {waiting} tokens are waiting, the queue holds {self._queue_tokens}; "
                f"try again in {wait_s} s", wait_s,
            )  # fmt: skip
        ticket = Ticket(tokens)
        self._tickets.add(ticket)
        self._idle.clear()
        return ticket

    def submit(self, generation: Generation) -> None:
        """Have the sequences of an admitted call run."""
        loop = asyncio.get_running_loop()
        sequences = generation.sequences
        self._owner |= dict.fromkeys(sequences, generation)
        self._engine.post(lambda: self._add(sequences, loop))

    def interned(self, mix: Mix | None) -> Mix | None:
        """One object for all equal mixes in flight, by which a step sees that neighbours share their adapters."""
        return None if mix is None else self._mixes.setdefault(mix.key, mix)

    def let_go(self, ticket: Ticket, generation: Generation | None, then: Callable[[], None]) -> None:
        """Forget a call, finished or not; `then` runs once nothing of it can run any more."""
        mine = generation.sequences if generation else ()
        running = [sequence for sequence in mine if self._owner.pop(sequence, None)]
        if not running:
            self._gone(ticket, then)
            return
        loop = asyncio.get_running_loop()

        def cancel() -> None:
            self.batcher.cancel(running)
            loop.call_soon_threadsafe(self._gone, ticket, then)

        self._engine.post(cancel)

    def _gone(self, ticket: Ticket, then: Callable[[], None]) -> None:
        self._tickets.discard(ticket)
        then()
        if not self._tickets:
            self._idle.set()

    @property
    def waiting_tokens(self) -> int:
        """Tokens of admitted prompts that have not begun to be answered."""
        return sum(ticket.tokens for ticket in self._tickets)

    @property
    def num_active(self) -> int:
        """Calls admitted and not yet let go: 0 when nothing is in flight."""
        return len(self._tickets)

    def _add(self, sequences: Iterable[TokenSequence], loop: asyncio.AbstractEventLoop) -> None:
        """On the engine's thread: let sequences wait for their turn, and go if nothing was going."""
        for sequence in sequences:
            self.batcher.add(sequence)
        if not self._is_going:
            self._is_going = True
            self._engine.post(lambda: self._step(loop))

    def _step(self, loop: asyncio.AbstractEventLoop) -> None:
        """On the engine's thread: one step, then the next behind whatever else was asked for meanwhile."""
        try:
            events = self.batcher.step()
        except Exception as error:  # noqa: BLE001  # a bug of ours outside of any forward; still, every request must end
            events = self.batcher.end_all(error)
        if events:
            loop.call_soon_threadsafe(self._deliver, events)
        self._is_going = self.batcher.has_work
        if self._is_going:
            self._engine.post(lambda: self._step(loop))

    def _deliver(self, events: Sequence[Event]) -> None:
        """Give every token to the call it belongs to."""
        stopped: list[TokenSequence] = []
        for event in events:
            generation = self._owner.get(event.sequence)
            if event.finish_reason or event.error:
                self._owner.pop(event.sequence, None)
            if event.error:
                self._note(event.error)
            if generation and self._is_stopped_by(generation, event):
                stopped.append(event.sequence)
        self._metrics.generated_tokens.inc(len(events))
        if stopped:  # they stay owned until their call lets them go: their adapters are in use until they are cancelled
            self._engine.post(lambda: self.batcher.cancel(stopped))

    def _is_stopped_by(self, generation: Generation, event: Event) -> bool:
        """Hand a token on; True if its sequence is not to go on. A tokenizer that fails ends its own call only."""
        try:
            return generation.receive(event)
        except Exception as error:  # noqa: BLE001  # foreign code
            self._note(error)
            generation.fail(error)
            return True

    def _note(self, error: Exception) -> None:
        self._metrics.forward_failures.inc()
        logs.note(log, "generation_failed", logging.ERROR, trace=logs.trace_of(error.__cause__ or error))

    async def drain(self, timeout_s: float) -> bool:
        """Admit nothing new, finish what was admitted. False if time ran out first."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def stop(self) -> None:
        """Tell those who still wait that nothing will come."""
        for generation in set(self._owner.values()):
            generation.fail(DrainingError("the server stopped before this text was finished"))
