"""One call of OpenAI's generating endpoints: from its body to what the engine wants, from texts to an answer."""

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters_store.completions import prompt_ids
from server import chat, inference, sse
from server.completion_forms import ChatForm, Form, TextForm
from server.completions_schema import DEFAULT_MAX_TOKENS, ChatRequest, CompletionRequest, Generate
from server.compose import Composed
from server.errors import BadInputError
from server.generation.ask import generating, generator_of
from server.generation.generation import Delta, Generation, Stopping, Wanted
from server.generation.sampling import Sampling
from server.openai_models import ask_of
from server.service import Service

Allowed = frozenset[str] | None


@dataclass(frozen=True, eq=False)
class Call:
    """What is wanted, and how it is told. facts: for the log line, once they are known."""

    body: Generate
    wanted: Sequence[Wanted]
    composed: Composed
    form: Form
    head: dict[str, Any]  # what every chunk and the answer repeat
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def num_choices(self) -> int:
        """Texts of the answer."""
        return sum(one.n for one in self.wanted)

    @property
    def extras(self) -> dict[str, Any]:
        """Our field of the answer."""
        return {"composition": self.composed.explained if self.body.espalier.explain else self.composed.brief}

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A chunk about one choice."""
        usage = {"usage": None} if self.body.includes_usage else {}
        return {"object": self.form.piece, **self.head, "choices": [choice], **usage}


async def complete(service: Service, body: CompletionRequest, allowed: Allowed, request_id: str) -> Call:
    """A call of `/v1/completions`."""
    composed = inference.compose(service, ask_of(service, body.model, body.espalier, body.lora), allowed)
    num_choices = len(body.prompt) * (body.n or 1)
    if num_choices > service.settings.max_inputs:  # before the work of tokenizing
        raise BadInputError(f"{num_choices} texts in one call, at most {service.settings.max_inputs} (--max-inputs)")
    rows = [one for one in body.prompt if not isinstance(one, str)]  # prompts are all of one form
    rows = rows or await _tokenized(service, [one for one in body.prompt if isinstance(one, str)], special=True)
    form = TextForm(service.backbone.tokenizer, body.logprobs)
    wanted = [_wanted(service, body, row, composed, body.max_tokens, DEFAULT_MAX_TOKENS, body.logprobs) for row in rows]
    return Call(body, wanted, composed, form, _head(service, body, form, request_id))


async def converse(service: Service, body: ChatRequest, allowed: Allowed, request_id: str) -> Call:
    """A call of `/v1/chat/completions`."""
    composed = inference.compose(service, ask_of(service, body.model, body.espalier, body.lora), allowed)
    text = chat.prompt_text(service.backbone.tokenizer, body.messages)
    [row] = await _tokenized(service, [text], special=False)  # the template wrote the special tokens itself
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    limit = body.max_completion_tokens or body.max_tokens
    form = ChatForm(service.backbone.tokenizer, logprobs)
    wanted = [_wanted(service, body, row, composed, limit, generator_of(service).max_length, logprobs)]
    return Call(body, wanted, composed, form, _head(service, body, form, request_id))


async def _tokenized(service: Service, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Token ids of whole texts: what is too long for the backbone is refused later, not cut."""
    backbone = service.backbone
    if sum(map(len, texts)) < 20_000:  # a short call is tokenized faster than handed to a thread
        return _ids(backbone.tokenizer, texts, special)

    def work() -> list[list[int]]:
        with backbone.bulk.turn:
            return _ids(backbone.bulk.tokenizer, texts, special)

    return await service.work(work)


def _ids(tokenizer: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    if special:
        return [prompt_ids(tokenizer, text) for text in texts]
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _wanted(
    service: Service, body: Generate, ids: Sequence[int], composed: Composed,
    limit: int | None, default: int, logprobs: int | None,
) -> Wanted:  # fmt: skip
    """What a body wants of one prompt. limit: tokens as the body says; else the default, or what the context leaves."""
    generator = generator_of(service)
    beyond = [token for token in body.logit_bias or {} if token >= generator.vocab_size]
    if beyond:
        raise BadInputError(f"logit_bias: token {beyond[0]} is none of this backbone's {generator.vocab_size}")
    left = max(1, generator.max_length - len(ids))
    token_ids = frozenset(body.stop_token_ids or ())
    stops = body.stops if body.stop is not None or body.ignore_eos else _usual_stops(composed)
    stopping = Stopping(limit or min(default, left), stops, token_ids, bool(body.ignore_eos))
    return Wanted(ids, composed, _sampling(body, logprobs), stopping, body.n or 1)


def _usual_stops(composed: Composed) -> tuple[str, ...]:
    """Where the asked task's texts end, as it was trained: beside the end of text, which the engine knows."""
    return composed.own.generation.stop if composed.own and composed.own.generation else ()


def _sampling(body: Generate, logprobs: int | None) -> Sampling:
    names = (
        "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    )  # fmt: skip
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    bias = tuple(sorted((body.logit_bias or {}).items()))
    return Sampling(**given, top_k=max(body.top_k or 0, 0), logit_bias=bias, logprobs=logprobs)


def _head(service: Service, body: Generate, form: Form, request_id: str) -> dict[str, Any]:
    digest = service.backbone.fingerprint.weights_digest.partition(":")[2]
    return {
        "id": form.prefix + request_id,
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": f"fp_{digest[:10]}",
    }


async def answer(service: Service, call: Call) -> dict[str, Any]:
    """The whole answer at once."""
    deltas: list[list[Delta]] = [[] for _ in range(call.num_choices)]
    async with generating(service, call.wanted) as generation:
        async for delta in generation:
            deltas[delta.index].append(delta)
        usage = _usage(call, generation)
    choices = [_choice(call.form, index, mine) for index, mine in enumerate(deltas)]
    return {"object": call.form.whole, **call.head, "choices": choices, "usage": usage, "espalier": call.extras}


def _choice(form: Form, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
    text = "".join(delta.text for delta in deltas)
    tokens = [token for delta in deltas for token in delta.tokens]
    return form.choice(index, text, tokens, deltas[-1].finish_reason)


async def events(service: Service, call: Call) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events: one piece for whatever is there at the same moment."""
    left = call.num_choices
    async with generating(service, call.wanted) as generation:
        async for first in generation:
            deltas = [first, *generation.ready()]
            left -= sum(delta.finish_reason is not None for delta in deltas)
            chunks = [call.chunk(choice) for delta in deltas for choice in call.form.pieces(delta)]
            if left == 0:
                yield b"".join(map(sse.event, _finished(call, generation, chunks))) + sse.DONE
            elif chunks:
                yield b"".join(map(sse.event, chunks))


def _finished(call: Call, generation: Generation, chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last chunks: with the usage if it is wanted, and the composition in the very last one."""
    usage = _usage(call, generation)
    if call.body.includes_usage:
        chunks.append({"object": call.form.piece, **call.head, "choices": [], "usage": usage})
    chunks[-1]["espalier"] = call.extras
    return chunks


def _usage(call: Call, generation: Generation) -> dict[str, Any]:
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    call.facts.update(rows=call.num_choices, prompt_tokens=prompt, completion_tokens=completion)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }
