"""How OpenAI's two generating endpoints tell the same texts: choices of an answer, and pieces of a stream."""

import codecs
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from server.generation.generation import Delta
from server.generation.sampling import Chosen
from server.generation.text import token_bytes

FinishReason = Literal["stop", "length"] | None
_LEAST = -9999.0  # what OpenAI says of tokens that are as good as impossible; JSON has no infinity


class Form(Protocol):
    """What one endpoint's answers look like. An object belongs to one call."""

    prefix: str
    whole: str
    piece: str

    def choice(self, index: int, text: str, tokens: Sequence[Chosen], reason: FinishReason) -> dict[str, Any]:
        """A finished choice of an answer."""
        ...

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        """The choices of the chunks that tell a delta; none if it says nothing yet."""
        ...


class TextForm:
    """`/v1/completions`."""

    prefix, whole, piece = "cmpl-", "text_completion", "text_completion"

    def __init__(self, tokenizer: Any, logprobs: int | None) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._places: dict[int, _Place] = {}

    def choice(self, index: int, text: str, tokens: Sequence[Chosen], reason: FinishReason) -> dict[str, Any]:
        """A finished choice, or a piece of one."""
        logprobs = None if self._logprobs is None else self._told(index, tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        """One, if there is anything to tell."""
        if not (delta.text or delta.finish_reason or (delta.tokens and self._logprobs is not None)):
            return []
        return [self.choice(delta.index, delta.text, delta.tokens, delta.finish_reason)]

    def _told(self, index: int, tokens: Sequence[Chosen]) -> dict[str, Any]:
        """Tokens, their log-probabilities, and where they begin in the choice's text."""
        place = self._places.get(index) or self._places.setdefault(index, _Place(self._tokenizer))
        names = [token_bytes(self._tokenizer, one.token) for one in tokens]
        texts = [b"" if one.token in place.special else name for one, name in zip(tokens, names, strict=True)]
        return {
            "tokens": [_name(name) for name in names],
            "token_logprobs": [_finite(one.logprob) for one in tokens],
            "top_logprobs": [self._likely(one) for one in tokens] if self._logprobs else None,
            "text_offset": place.offsets(texts),
        }

    def _likely(self, one: Chosen) -> dict[str, float]:
        """The likely tokens by name, and the chosen one, which need not be among them."""
        both = [*one.top, (one.token, one.logprob)]
        return {_name(token_bytes(self._tokenizer, token)): _finite(logprob) for token, logprob in both}


class _Place:
    """Where in a choice's text its next token begins, in characters."""

    def __init__(self, tokenizer: Any) -> None:
        self.special = frozenset(tokenizer.all_special_ids)  # they have names, but no place in a text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._end = 0

    def offsets(self, texts: Sequence[bytes]) -> list[int]:
        """One per token; those of a stop string lie at or behind the end of the text, which ends before it."""
        found = []
        for text in texts:
            found.append(self._end)
            self._end += len(self._decoder.decode(text))
        return found


class ChatForm:
    """`/v1/chat/completions`."""

    prefix, whole, piece = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Any, logprobs: int | None) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._begun: set[int] = set()

    def choice(self, index: int, text: str, tokens: Sequence[Chosen], reason: FinishReason) -> dict[str, Any]:
        """A finished choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._told(tokens), "finish_reason": reason}

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        """The role first of all, then text, and why it ended last of all."""
        found = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            found.append(_chunk(delta.index, {"role": "assistant", "content": "", "refusal": None}))
        if delta.text or (delta.tokens and self._logprobs is not None):
            found.append(_chunk(delta.index, {"content": delta.text}, self._told(delta.tokens)))
        if delta.finish_reason:
            found.append(_chunk(delta.index, {}, reason=delta.finish_reason))
        return found

    def _told(self, tokens: Sequence[Chosen]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        told = [self._token(one.token, one.logprob) | {"top_logprobs": self._likely(one)} for one in tokens]
        return {"content": told, "refusal": None}

    def _likely(self, one: Chosen) -> list[dict[str, Any]]:
        return [self._token(token, logprob) for token, logprob in one.top[: self._logprobs]]

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        name = token_bytes(self._tokenizer, token)
        return {"token": name.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(name)}


def _chunk(
    index: int, delta: Mapping[str, Any], logprobs: object = None, reason: FinishReason = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _name(token: bytes) -> str:
    """A token's text; bytes that are not text by themselves are written out, as OpenAI does."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _finite(logprob: float | None) -> float:
    if logprob is None:
        raise AssertionError("our bug: log-probabilities were asked for, and none came")
    return max(logprob, _LEAST)
