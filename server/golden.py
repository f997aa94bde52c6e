"""Golden examples: an adapter alone must give the logits that its training promised.

Checked before an upload is published, in the probe slot that no request ever uses, and for what others published when
it first comes to the device, before any request may use it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from adapters_store.adapter import Adapter
from adapters_store.errors import GoldenError
from adapters_store.manifest import GoldenExample, Manifest
from adapters_store.mixing import Mix
from adapters_store.primitives.head import Head
from server.engine import Forwarded, Row

if TYPE_CHECKING:
    from server.service import Service

# Largest difference allowed, relative to the largest logit; lower precision rounds at every layer.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1, "float16": 0.03}


async def check(service: "Service", manifest: Manifest, slot: int | None, head: Head | None) -> None:
    """Run a resident version's examples. Raises GoldenError, naming the example that differs."""
    if not manifest.golden or head is None:
        return
    mix = None if slot is None else Mix.one_hot(slot, service.backbone.encoder.num_layers)
    rows = _rows(service, manifest.golden, head.spec.max_length, lambda ids: Row(ids, mix, head.spec.pooling, head))
    done = await service.engine.run(lambda: service.engine.forward(rows))
    _compare(service, manifest.golden, done, manifest.reference)


async def prove(service: "Service", adapter: Adapter, examples: Sequence[GoldenExample], name: str) -> None:
    """Run an adapter that nobody may use yet, on its examples or any text. Raises GoldenError or RefusedError."""
    encoder, head = service.backbone.encoder, adapter.head
    slot = service.settings.slots  # one beyond those that requests use
    mix = Mix.one_hot(slot, encoder.num_layers) if adapter.entries else None
    pooling = head.spec.pooling if head else service.backbone.default_pooling
    placed = head.to(encoder.device) if head else None
    shown = examples if head else ()
    tried = shown or (GoldenExample(text="does it run at all", logits=()),)
    rows = _rows(service, tried, head.spec.max_length if head else None, lambda ids: Row(ids, mix, pooling, placed))

    def forward() -> Forwarded:
        try:
            if adapter.entries:
                encoder.sites.put(slot, adapter.entries)
            return service.engine.forward(rows)
        finally:
            encoder.sites.drop(slot)

    done = await service.engine.run(forward)
    if not np.isfinite(np.concatenate([np.asarray(values) for values in done.outputs])).all():
        raise GoldenError(f"{name} gives NaN or infinity on {tried[0].text!r}; its numbers are too large to serve")
    _compare(service, shown, done, name)


def _rows(
    service: "Service", examples: Sequence[GoldenExample], limit: int | None, row: Callable[[Sequence[int]], Row]
) -> list[Row]:
    ids = service.backbone.tokenize([example.text for example in examples], [limit] * len(examples))
    return [row(tokens) for tokens in ids]


def _compare(service: "Service", examples: Sequence[GoldenExample], done: Forwarded, name: str) -> None:
    tolerance = TOLERANCE[service.settings.dtype]
    for index, (example, found) in enumerate(zip(examples, done.outputs, strict=False)):
        expected = np.array(example.logits)
        if len(found) != len(expected):
            raise GoldenError(
                f"golden example {index} of {name} has {len(expected)} logits, the head gives {len(found)}"
            )
        apart = float(np.abs(np.array(found) - expected).max())
        if not apart <= tolerance * max(1.0, float(np.abs(expected).max())):  # also when it is NaN
            raise GoldenError(
                f"golden example {index} of {name}: expected logits {_short(expected)}, got {_short(found)}; "
                "the adapter was made for other weights, another tokenizer or another version"
            )


def _short(values: object) -> str:
    return str([round(float(value), 4) for value in np.asarray(values)[:6]])
