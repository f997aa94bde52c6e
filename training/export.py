"""What comes out of a run: every task's adapter as `manifest.json` and `tensors.safetensors`, as publish reads them."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save

from adapters_store.adapter import Adapter, check, pack, unpack
from adapters_store.encoder import Encoder
from adapters_store.manifest import Backbone, GoldenExample, Manifest, digest_of
from adapters_store.mixing import Mix
from adapters_store.primitives import head as head_primitive
from adapters_store.primitives.head import Head
from training.backbone import LoadedBackbone
from training.errors import RunError
from training.tasks import Task

NUM_GOLDEN = 3
_NO_LIMIT = 1 << 30  # the server's limit on ranks is the server's to choose


def write(folder: Path, manifest: Manifest, adapter: Adapter) -> None:
    """Write an exported adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tensors.safetensors").write_bytes(save(pack(adapter).tensors))
    (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1) + "\n")


def read(folder: Path) -> tuple[Manifest, Adapter]:
    """An exported adapter. Raises RunError if it is missing or not what its manifest says."""
    try:
        manifest = Manifest.model_validate(json.loads((folder / "manifest.json").read_text()))
        blob = (folder / "tensors.safetensors").read_bytes()
        tensors = load_tensors(blob)
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"{folder} is not an exported adapter: {error}") from error
    if digest_of(blob) != manifest.blob:
        raise RunError(f"{folder}/tensors.safetensors is not the file that its manifest.json describes")
    return manifest, unpack(manifest.sites, manifest.head, tensors)


def manifest_of(
    adapter: Adapter,
    fingerprint: Backbone,
    task: Task,
    *,
    kind: str,
    hyperparameters: Mapping[str, Any],
    metrics: Mapping[str, float],
    provenance: Mapping[str, Any],
    golden: Sequence[GoldenExample],
) -> Manifest:
    """The manifest of a trained adapter as version 1; the store gives it its number when it is published."""
    packed = pack(adapter)
    blob = save(packed.tensors)
    return Manifest(
        name=task.name, version=1, task=task.name, kind=kind, hyperparameters=dict(hyperparameters),
        sites=packed.sites, tensors=packed.specs, head=packed.head, backbone=fingerprint,
        blob=digest_of(blob), size_bytes=len(blob), metrics=dict(metrics), provenance=dict(provenance),
        golden=tuple(golden), created_at=datetime.datetime.now(datetime.UTC),
    )  # fmt: skip


@torch.no_grad()
def golden(backbone: LoadedBackbone, adapter: Adapter, task: Task) -> list[GoldenExample]:
    """The task's shortest held-out texts and the logits that the adapter alone gives them on a float32 backbone."""
    split = task.dev or task.test or task.train
    texts = [
        example.text for example in sorted(split, key=lambda example: (len(example.text), example.text))[:NUM_GOLDEN]
    ]
    rows = logits(backbone, adapter, texts)
    return [GoldenExample(text=text, logits=tuple(row)) for text, row in zip(texts, rows.tolist(), strict=True)]


@torch.no_grad()
def logits(backbone: LoadedBackbone, adapter: Adapter, texts: Sequence[str], slot: int = 0) -> torch.Tensor:
    """(texts, labels) what the adapter alone gives, one text per forward, on the CPU."""
    encoder: Encoder = backbone.encoder
    check(adapter, encoder.sites, max_rank=_NO_LIMIT, allow_zero=True)
    if adapter.entries:
        encoder.sites.put(slot, adapter.entries)
    mix = Mix.one_hot(slot, encoder.num_layers) if adapter.entries else None
    head = head_of(adapter).to(encoder.device)
    spec = head.spec
    rows = backbone.encode(texts, spec.max_length or encoder.max_length)
    pooled = torch.cat([encoder.pool([row], [mix], [spec.pooling]) for row in rows])
    encoder.sites.drop(slot)
    return head_primitive.reference(head, pooled).cpu()


def head_of(adapter: Adapter) -> Head:
    """The adapter's head, which every adapter that is trained here has."""
    if adapter.head is None:
        raise AssertionError("our bug: a classifier without a head")
    return adapter.head
