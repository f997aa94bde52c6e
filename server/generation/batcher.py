"""Continuous batching in three verbs: schedule, run, postprocess.

schedule: every decoding sequence its next token, then prompts in chunks within the step's token budget; a waiting
sequence is admitted once there are pages for all it has. If pages run out, the youngest running sequence gives its own
up and is computed again later: it goes on where it was, nothing is lost. What a prompt's chunk fills may be shared
from then on, by sequences of the same step too: whatever runs a step keeps its chunks' keys and values before it looks.
run: one forward. postprocess: choose tokens, let finished sequences go, tell what happened.

Lives on the engine's thread; nothing here is locked.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from server.errors import BatchFailedError, NotFiniteAnswerError
from server.generation.decoder import Decoder
from server.generation.pages import PagePool
from server.generation.plan import Chunk, Plan
from server.generation.sampling import Chosen, choose
from server.generation.sequence import Event, TokenSequence


@dataclass
class Counters:
    """What the batcher did so far. Seconds are of the engine's thread."""

    steps: int = 0
    tokens: int = 0  # computed, prompts included
    preemptions: int = 0
    cached_tokens: int = 0
    step_s: float = 0.0
    forward_s: float = 0.0
    sampling_s: float = 0.0

    @property
    def seconds_per_token(self) -> float:
        """Of all steps so far."""
        return self.step_s / self.tokens if self.tokens else 0.0


class Batcher:
    """The sequences of one decoder: those that wait and those that run."""

    def __init__(self, decoder: Decoder, *, step_tokens: int = 512, max_sequences: int = 256) -> None:
        self.decoder = decoder
        self.step_tokens = step_tokens
        self.max_sequences = max_sequences
        self.pool = PagePool(decoder.memory.num_pages)
        self.waiting: deque[TokenSequence] = deque()
        self.running: list[TokenSequence] = []  # oldest first
        self.counters = Counters()

    @property
    def has_work(self) -> bool:
        """True while a step would do something."""
        return bool(self.running or self.waiting)

    def add(self, sequence: TokenSequence) -> None:
        """Let a sequence wait for its turn. Its prompt is shorter than the decoder's max_length."""
        self.waiting.append(sequence)

    def cancel(self, sequences: Iterable[TokenSequence]) -> None:
        """Forget sequences, wherever they are; those that ended already are no trouble."""
        for sequence in sequences:
            sequence.is_cancelled = True
            self.pool.release(sequence.give_up())
        self.running = [sequence for sequence in self.running if not sequence.is_cancelled]
        self.waiting = deque(sequence for sequence in self.waiting if not sequence.is_cancelled)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Schedule, run, postprocess; what happened to whom. A forward that fails ends its own sequences only."""
        if not self.has_work:
            return []
        start, before = time.perf_counter(), self.decoder.forward_s
        chunks = self._schedule()
        plan = Plan(chunks, self.decoder.encoder.device)
        try:
            events = self._postprocess(plan, self._choose(plan))
        except Exception as error:  # noqa: BLE001  # whatever it was, the other sequences go on
            return self._fail([chunk.sequence for chunk in chunks], error)
        self._count(plan, time.perf_counter() - start, self.decoder.forward_s - before)
        return events

    def _schedule(self) -> list[Chunk]:
        decoding = [sequence for sequence in self.running if sequence.remaining == 1]
        chunks = [Chunk(sequence, sequence.computed, 1) for sequence in decoding if self._has_room(sequence)]
        budget = self.step_tokens - len(chunks)
        for sequence in self.running:
            if sequence.remaining > 1 and budget > 0:
                budget -= self._take_chunk(sequence, budget, chunks)
        while budget > 0 and self.waiting and len(self.running) < self.max_sequences and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            budget -= self._take_chunk(sequence, budget, chunks)
        return chunks

    def _take_chunk(self, sequence: TokenSequence, budget: int, chunks: list[Chunk]) -> int:
        """Add what fits of a sequence's tokens; how many."""
        chunk = Chunk(sequence, sequence.computed, min(budget, sequence.remaining))
        chunks.append(chunk)
        if chunk.count > 1:  # a single token may be kept only when its own turn to look comes
            sequence.name_pages(chunk.end, self.pool.name)
        return chunk.count

    def _has_room(self, sequence: TokenSequence) -> bool:
        """True once its next token has a place, if need be at the cost of the youngest; False if that is itself."""
        if not sequence.pages:
            return False  # an older one has just taken its pages
        missing = sequence.missing_pages(len(sequence.ids))
        while missing and (pages := self.pool.take(missing, sequence.pages[-1])) is None:
            youngest = self.running.pop()
            self._preempt(youngest)
            if youngest is sequence:
                return False
        if missing:
            sequence.pages += pages or []
        return True

    def _preempt(self, sequence: TokenSequence) -> None:
        """Its pages go to others; it will be computed again from its tokens."""
        self.pool.release(sequence.give_up())
        self.waiting.appendleft(sequence)
        self.counters.preemptions += 1

    def _admit(self, sequence: TokenSequence) -> bool:
        """True if it has pages for all its tokens now, and the running ones have a page left for each of them."""
        shared = self.pool.share(sequence.shareable_keys())
        sequence.take_over(shared)
        missing = sequence.missing_pages(len(sequence.ids))
        if self.running and missing + len(self.running) > self.pool.num_available:
            self.pool.release(sequence.give_up())
            return False
        pages = self.pool.take(missing, shared[-1] if shared else None)
        if pages is None:
            raise AssertionError("our bug: a lone sequence longer than all pages")
        sequence.pages = shared + pages
        if not sequence.is_begun:
            sequence.is_begun = True
            self.counters.cached_tokens += sequence.cached
        return True

    def _choose(self, plan: Plan) -> list[Chosen | None]:
        """Run the plan: the next token of each sequence whose tokens are all computed; None without a finite logit."""
        likeliest = self.decoder.likeliest(plan) if plan.takes_likeliest else None
        if likeliest is not None:
            return [None if token < 0 else Chosen(token) for token in likeliest.tolist()]
        logits = self.decoder.forward(plan)
        start = time.perf_counter()
        finite = torch.isfinite(logits.amax(dim=-1)).tolist()
        draws = [chunk.sequence.draw for chunk in plan.chunks if chunk.is_last]
        if not all(finite):
            logits = logits[torch.tensor(finite, device=logits.device)]
        chosen = iter(choose(logits, list(itertools.compress(draws, finite))))
        self.counters.sampling_s += time.perf_counter() - start
        return [next(chosen) if is_finite else None for is_finite in finite]

    def _postprocess(self, plan: Plan, chosen: list[Chosen | None]) -> list[Event]:
        """What became of the sequences: the next tokens, and why any was the last one."""
        for chunk in plan.chunks:
            chunk.sequence.computed = chunk.end
            chunk.sequence.name_pages(chunk.end, self.pool.name)
        ended = [chunk.sequence for chunk in plan.chunks if chunk.is_last]
        if not ended:
            return []
        both = list(zip(ended, chosen, strict=True))
        events = self._not_finite([sequence for sequence, one in both if one is None])
        events += [self._event(sequence, one) for sequence, one in both if one is not None]
        self._let_go([event.sequence for event in events if event.finish_reason or event.error])
        return events

    def _event(self, sequence: TokenSequence, chosen: Chosen) -> Event:
        sequence.ids.append(chosen.token)
        return Event(sequence, chosen, sequence.finish_reason(chosen.token, self.decoder.max_length))

    def _not_finite(self, sequences: list[TokenSequence]) -> list[Event]:
        """What became of sequences without a number to choose by: errors, or another try.

        Attention weighs what it must not see with 0, and 0 times infinity is no number: one token that overflows spoils
        the keys and values of the tokens before it in its chunk. So nobody may share these pages any more, and who did
        is computed again from its own tokens alone.
        """
        for sequence in sequences:
            self.pool.forget(sequence.pages)
        again = [sequence for sequence in sequences if sequence.has_shared]
        self._let_go(again)
        for sequence in again:
            sequence.salt = None
        self.waiting.extendleft(reversed(again))
        error = NotFiniteAnswerError(
            "the composition gives NaN or infinity: the weights, or the adapters, are too large"
        )
        return [Event(sequence, None, error=error) for sequence in sequences if sequence not in again]

    def _let_go(self, sequences: list[TokenSequence]) -> None:
        """Release what ended sequences hold."""
        for sequence in sequences:
            self.pool.release(sequence.give_up())
        if sequences:
            gone = set(map(id, sequences))
            self.running = [sequence for sequence in self.running if id(sequence) not in gone]

    def end_all(self, error: Exception) -> list[Event]:
        """End every sequence, because scheduling itself went wrong."""
        sequences = [*self.running, *self.waiting]
        self.waiting.clear()
        return self._fail(sequences, error)

    def _fail(self, sequences: list[TokenSequence], error: Exception) -> list[Event]:
        """End the sequences of a step that failed; what their pages hold is not known."""
        for sequence in sequences:
            self.pool.forget(sequence.pages)
        self._let_go(sequences)
        failed = BatchFailedError("the forward pass failed; the server's log says why")
        failed.__cause__ = error
        return [Event(sequence, None, error=failed) for sequence in sequences]

    def _count(self, plan: Plan, step_s: float, forward_s: float) -> None:
        self.counters.steps += 1
        self.counters.tokens += plan.num_tokens
        self.counters.step_s += step_s
        self.counters.forward_s += forward_s
