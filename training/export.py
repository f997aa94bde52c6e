"""What comes out of a run: every task's adapter as `manifest.json` and `tensors.safetensors`, as publish reads them."""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save

from adapters_store.adapter import Adapter, check, pack, unpack
from adapters_store.manifest import Backbone, GenerationSpec, GoldenExample, Manifest, digest_of
from adapters_store.mixing import Mix
from training import objectives
from training.backbone import LoadedBackbone
from training.errors import RunError
from training.tasks import Task

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
    generation: GenerationSpec | None = None,
) -> Manifest:
    """The manifest of a trained adapter as version 1; the store gives it its number when it is published."""
    packed = pack(adapter)
    blob = save(packed.tensors)
    return Manifest(
        name=task.name, version=1, task=task.name, kind=kind, hyperparameters=dict(hyperparameters),
        sites=packed.sites, tensors=packed.specs, head=packed.head, generation=generation, backbone=fingerprint,
        blob=digest_of(blob), size_bytes=len(blob), metrics=dict(metrics), provenance=dict(provenance),
        golden=tuple(golden), created_at=datetime.datetime.now(datetime.UTC),
    )  # fmt: skip


def golden(backbone: LoadedBackbone, adapter: Adapter, task: Task) -> list[GoldenExample]:
    """A few short held-out examples and what the adapter alone gives on them on a float32 backbone."""
    objective = objectives.trained(task, adapter, backbone)
    with resident(backbone, adapter) as mix:
        return objective.golden(backbone.encoder, mix, task.dev or task.test or task.train)


@contextmanager
def resident(backbone: LoadedBackbone, adapter: Adapter, slot: int = 0) -> Iterator[Mix | None]:
    """While inside, the adapter is in a slot; the mix that asks for it alone."""
    encoder = backbone.encoder
    check(adapter, encoder.sites, max_rank=_NO_LIMIT, allow_zero=True)
    try:
        if adapter.entries:
            encoder.sites.put(slot, adapter.entries)
        yield Mix.one_hot(slot, encoder.num_layers) if adapter.entries else None
    finally:
        encoder.sites.drop(slot)
