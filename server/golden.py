"""Golden examples: an adapter alone must give what its training promised: logits, or log-probabilities of a text.

Checked before an upload is published, in the probe slot that no request ever uses, and for what others published when
it first comes to the device, before any request may use it. Only a head gives logits: an upload that promises them
without one is refused; those of a version that is stored already are passed over, as nothing can be compared with them.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

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


async def check(service: "Service", manifest: Manifest, slot: int | None, head: Head | None) -> None:
    """Run a resident version's examples. Raises GoldenError, naming the example that differs."""
    examples = _keepable(manifest.golden, head)
    if not examples:
        return
    mix = None if slot is None else Mix.one_hot(slot, service.backbone.encoder.num_layers)
    found = await service.engine.run(_ready(service, examples, mix, head))
    _compare(service, examples, found, manifest.reference)


async def prove(service: "Service", adapter: Adapter, examples: Sequence[GoldenExample], name: str) -> None:
    """Run an adapter that nobody may use yet, on its examples or any text. Raises GoldenError or RefusedError."""
    encoder, slot = service.backbone.encoder, service.settings.slots  # one beyond those that requests use
    head = adapter.head.to(encoder.device) if adapter.head else None
    mix = Mix.one_hot(slot, encoder.num_layers) if adapter.entries else None
    shown = _keepable(examples, head)
    if len(shown) < len(examples):
        raise GoldenError(
            f"golden examples of {name} promise logits, and it has no head to give them; send head.json and "
            "head.safetensors along, or examples of completions, or none"
        )
    tried = shown or [GoldenExample(text="does it run at all")]
    forward = _ready(service, tried, mix, head)

    def run() -> list[list[float]]:  # in one piece: the slot is the next proof's
        try:
            if adapter.entries:
                encoder.sites.put(slot, adapter.entries)
            return forward()
        finally:
            encoder.sites.drop(slot)

    found = await service.engine.run(run)
    if not np.isfinite(np.concatenate(found)).all():
        raise GoldenError(f"{name} gives NaN or infinity on {tried[0].text!r}; its numbers are too large to serve")
    _compare(service, shown, found, name)


def _keepable(examples: Sequence[GoldenExample], head: Head | None) -> list[GoldenExample]:
    """The examples that a version with this head, or with none, can give at all."""
    return [example for example in examples if head or example.completion is not None]


def _ready(
    service: "Service", examples: Sequence[GoldenExample], mix: Mix | None, head: Head | None
) -> Callable[[], list[list[float]]]:
    """What, on the engine's thread, gives for each example logits, log-probabilities of its completion, or a state.

    Raises GoldenError for completions where nothing is generated.
    """
    rows = _rows(service, [example for example in examples if example.completion is None], mix, head)
    completing = [example for example in examples if example.completion is not None]
    language = service.backbone.language
    if completing and language is None:
        raise GoldenError("the golden examples are of generated text, and this server's backbone does not generate")
    joined = [joined_ids(service.backbone.tokenizer, one.text, one.completion or "") for one in completing]

    def run() -> list[list[float]]:
        pooled = iter(service.engine.forward(rows).outputs if rows else ())
        completed = iter(_logprobs(language, joined, mix) if language and joined else ())
        return [next(pooled if example.completion is None else completed) for example in examples]

    return run


def _rows(service: "Service", examples: Sequence[GoldenExample], mix: Mix | None, head: Head | None) -> list[Row]:
    limit = head.spec.max_length if head else None
    pooling = head.spec.pooling if head else service.backbone.default_pooling
    ids = service.backbone.tokenize([example.text for example in examples], [limit] * len(examples))
    return [Row(tokens, mix, pooling, head) for tokens in ids]


def _logprobs(language: LanguageModel, joined: Sequence[tuple[list[int], int]], mix: Mix | None) -> list[list[float]]:
    """Log-probabilities of the completions' tokens and of the end of text."""
    rows, starts = [ids for ids, _ in joined], [start for _, start in joined]
    found: list[list[float]] = [row.tolist() for row in language.logprobs(rows, [mix] * len(rows), starts)]
    return found


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
