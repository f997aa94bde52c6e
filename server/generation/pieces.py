"""What one token adds to a text, in bytes.

Tokens are not characters: a character may take several of them, so text is put together from bytes. Almost every
decoder is local: behind other tokens a token always gives the same bytes. They are asked for once per token and kept;
the text of a stream is then a look-up per token, and the UTF-8 of what is found.
"""

import json
import re
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what decoders give for bytes that are no character
_LOCAL = {"ByteLevel", "ByteFallback", "Replace", "Metaspace", "WordPiece", "Fuse", "Strip"}
_BYTE_NAME = re.compile("<0x([0-9A-Fa-f]{2})>")


def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for letters from U+0100 on."""
    themselves = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(byte): byte for byte in themselves} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _bytes_of_letters()


class Pieces:
    """The tokens of one tokenizer with a Rust backend, as bytes."""

    def __init__(self, backend: Any, anchor: int) -> None:
        self._backend = backend
        self._anchor = anchor
        self._base = self._decode([anchor])
        self._known: dict[int, bytes] = {}

    def after(self, token: int) -> bytes:
        """What a token adds behind other tokens; nothing if it is special, or unknown."""
        known = self._known.get(token)
        if known is None:
            text = self._decode([self._anchor, token])[len(self._base) :]
            known = self._known[token] = self._exact(token, text)
        return known

    def first(self, token: int) -> bytes:
        """What a token gives with nothing before it: many decoders take a space away there."""
        return self._exact(token, self._decode([token]))

    def name(self, token: int) -> bytes:
        """What a token adds, or its name if it adds nothing."""
        return self.after(token) or (self._backend.id_to_token(token) or "").encode()

    def _decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=True))

    def _exact(self, token: int, text: str) -> bytes:
        """The bytes behind a token's text, also where they are not whole characters by themselves."""
        if UNKNOWN not in text:
            return text.encode()
        name = self._backend.id_to_token(token)
        if byte := _BYTE_NAME.fullmatch(name):
            return bytes([int(byte[1], 16)])
        if all(letter in _BYTES for letter in name):
            return bytes(_BYTES[letter] for letter in name)
        return text.encode()  # a token that is named so


_PIECES: "WeakKeyDictionary[Any, Pieces | None]" = WeakKeyDictionary()


def pieces_of(tokenizer: Any) -> Pieces | None:
    """The pieces of a tokenizer; None if it has no Rust backend, or a decoder for which a token's neighbours matter."""
    if tokenizer not in _PIECES:
        _PIECES[tokenizer] = _pieces_of(getattr(tokenizer, "backend_tokenizer", None))
    return _PIECES[tokenizer]


def _pieces_of(backend: Any) -> Pieces | None:
    if backend is None or not _is_local(backend.decoder):
        return None
    anchors = (token for token in range(backend.get_vocab_size()) if _is_anchor(backend, token))
    anchor = next(anchors, None)
    return None if anchor is None else Pieces(backend, anchor)


def _is_local(decoder: Any) -> bool:
    if decoder is None:
        return True  # tokens are joined by spaces
    steps = list(_steps(json.loads(decoder.__getstate__())))
    kinds = [step["type"] for step in steps]
    behind_fuse = kinds[kinds.index("Fuse") + 1 :] if "Fuse" in kinds else []
    at_the_end = any(step["type"] == "Strip" and step["stop"] for step in steps)
    return set(kinds) <= _LOCAL and set(behind_fuse) <= {"Strip"} and not at_the_end


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        yield decoder
        return
    for step in decoder["decoders"]:
        yield from _steps(step)


def _is_anchor(backend: Any, token: int) -> bool:
    """Whether a token is an ordinary word or letter, behind which another one shows what it adds."""
    text = backend.decode([token], skip_special_tokens=True)
    return text.isalnum() and not _BYTE_NAME.fullmatch(backend.id_to_token(token))
