"""Rows of `/v1/infer` that are answered with text: tasks of adapters without a head, on a backbone that generates."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapters_store.completions import prompt_ids
from server.compose import Composed
from server.generation.ask import generating, generator_of
from server.generation.generation import Stopping, Wanted
from server.generation.sampling import Sampling
from server.schemas import TextOptions
from server.service import Service

MAX_TOKENS = 64  # where neither the request nor the adapter says


@dataclass(frozen=True)
class Written:
    """One row's text, why it ended, and what it cost."""

    text: str
    finish_reason: str
    input_tokens: int
    output_tokens: int
    queue_s: float


async def write(service: Service, rows: Sequence[tuple[str, Composed]], options: TextOptions) -> list[Written]:
    """Texts that continue prompts under their compositions, in order."""
    wanted = [_wanted(service, prompt, composed, options) for prompt, composed in rows]
    pieces: list[list[str]] = [[] for _ in rows]
    reasons, tokens = ["length"] * len(rows), [0] * len(rows)
    async with generating(service, wanted) as generation:
        async for delta in generation:
            pieces[delta.index].append(delta.text)
            reasons[delta.index] = delta.finish_reason or reasons[delta.index]
        tokens = generation.tokens_by_choice
        queue_s = generation.queue_s
    return [Written("".join(pieces[i]), reasons[i], len(wanted[i].ids), tokens[i], queue_s) for i in range(len(rows))]


def _wanted(service: Service, prompt: str, composed: Composed, options: TextOptions) -> Wanted:
    """A prompt whose answer is as long as asked for; as the task was trained, where that fits the context."""
    ids = prompt_ids(service.backbone.tokenizer, prompt)
    room = generator_of(service).max_length - len(ids)
    usual = composed.own.generation if composed.own else None
    max_tokens = options.max_tokens or max(1, min(usual.max_tokens if usual else MAX_TOKENS, room))
    stop = usual.stop if usual and options.stop is None else options.stop or ()
    sampling = Sampling(options.temperature, options.top_p, options.top_k, seed=options.seed)
    return Wanted(ids, composed, sampling, Stopping(max_tokens, tuple(stop)))
