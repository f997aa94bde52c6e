"""One call, from its inputs to its outputs: compose, tokenize, lease, run, label."""

import asyncio
import math
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters_store.composition import Overrides
from adapters_store.errors import EspalierError, InvalidCompositionError
from adapters_store.manifest import HeadSpec
from adapters_store.mixing import Mix
from server import texts
from server.compose import Ask, Composed
from server.engine import Row
from server.errors import BadInputError, NotFiniteAnswerError
from server.scheduler import Admission, Answer
from server.schemas import InferRequest, Input, Options, TextOptions, Weight
from server.security import require_tasks
from server.service import Service
from server.texts import Written


@dataclass(frozen=True, eq=False)
class Asked:
    """One row of a call: a text under one composition."""

    text: str
    composed: Composed
    pooling: str
    max_length: int | None
    ids: Sequence[int] | None = None  # tokens that the client brought itself


@dataclass(frozen=True, eq=False)
class Answered:
    """A call's answers, row by row, and its costs."""

    answers: list[Answer]
    tokens: int


async def infer(service: Service, request: InferRequest, allowed: frozenset[str] | None) -> dict[str, Any]:
    """The reply to `POST /v1/infer`, without its id."""
    asked, options = rows_of(service, request, allowed), request.options
    labelled = [row for row in asked if row.composed.head]
    written = [(row.text, row.composed) for row in asked if not row.composed.head]
    answered, pieces = await _together(_labels(service, labelled), _texts(service, written, options.text))
    labels_of, texts_of = iter(answered.answers), iter(pieces)
    outputs = [
        _output(row, next(labels_of), options.explain)
        if row.composed.head
        else _written(row, next(texts_of), options.explain)
        for row in asked
    ]
    queue_s = [one.queue_s for one in answered.answers] + [one.queue_s for one in pieces]
    return {
        "backbone": service.backbone.name,
        "outputs": outputs,
        "usage": _usage(answered, pieces),
        "timing": {
            "queue_ms": round(1e3 * max(queue_s), 3),
            "forward_ms": round(1e3 * max((one.forward_s for one in answered.answers), default=0.0), 3),
        },
    }


async def _together(labels: Awaitable[Answered], texts: Awaitable[list[Written]]) -> tuple[Answered, list[Written]]:
    """Both, side by side; if one fails the other is given up."""
    parts = asyncio.ensure_future(labels), asyncio.ensure_future(texts)
    try:
        return await asyncio.gather(*parts)
    finally:
        for part in parts:
            part.cancel()


async def _labels(service: Service, asked: Sequence[Asked]) -> Answered:
    return await run(service, asked) if asked else Answered([], 0)


async def _texts(service: Service, rows: Sequence[tuple[str, Composed]], options: TextOptions) -> list[Written]:
    return await texts.write(service, rows, options) if rows else []


def _usage(answered: Answered, written: Sequence[Written]) -> dict[str, int]:
    usage = {"input_tokens": answered.tokens + sum(one.input_tokens for one in written)}
    return usage | ({"output_tokens": sum(one.output_tokens for one in written)} if written else {})


def rows_of(service: Service, request: InferRequest, allowed: frozenset[str] | None) -> list[Asked]:
    """The rows of a call, fan-out included, in order. Errors carry the index of their input."""
    rows = []
    for index, one in enumerate(request.inputs):
        try:
            rows += [_asked(service, one, ask, allowed) for ask in asks_of(one, request.options)]
        except EspalierError as error:
            error.index = index  # type: ignore[attr-defined]  # the edge puts it into the problem
            raise
        if len(rows) > service.settings.max_inputs:
            raise BadInputError(f"the call has more than {service.settings.max_inputs} rows (--max-inputs); split it")
    return rows


def asks_of(one: Input, options: Options) -> list[Ask]:
    """The questions of one input: one, or one per task."""
    mode = options.mode
    if one.adapters is not None and mode not in (None, "explicit", "none"):
        raise InvalidCompositionError(f"'adapters' gives explicit weights; mode {mode!r} cannot go with it")
    overrides = Overrides(options.temperature, options.threshold, options.top_k)
    if one.adapters is not None:
        weights = tuple((ref, freeze(weight)) for ref, weight in one.adapters.items())
        return [Ask(mode or "explicit", adapters=weights if mode != "none" else (), head=one.head)]
    if one.mix is not None:
        return [Ask(mode or "prior", mix=tuple(one.mix.items()), head=one.head, overrides=overrides)]
    return [Ask(mode or "prior", task, head=one.head, overrides=overrides) for task in one.tasks or [str(one.task)]]


def freeze(weight: Weight) -> float | tuple[float, ...]:
    """A weight that can be hashed."""
    return tuple(weight) if isinstance(weight, list) else weight


def _asked(service: Service, one: Input, ask: Ask, allowed: frozenset[str] | None) -> Asked:
    composed = compose(service, ask, allowed)
    if composed.head is None:
        return Asked(one.text, composed, service.backbone.default_pooling, None)
    head = head_of(composed)
    return Asked(one.text, composed, head.pooling, head.max_length)


def compose(service: Service, ask: Ask, allowed: frozenset[str] | None) -> Composed:
    """What the composer gives, if the key's list of tasks covers the question. Raises ForbiddenError else."""
    composed = service.composer.compose(ask, service.catalog)
    if allowed is not None:
        named = {ask.task, composed.task, *(task for task, _ in ask.mix)} - {None}
        if ask.adapters is not None:
            named |= {manifest.task for manifest, _ in composed.parts}
        require_tasks(allowed, named)
    return composed


def head_of(composed: Composed) -> HeadSpec:
    """The head that answers a classifying row."""
    if composed.head is None or composed.head.head is None:
        raise AssertionError("our bug: a classifying row without a head")
    return composed.head.head


async def run(service: Service, asked: Sequence[Asked]) -> Answered:
    """Answers of rows; those that fit on the device together run together."""
    ids = await _tokenize(service, asked)
    tokens = sum(map(len, ids))
    answers: list[Answer] = []
    with service.scheduler.admitted(tokens) as admission:
        for start, end in _spans(asked, service.settings.slots):
            answers += await _run_span(service, asked[start:end], ids[start:end], admission)
    return Answered(answers, tokens)


async def _tokenize(service: Service, asked: Sequence[Asked]) -> list[Sequence[int]]:
    """Token ids of each row. Raises BadInputError for a text that has none."""
    texts = [row.text for row in asked if row.ids is None]
    limits = [row.max_length for row in asked if row.ids is None]
    if sum(map(len, texts)) < 20_000:  # a short call is tokenized faster than handed to a thread
        found = iter(service.backbone.tokenize(texts, limits))
    else:
        found = iter(await service.work(lambda: service.backbone.tokenize_many(texts, limits)))
    ids = [row.ids if row.ids is not None else next(found) for row in asked]
    if not all(ids):
        raise BadInputError("a text is empty, and this backbone's tokenizer makes no tokens of it")
    return ids


def _spans(asked: Sequence[Asked], num_slots: int) -> list[tuple[int, int]]:
    """Consecutive rows whose adapters fit into the slots at once; one span unless slots are few."""
    spans, start = [], 0
    needed: set[str] = set()
    for index, row in enumerate(asked):
        mine = {manifest.digest for manifest in row.composed.manifests if manifest.sites}
        if index > start and len(needed | mine) > num_slots:
            spans.append((start, index))
            start, needed = index, set()
        needed |= mine
    return [*spans, (start, len(asked))]


async def _run_span(
    service: Service, asked: Sequence[Asked], ids: Sequence[Sequence[int]], admission: Admission
) -> list[Answer]:
    """Answers of rows whose adapters fit on the device together."""
    manifests = {manifest.digest: manifest for row in asked for manifest in row.composed.manifests}
    lease = await service.residency.lease(list(manifests.values()))
    try:
        mixes: dict[int, Mix | None] = {}
        rows = []
        for row, tokens in zip(asked, ids, strict=True):
            key = id(row.composed)
            if key not in mixes:
                mixes[key] = lease.mix(row.composed.parts)
                service.metrics.note_composition([manifest.name for manifest in row.composed.composing])
            rows.append(Row(tokens, mixes[key], row.pooling, lease.head(row.composed.head)))
        answers = await service.scheduler.submit(rows, admission)
    finally:
        service.residency.release(lease)
    for row, answer in zip(asked, answers, strict=True):
        _check_finite(row, answer)
    return answers


def _check_finite(row: Asked, answer: Answer) -> None:
    """Refuse to answer with NaN or infinity."""
    if not all(map(math.isfinite, answer.values)):
        named = ", ".join(manifest.reference for manifest, _ in row.composed.parts) or "the bare backbone"
        raise NotFiniteAnswerError(f"{named} gives NaN or infinity: the weights, or the adapters, are too large")


def _output(row: Asked, answer: Answer, explain: bool) -> dict[str, Any]:
    """Label, score and scores of one row, and the composition that gave them."""
    labels = head_of(row.composed).labels
    scores = softmax(answer.values)
    best = int(np.argmax(scores))
    return {
        "task": row.composed.task,
        "label": labels[best],
        "score": scores[best],
        "scores": dict(zip(labels, scores, strict=True)),
        "composition": row.composed.explained if explain else row.composed.brief,
    }


def _written(row: Asked, written: Written, explain: bool) -> dict[str, Any]:
    """Text of one row, why it ended, and the composition that gave it."""
    return {
        "task": row.composed.task,
        "text": written.text,
        "finish_reason": written.finish_reason,
        "composition": row.composed.explained if explain else row.composed.brief,
    }


def softmax(logits: Sequence[float]) -> list[float]:
    """Shares that sum to 1, rounded to 6 digits for the wire."""
    raised = np.exp(np.asarray(logits) - max(logits))
    return [round(share, 6) for share in (raised / raised.sum()).tolist()]


def explain(service: Service, request: InferRequest, allowed: frozenset[str] | None) -> dict[str, Any]:
    """The reply to `POST /v1/explain`: the compositions, without running them."""
    asked = rows_of(service, request, allowed)
    outputs = [{"task": row.composed.task, "composition": row.composed.explained} for row in asked]
    return {"backbone": service.backbone.name, "num_layers": service.composer.num_layers, "outputs": outputs}
