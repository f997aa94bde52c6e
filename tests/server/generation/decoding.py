"""What tests of the batcher share: sequences, and running them to their end."""

from collections.abc import Callable, Sequence
from typing import Any

from adapters_store.language import LanguageModel
from adapters_store.mixing import Mix
from server.generation.batcher import Batcher
from server.generation.decoder import Decoder
from server.generation.sampling import Draw, Sampling
from server.generation.sequence import Event, TokenSequence

GREEDY = Sampling(temperature=0.0)
PAGES = 4096


def decoder_of(language: LanguageModel, pages: int = PAGES, **changes: Any) -> Decoder:
    """A decoder with memory for so many pages."""
    page_bytes = Decoder(language, kv_bytes=2**22).memory.page_bytes
    return Decoder(language, kv_bytes=pages * page_bytes, **changes)


def sequence(ids: Sequence[int], count: int, mix: Mix | None = None, **changes: Any) -> TokenSequence:
    """A greedy sequence of so many new tokens."""
    draw = Draw(changes.pop("sampling", GREEDY), ids, 97)
    return TokenSequence(list(ids), mix, draw, count, **changes)


def finish(batcher: Batcher, each_step: Callable[[int], object] = lambda _: None) -> list[Event]:
    """All that happens until nothing is left to do."""
    events: list[Event] = []
    steps = 0
    while batcher.has_work:
        events += batcher.step()
        steps += 1
        each_step(steps)
    return events


def output(one: TokenSequence) -> list[int]:
    """What was generated."""
    return one.ids[one.num_prompt :]
