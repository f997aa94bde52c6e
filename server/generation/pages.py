"""Pages of KV memory: which are free, which are held, and which hold a prefix that another request may reuse.

A page holds keys and values of PAGE neighbouring tokens of one sequence. With reuse, a full page is known by a key: a
digest of the composition (contents and weights, never names), the backbone, and all tokens up to the page's end. Pages
nobody holds keep their content until their memory is wanted, the least recently used first.

A sequence's pages are neighbours where that can be: memory is read up to twice as fast in long runs as page by page.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

PAGE = 16  # tokens; as in attention.c and triton_attention.py


def pages_for(tokens: int) -> int:
    """Pages that so many tokens need."""
    return -(-tokens // PAGE)


def page_keys(salt: bytes, ids: Sequence[int]) -> Iterator[bytes]:
    """The key of each full page of a sequence, in order.

    salt: digest of all that keys and values depend on besides tokens.
    """
    key = salt
    tokens = np.asarray(ids, np.int64)
    for end in range(PAGE, len(ids) + 1, PAGE):
        key = hashlib.blake2b(tokens[end - PAGE : end].tobytes(), key=key, digest_size=32).digest()
        yield key


class PagePool:
    """Hands out pages by number. Not thread-safe: it lives on the engine's thread."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._is_free = np.ones(num_pages, bool)
        self._num_free = num_pages
        self._holders = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known pages that nobody holds, least recently used first

    @property
    def num_available(self) -> int:
        """Pages that can be had now."""
        return self._num_free + len(self._idle)

    @property
    def num_held(self) -> int:
        """Pages that some sequence holds: 0 when nothing is in flight."""
        return self.num_pages - self.num_available

    @property
    def num_known(self) -> int:
        """Pages whose content can be found by key."""
        return len(self._key_of)

    def take(self, count: int, behind: int | None = None) -> list[int] | None:
        """So many pages to write to, or None if there are fewer.

        They follow the page `behind`, if they can; else they are where most free pages are together, with room on both
        sides, so that they can be followed in their turn.
        """
        if count > self.num_available:
            return None
        taken: list[int] = []
        for missing in range(count, 0, -1):
            page = self._next(behind, missing)
            self._holders[page] = 1
            taken.append(page)
            behind = page
        return taken

    def _next(self, behind: int | None, count: int) -> int:
        """One page, with the others of `count` in mind."""
        if not self._num_free:
            return self._forget_oldest()
        page = -1 if behind is None else behind + 1
        if not 0 <= page < self.num_pages or not self._is_free[page]:
            start, end = self._longest_run()
            page = start + max(0, end - start - count) // 2
        self._is_free[page] = False
        self._num_free -= 1
        return page

    def _longest_run(self) -> tuple[int, int]:
        """First page of the most free pages in a row, and the page behind them."""
        borders = np.flatnonzero(np.diff(self._is_free, prepend=False, append=False)).reshape(-1, 2)
        start, end = borders[np.argmax(borders[:, 1] - borders[:, 0])].tolist()
        return start, end

    def _forget_oldest(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """Pages that hold the beginning of what these keys name, for one more holder; they must not be written to."""
        found: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._idle.pop(page, None)
            self._holders[page] += 1
            found.append(page)
        return found

    def name(self, page: int, key: bytes) -> None:
        """Note what a full page holds; it is not written to any more. A key that another page has stays with that."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget(self, pages: Iterable[int]) -> None:
        """Nobody else may share these held pages: their content is not what was said of it."""
        for page in pages:
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._page_of[key]

    def release(self, pages: Sequence[int]) -> None:
        """One holder less of each."""
        for page in reversed(pages):  # the end of a prefix is forgotten before its beginning
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._is_free[page] = True
                    self._num_free += 1
