"""One call's texts while they come: what routes read, tokens turned into text on the event loop."""

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from server.compose import Composed
from server.generation.sampling import Chosen, Sampling
from server.generation.sequence import Event, TokenSequence
from server.generation.text import TextStream
from server.metrics import Metrics


@dataclass(frozen=True)
class Stopping:
    """When a text ends. strings: before the first of them; token_ids: with the first of them."""

    max_tokens: int
    strings: tuple[str, ...] = ()
    token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False


@dataclass(frozen=True, eq=False)
class Wanted:
    """One prompt and how it is to be continued, n times."""

    ids: Sequence[int]
    composed: Composed
    sampling: Sampling
    stopping: Stopping
    n: int = 1


@dataclass(frozen=True)
class Delta:
    """More of one choice. index: prompt_index * n + choice. tokens: what the text was made of, without an end token."""

    index: int
    text: str
    tokens: tuple[Chosen, ...]
    finish_reason: Literal["stop", "length"] | None


@dataclass(eq=False)
class Ticket:
    """A call that was let in. tokens: of its prompts that have not begun to be answered."""

    tokens: int


@dataclass(eq=False)
class Choice:
    """One sequence on the event loop's side.

    tells_tokens: also deltas without text, for their log-probabilities. is_first: of its prompt.
    """

    index: int
    text: TextStream
    tells_tokens: bool
    is_first: bool
    num_tokens: int = 0
    is_done: bool = False


class Generation:
    """Deltas of all choices in the order of their making: `async for`, or `ready()` for all that are there."""

    def __init__(
        self, choices: Mapping[TokenSequence, Choice], ticket: Ticket, prompt_tokens: int, metrics: Metrics
    ) -> None:
        self.ticket = ticket
        self.prompt_tokens = prompt_tokens
        self._choices = choices
        self._metrics = metrics
        self._since = self._last = time.perf_counter()
        self._deltas: deque[Delta] = deque()
        self._arrived = asyncio.Event()
        self._error: Exception | None = None

    @property
    def sequences(self) -> list[TokenSequence]:
        """One per choice."""
        return list(self._choices)

    @property
    def tokens_by_choice(self) -> list[int]:
        """Tokens of each choice; one that ended a text counts, what came behind a stop string does not."""
        return [choice.num_tokens for choice in self._choices.values()]

    @property
    def completion_tokens(self) -> int:
        """Tokens generated for all choices."""
        return sum(self.tokens_by_choice)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that somebody else had computed. Each prompt counts once, as in `prompt_tokens`."""
        return sum(sequence.cached for sequence, choice in self._choices.items() if choice.is_first)

    @property
    def queue_s(self) -> float:
        """Seconds from admission to the first token of the last choice to begin."""
        return self._last - self._since

    def receive(self, event: Event) -> bool:
        """A token, or an error; True if a stop string ends the sequence, which the engine does not know yet."""
        choice = self._choices[event.sequence]
        if choice.is_done:
            return False
        if event.error or event.chosen is None:
            self.fail(event.error or AssertionError("our bug: an event without a token"))
            return False
        if not choice.num_tokens:
            self._note_first(event.sequence, choice)
        choice.num_tokens += 1
        text, reason = self._text(choice, event)
        choice.is_done = reason is not None
        tokens = () if event.chosen.token in event.sequence.end_ids else (event.chosen,)
        if text or reason or (tokens and choice.tells_tokens):
            self._deltas.append(Delta(choice.index, text, tokens, reason))
            self._arrived.set()
        return choice.is_done and event.finish_reason is None

    def _text(self, choice: Choice, event: Event) -> tuple[str, Literal["stop", "length"] | None]:
        """What a token adds to the text, and why it is the last one."""
        assert event.chosen is not None, "our bug: seen before"
        text = "" if event.chosen.token in event.sequence.end_ids else choice.text.feed(event.chosen.token)
        if choice.text.stopped:
            return text, "stop"
        return text + (choice.text.finish() if event.finish_reason else ""), event.finish_reason

    def _note_first(self, sequence: TokenSequence, choice: Choice) -> None:
        """A choice has its first token."""
        if choice.is_first:
            self.ticket.tokens -= sequence.num_prompt
        self._last = time.perf_counter()
        self._metrics.first_token_seconds.observe(self._last - self._since)

    def fail(self, error: Exception) -> None:
        """End the iteration with this error, behind what has come already."""
        self._error = self._error or error
        self._arrived.set()

    def ready(self) -> list[Delta]:
        """All deltas that are there."""
        deltas = list(self._deltas)
        self._deltas.clear()
        return deltas

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> Delta:
        """The next delta. Raises what ended the generation early."""
        while not self._deltas:
            if self._error:
                raise self._error
            if all(choice.is_done for choice in self._choices.values()):
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._deltas.popleft()
