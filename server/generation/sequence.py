"""One sequence that is being continued: its tokens, its pages, how far it is computed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from adapters_store.mixing import Mix
from server.generation.pages import PAGE, page_keys, pages_for
from server.generation.sampling import Chosen, Draw

FinishReason = Literal["stop", "length"]


@dataclass(eq=False)
class TokenSequence:
    """A prompt and what was generated behind it. After it was added, only the engine's thread touches it.

    ids: prompt, then output. end_ids: tokens that end it. salt: what its keys and values depend on besides tokens;
    None: never shared. computed: tokens whose keys and values lie in the pages.
    """

    ids: list[int]
    mix: Mix | None
    draw: Draw
    max_tokens: int
    end_ids: frozenset[int] = frozenset()
    salt: bytes | None = None
    num_prompt: int = field(init=False)
    computed: int = 0
    cached: int = 0  # prompt tokens that were found in pages of others when it was first admitted
    pages: list[int] = field(default_factory=list)
    is_cancelled: bool = False
    is_begun: bool = False
    has_shared: bool = False  # some of its pages are others', since it was last admitted
    _keys: list[bytes] = field(default_factory=list)
    _named: int = 0  # pages whose key the pool knows, or that were shared

    def __post_init__(self) -> None:
        self.num_prompt = len(self.ids)

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be chosen; 1 while decoding."""
        return len(self.ids) - self.computed

    @property
    def num_output(self) -> int:
        """Tokens generated."""
        return len(self.ids) - self.num_prompt

    def missing_pages(self, tokens: int) -> int:
        """Pages to add before so many of its tokens have a place."""
        return max(0, pages_for(tokens) - len(self.pages))

    def shareable_keys(self) -> list[bytes]:
        """Keys of pages that may be taken over; the last token is always computed, for its logits."""
        if self.salt is None:
            return []
        return list(page_keys(self.salt, self.ids[: (len(self.ids) - 1) // PAGE * PAGE]))

    def take_over(self, pages: list[int]) -> None:
        """Begin with these pages of others."""
        self.pages = pages
        self.has_shared = bool(pages)
        self._named = len(pages)
        self.computed = len(pages) * PAGE
        if not self.is_begun:
            self.cached = self.computed

    def give_up(self) -> list[int]:
        """Forget what is computed; the pages to release."""
        pages, self.pages = self.pages, []
        self.computed = self._named = 0
        return pages

    def name_pages(self, end: int, name: Callable[[int, bytes], None]) -> None:
        """Tell the pages that are full with tokens up to this end and were not told yet."""
        full = end // PAGE
        if self.salt is None or full == self._named:
            return
        keys = self._keys = self._extended_keys(full)
        for index in range(self._named, full):
            name(self.pages[index], keys[index])
        self._named = full

    def _extended_keys(self, full: int) -> list[bytes]:
        known = self._keys[:full]
        start = known[-1] if known else self.salt or b""
        return known + list(page_keys(start, self.ids[len(known) * PAGE : full * PAGE]))

    def finish_reason(self, token: int, max_length: int) -> FinishReason | None:
        """Why this token, the last of ids, is the last one; None if it is not."""
        if token in self.end_ids:
            return "stop"
        return "length" if self.num_output >= self.max_tokens or len(self.ids) >= max_length else None


@dataclass(frozen=True, eq=False)
class Event:
    """What a step did to a sequence: a token, and why it was the last one, or an error that ended it."""

    sequence: TokenSequence
    chosen: Chosen | None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
