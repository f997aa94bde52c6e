"""Golden examples: an adapter alone must give what its training promised: logits, or log-probabilities of a text.

Checked before an upload is published, in the probe slot that no request ever uses, and for what others published when
it first comes to the device, before any request may use it. They run in chunks no longer than a batch, so that neither
memory nor other requests feel how many there are. Only a head gives logits: an upload that promises them without one is
refused; those of a version that is stored already are passed over, as nothing can be compared with them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from adapters_store.adapter import Adapter
from adapters_store.completions import joined_ids
from adapters_store.errors import GoldenError
from adapters_store.language import LanguageModel
from adapters_store.manifest import GoldenExample, Manifest
from adapters_store.mixing import Mix
from adapters_store.primitives.head import Head
from server.engine import Row

if TYPE_CHECKING:
    from server.service import Service

# Largest difference allowed, relative to the largest logit; lower precision rounds at every layer.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1, "float16": 0.03}
MAX_EXAMPLES = 64  # of one version; they run before its first answer
Forward = Callable[[Sequence["Probe"]], list[list[float]]]


class Probe(NamedTuple):
    """An example as token ids. start: where its completion begins, at least 1; 0 for an example of logits."""

    ids: list[int]
    start: int


async def check(service: "Service", manifest: Manifest, slot: int | None, head: Head | None) -> None:
    """Run a resident version's examples. Raises GoldenError, naming the example that differs."""
    examples = _keepable(manifest.golden, head)
    mix = None if slot is None else Mix.one_hot(slot, service.backbone.encoder.num_layers)
    probes = _probes(service, examples, head, manifest.reference)
    found = await _run(service, probes, lambda chunk: _forward(service, chunk, mix, head))
    _compare(service, examples, found, manifest.reference)


async def prove(service: "Service", adapter: Adapter, examples: Sequence[GoldenExample], name: str) -> None:
    """Run an adapter that nobody may use yet, on its examples or any text. Raises GoldenError or RefusedError."""
    head = adapter.head.to(service.backbone.encoder.device) if adapter.head else None
    if len(_keepable(examples, head)) < len(examples):
        raise GoldenError(
            f"golden examples of {name} promise logits, and it has no head to give them; send head.json and "
            "head.safetensors along, or examples of completions, or none"
        )
    tried = examples or [GoldenExample(text="does it run at all")]
    probes = _probes(service, tried, head, name)
    found = await _run(service, probes, lambda chunk: _forward_alone(service, chunk, adapter, head))
    if not np.isfinite(np.concatenate(found)).all():
        raise GoldenError(f"{name} gives NaN or infinity on {tried[0].text!r}; its numbers are too large to serve")
    _compare(service, examples, found, name)


def _keepable(examples: Sequence[GoldenExample], head: Head | None) -> list[GoldenExample]:
    """The examples that a version with this head, or with none, can give at all."""
    return [example for example in examples if head or example.completion is not None]


def _probes(service: "Service", examples: Sequence[GoldenExample], head: Head | None, name: str) -> list[Probe]:
    """Examples as token ids; for the event loop's thread. Raises GoldenError for those that cannot be run here."""
    if len(examples) > MAX_EXAMPLES:
        raise GoldenError(
            f"{name} has {len(examples)} golden examples, at most {MAX_EXAMPLES} are run; publish it with fewer"
        )
    if service.backbone.language is None and any(example.completion is not None for example in examples):
        raise GoldenError("the golden examples are of generated text, and this server's backbone does not generate")
    limit = head.spec.max_length if head else None
    return [_probe(service, example, limit, f"golden example {i} of {name}") for i, example in enumerate(examples)]


def _probe(service: "Service", example: GoldenExample, limit: int | None, what: str) -> Probe:
    """limit: tokens that a text of the adapter's head is cut to."""
    if example.completion is None:
        return Probe(service.backbone.tokenize([example.text], [limit])[0], 0)
    ids, start = joined_ids(service.backbone.tokenizer, example.text, example.completion)
    longest = service.backbone.encoder.max_length
    if len(ids) > longest:
        raise GoldenError(
            f"{what} has {len(ids)} tokens with its completion, the backbone's context has {longest}; shorten it"
        )
    if len(ids) <= start:
        raise GoldenError(f"{what}: its completion has no token to compare; give a longer one")
    return Probe(ids, start)


async def _run(service: "Service", probes: Sequence[Probe], forward: Forward) -> list[list[float]]:
    """What forward gives for each probe, in chunks of the batch's token budget, others' forwards in between."""
    chunks = _chunked(probes, service.backbone.encoder.tokens_run, service.settings.batch_tokens)
    return [values for chunk in chunks for values in await service.engine.run(functools.partial(forward, chunk))]


def _chunked(probes: Sequence[Probe], tokens_run: Callable[[Sequence[int]], int], max_tokens: int) -> list[list[Probe]]:
    """Probes in their order, in chunks that run at most so many tokens; a longer probe is alone."""
    chunks: list[list[Probe]] = []
    for probe in probes:
        if chunks and tokens_run([len(one.ids) for one in (*chunks[-1], probe)]) <= max_tokens:
            chunks[-1].append(probe)
        else:
            chunks.append([probe])
    return chunks


def _forward(service: "Service", chunk: Sequence[Probe], mix: Mix | None, head: Head | None) -> list[list[float]]:
    """On the engine's thread, per probe: logits (a pooled state without a head), or log-probabilities."""
    pooling = head.spec.pooling if head else service.backbone.default_pooling
    rows = [Row(probe.ids, mix, pooling, head) for probe in chunk if not probe.start]
    completing = [probe for probe in chunk if probe.start]
    language = service.backbone.language
    pooled = iter(service.engine.forward(rows).outputs if rows else ())
    completed = iter(_logprobs(language, completing, mix) if language and completing else ())
    return [next(completed if probe.start else pooled) for probe in chunk]


def _forward_alone(
    service: "Service", chunk: Sequence[Probe], adapter: Adapter, head: Head | None
) -> list[list[float]]:
    """The same in the probe slot, which is empty before and after: it is the next proof's too."""
    encoder, slot = service.backbone.encoder, service.settings.slots  # one beyond those that requests use
    mix = Mix.one_hot(slot, encoder.num_layers) if adapter.entries else None
    try:
        if adapter.entries:
            encoder.sites.put(slot, adapter.entries)
        return _forward(service, chunk, mix, head)
    finally:
        encoder.sites.drop(slot)


def _logprobs(language: LanguageModel, probes: Sequence[Probe], mix: Mix | None) -> list[list[float]]:
    """Log-probabilities of the completions' tokens and of the end of text."""
    ids, starts = [probe.ids for probe in probes], [probe.start for probe in probes]
    return [found.tolist() for found in language.logprobs(ids, [mix] * len(probes), starts)]


def _compare(
    service: "Service", examples: Sequence[GoldenExample], found: Sequence[Sequence[float]], name: str
) -> None:
    tolerance = TOLERANCE[service.settings.dtype]
    for index, (example, values) in enumerate(zip(examples, found, strict=False)):
        what = "logits" if example.completion is None else "log-probabilities"
        expected = np.array(example.logits if example.completion is None else example.logprobs)
        if len(values) != len(expected):
            raise GoldenError(f"golden example {index} of {name} has {len(expected)} {what}, here it has {len(values)}")
        apart = float(np.abs(np.array(values) - expected).max(initial=0.0))
        if not apart <= tolerance * max(1.0, float(np.abs(expected).max(initial=0.0))):  # also when it is NaN
            raise GoldenError(
                f"golden example {index} of {name}: expected {what} {_short(expected)}, got {_short(values)}; "
                "the adapter was made for other weights, another tokenizer or another version"
            )


def _short(values: object) -> str:
    return str([round(float(value), 4) for value in np.asarray(values)[:6]])
