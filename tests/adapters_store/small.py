"""A small adapter by hand, and the facts it is published with."""

from pathlib import Path
from typing import Any

import torch

from adapters_store.adapter import Adapter
from adapters_store.manifest import Backbone, HeadSpec, Manifest
from adapters_store.primitives import Entry
from adapters_store.primitives.head import Head
from adapters_store.store import AdapterStore

BACKBONE = Backbone(architecture="BertModel", config_digest="sha256:c", weights_digest="sha256:w")
GRAPH: dict[str, Any] = {
    "nodes": [{"id": "books"}, {"id": "dvd"}],
    "edges": [{"source": "books", "target": "dvd", "weight": 0.5}],
}


def small_adapter(seed: int = 0, width: int = 8) -> Adapter:
    """Low rank at two sites and a head of two labels; another seed, other numbers."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    entries = [
        Entry(f"encoder.layer.{i}.x", "lowrank", {"A": randn(2, width), "B": randn(width, 2).half()}, {"scale": 2.0})
        for i in range(2)
    ]
    head = Head(HeadSpec(labels=("a", "b"), tensors={}), {"weight": randn(2, width), "bias": randn(2)})
    return Adapter(entries, head)


def publish(store: AdapterStore, name: str = "books", seed: int = 0, width: int = 8, **facts: Any) -> Manifest:
    """A small adapter in the store."""
    given = {"task": name, "kind": "lora", "backbone": BACKBONE} | facts
    return store.publish(small_adapter(seed, width), name=name, **given)


def assert_same(one: Adapter, other: Adapter) -> None:
    """Both have the same entries and head, bit for bit."""
    assert [(e.site, e.primitive, e.options) for e in one.entries] == [
        (e.site, e.primitive, e.options) for e in other.entries
    ]
    pairs = [(a.tensors, b.tensors) for a, b in zip(one.entries, other.entries, strict=True)]
    assert one.head
    assert other.head
    assert one.head.spec.labels == other.head.spec.labels
    for mine, others in [*pairs, (one.head.tensors, other.head.tensors)]:
        assert mine.keys() == others.keys()
        assert all(mine[key].dtype == others[key].dtype and mine[key].equal(others[key]) for key in mine)


def files(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
