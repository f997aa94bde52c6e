"""From tokens to text, while they come: nothing is shown that a later token could change.

Held back are the bytes of an unfinished character, and the beginning of what may become a stop string. The text goes on
where the prompt ends, so " world" behind "Hello" keeps its space: all pieces together are decode(prompt + output)
without decode(prompt), special tokens left out. Bytes that cannot become a character give U+FFFD, one for each longest
beginning of a character (as bytes.decode does it), as soon as that is certain, so nonsense does not stall a stream.

Two differences from a decode at the end are meant: a character that the output leaves unfinished is left out; and where
a decoder gives up a whole run of byte tokens for one wrong byte in it, the characters before that byte stay.
"""

import codecs
from collections.abc import Sequence
from typing import Any, Protocol

from server.generation.pieces import UNKNOWN, Pieces, pieces_of

CONTEXT = 8  # tokens; a character has at most 4 bytes


class _Text(Protocol):
    """Tokens to text, without regard to stop strings."""

    def feed(self, token: int) -> str:
        """What is certain now."""

    def finish(self) -> str:
        """What is certain at the end."""


class TextStream:
    """The text of one output.

    stopped: a stop string was completed; the text ended before it, and what is fed later is ignored.
    num_tokens: tokens fed, up to and with the one that completed a stop string.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        assert all(stop), "our bug: an empty stop string; requests with one are refused"
        pieces = pieces_of(tokenizer)
        self._text: _Text = _OfPieces(pieces, prompt_ids) if pieces else _OfWindow(tokenizer, prompt_ids)
        self._stops = [_Stop(string) for string in stop]
        self._held = ""
        self.stopped = False
        self.num_tokens = 0

    def feed(self, token: int) -> str:
        """The text that is certain with this token; it may be empty."""
        if self.stopped:
            return ""
        self.num_tokens += 1
        return self._release(self._text.feed(token))

    def finish(self) -> str:
        """The text that was held back, at the end of the output."""
        text = self._release(self._text.finish())
        held, self._held = self._held, ""
        return text + held

    def _release(self, new: str) -> str:
        """Of what was held and what is new: the part before a stop string and before what may become one.

        The stop string that is complete first wins, of several that end at the same place the longest: that depends on
        the text alone, not on how it falls into tokens.
        """
        if not self._stops or not new or self.stopped:
            return "" if self.stopped else new
        text = self._held + new
        found = [(end, -len(stop.string)) for stop in self._stops if (end := stop.feed(new))]
        if found:
            end, minus_length = min(found)
            release, self._held, self.stopped = len(self._held) + end + minus_length, "", True
            return text[:release]
        release = len(text) - max(stop.matched for stop in self._stops)
        self._held = text[release:]
        return text[:release]


class _Stop:
    """One stop string, searched for as in Knuth, Morris and Pratt. matched: how much of it the text ends with."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        self._shorter = [0]  # by length matched - 1: the next shorter beginning that is also an end
        for letter in string[1:]:
            self._shorter.append(self._with(letter, self._shorter[-1]))

    def feed(self, text: str) -> int:
        """Where in the text the stop string ends; 0 if it is not complete."""
        if not self.matched and self.string[0] not in text:
            return 0
        for end, letter in enumerate(text, 1):
            self.matched = self._with(letter, self.matched)
            if self.matched == len(self.string):
                return end
        return 0

    def _with(self, letter: str, matched: int) -> int:
        """How much is matched one letter further."""
        while matched and self.string[matched] != letter:
            matched = self._shorter[matched - 1]
        return matched + (self.string[matched] == letter)


class _OfPieces:
    """Text of tokens whose bytes are known one by one."""

    def __init__(self, pieces: Pieces, prompt_ids: Sequence[int]) -> None:
        self._pieces = pieces
        self._is_first = not any(pieces.after(token) for token in prompt_ids)
        self._rest = b""  # bytes of an unfinished character
        self._decode(b"".join(pieces.after(token) for token in prompt_ids[-CONTEXT:]))

    def feed(self, token: int) -> str:
        """What is certain now."""
        new = self._pieces.after(token)
        if self._is_first and new:
            self._is_first = False
            new = self._pieces.first(token)
        return self._decode(new) if new else ""

    def _decode(self, new: bytes) -> str:
        new = self._rest + new
        text, length = codecs.utf_8_decode(new, "replace", False)
        self._rest = new[length:]
        return text

    def finish(self) -> str:
        """Nothing: what is left is no character."""
        return ""


class _OfWindow:
    """Text of tokens that only the tokenizer can decode: the last ones, again and again.

    The window is some tokens that have been shown and those that have not; what the latter add to the former is new.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._show([token for token in prompt_ids if token not in self._special][-CONTEXT:])

    def feed(self, token: int) -> str:
        """What is certain now."""
        if token in self._special:
            return ""
        self._window.append(token)
        new = self._new()
        is_certain = new and not new.endswith(UNKNOWN)
        if not is_certain and len(self._window) < self._num_shown + CONTEXT:
            return ""
        self._show(self._window[self._num_shown :])
        return new

    def finish(self) -> str:
        """What is left, without an unfinished character."""
        new = self._new().rstrip(UNKNOWN)
        self._show(self._window)
        return new

    def _new(self) -> str:
        return self._decode(self._window)[len(self._shown) :]

    def _show(self, window: list[int]) -> None:
        """Go on with a window of tokens that have all been shown."""
        self._window, self._num_shown, self._shown = window, len(window), self._decode(window)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def token_text(tokenizer: Any, token: int) -> str:
    """One token by itself, as it reads inside a text; special ones by their name."""
    return token_bytes(tokenizer, token).decode(errors="replace")


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The same as bytes, which need not be whole characters."""
    if pieces := pieces_of(tokenizer):
        return pieces.name(token)
    return str(tokenizer.decode([token], skip_special_tokens=False)).encode()
