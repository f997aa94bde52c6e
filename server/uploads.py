"""An adapter that a client sends while the server serves: read strictly, checked, proved, published, made resident.

Until it is published nothing of it is anywhere; a refusal at any step leaves nothing behind. What goes wrong afterwards
is no refusal: it says that the version is there.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from adapters_store import exchange, peft_format
from adapters_store.adapter import Adapter
from adapters_store.errors import BackboneMismatchError, ConflictError, EspalierError, FormatError
from adapters_store.manifest import GenerationSpec, GoldenExample, Manifest
from adapters_store.references import check_alias, check_name
from adapters_store.tensors import TensorLimits, read_tensors
from server import golden, logs
from server.errors import NotServedError
from server.service import Service

log = logging.getLogger("espalier")
PARTS = (
    "adapter_config.json", "adapter_model.safetensors", "manifest.json", "tensors.safetensors",
    "head.json", "head.safetensors", "examples.jsonl",
)  # fmt: skip


@dataclass(frozen=True)
class Upload:
    """What came: form fields, and files by their part's name."""

    name: str
    task: str
    alias: str | None
    files: dict[str, bytes]
    actor: str


@dataclass(frozen=True)
class Candidate:
    """An adapter that was read but not yet accepted."""

    adapter: Adapter
    kind: str
    hyperparameters: dict[str, Any]
    provenance: dict[str, Any]
    metrics: dict[str, float]
    golden: tuple[GoldenExample, ...]
    generation: GenerationSpec | None = None


class _Example(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str
    logits: list[float] = []
    completion: str | None = None
    logprobs: list[float] = []

    @model_validator(mode="after")
    def _says_one_thing(self) -> "_Example":
        if bool(self.logits) == (self.completion is not None) or bool(self.logprobs) != (self.completion is not None):
            raise ValueError("an example has 'logits', or 'completion' with 'logprobs'")
        return self


async def publish(service: Service, upload: Upload) -> dict[str, Any]:
    """The reply to a successful upload: manifest, digest, coverage.

    Raises a RefusedError that says why not, or NotServedError for a version that is published but could not be loaded.
    """
    check_name(upload.name)
    check_name(upload.task, "task")
    if upload.alias is not None:
        check_alias(upload.alias)
    if service.backbone.name.lower() in (upload.name, upload.task):
        raise ConflictError(f"{service.backbone.name!r} is the backbone; an adapter or task of that name would hide it")
    candidate = await service.work(lambda: _read(service, upload))
    await golden.prove(service, candidate.adapter, candidate.golden, upload.name)
    manifest = await service.work(lambda: _publish(service, upload, candidate))
    service.residency.note_proved(manifest)
    await _make_resident(service, manifest, upload.alias)
    return {
        "manifest": manifest.model_dump(mode="json"),
        "reference": manifest.reference,
        "digest": manifest.digest,
        "coverage": _coverage(candidate.adapter),
    }


def _read(service: Service, upload: Upload) -> Candidate:
    """Parse and check; nothing is written."""
    files = upload.files
    if {"adapter_config.json", "adapter_model.safetensors"} <= set(files):
        candidate = _read_peft(service, files)
    elif {"manifest.json", "tensors.safetensors"} <= set(files):
        candidate = _read_ours(service, files)
    else:
        raise FormatError(
            "send adapter_config.json + adapter_model.safetensors (as PEFT writes them) or manifest.json + "
            f"tensors.safetensors (as `espalier-store export` does); got: {', '.join(sorted(files)) or 'no files'}"
        )
    service.check(candidate.adapter)
    return candidate


def _limits(service: Service) -> TensorLimits:
    return TensorLimits(max_bytes=service.settings.max_upload_mb * 2**20)


def _read_peft(service: Service, files: dict[str, bytes]) -> Candidate:
    tensors = read_tensors(files["adapter_model.safetensors"], _limits(service))
    found = peft_format.read_parts(files["adapter_config.json"], tensors, service.backbone.encoder.sites)
    given = read_tensors(files["head.safetensors"], _limits(service)) if "head.safetensors" in files else None
    adapter = peft_format.with_head(found.adapter, files.get("head.json"), given)
    provenance = {"format": "peft", "base_model": found.base_model}
    return Candidate(adapter, "lora", found.hyperparameters, provenance, {}, _examples(files))


def _read_ours(service: Service, files: dict[str, bytes]) -> Candidate:
    uploaded, adapter = exchange.read_parts(files["manifest.json"], files["tensors.safetensors"], _limits(service))
    mine = service.backbone.fingerprint
    if not mine.is_same(uploaded.backbone):
        raise BackboneMismatchError(
            f"the adapter was trained on {uploaded.backbone.architecture} {uploaded.backbone.weights_digest[:19]}…, "
            f"this server runs {mine.architecture} {mine.weights_digest[:19]}…; train it on this backbone"
        )
    examples = _examples(files) or uploaded.golden
    return Candidate(
        adapter,
        uploaded.kind,
        dict(uploaded.hyperparameters),
        dict(uploaded.provenance),
        dict(uploaded.metrics),
        examples,
        uploaded.generation,
    )


def _examples(files: dict[str, bytes]) -> tuple[GoldenExample, ...]:
    """Golden examples of examples.jsonl: {"text", "logits"} per line. Raises FormatError."""
    try:
        lines = [line for line in files.get("examples.jsonl", b"").decode().splitlines() if line.strip()]
        if len(lines) > golden.MAX_EXAMPLES:  # before so many are parsed
            raise FormatError(f"examples.jsonl has {len(lines)} lines, at most {golden.MAX_EXAMPLES} are run")
        parsed = [_Example.model_validate(json.loads(line)) for line in lines]
        return tuple(GoldenExample.model_validate(one.model_dump()) for one in parsed)
    except (ValueError, RecursionError) as error:  # not UTF-8, no JSON, or not this JSON
        raise FormatError(
            'examples.jsonl needs {"text": "…", "logits": [0.1, …]} on each line, '
            'or {"text": "…", "completion": "…", "logprobs": [-0.1, …]} for text'
        ) from error


def _publish(service: Service, upload: Upload, candidate: Candidate) -> Manifest:
    return service.store.publish(
        candidate.adapter, name=upload.name, task=upload.task, kind=candidate.kind,
        backbone=service.backbone.fingerprint, hyperparameters=candidate.hyperparameters, metrics=candidate.metrics,
        provenance=candidate.provenance | {"uploaded_by": upload.actor}, golden=candidate.golden, alias=upload.alias,
        generation=candidate.generation,
        actor=upload.actor,
    )  # fmt: skip


async def _make_resident(service: Service, manifest: Manifest, alias: str | None) -> None:
    """Show a published version to requests and load it. Raises NotServedError, whatever went wrong."""
    try:
        await service.refresh()
        service.residency.release(await service.residency.lease([manifest]))
    except Exception as error:
        logs.note(log, "not_served", logging.ERROR, adapter=manifest.reference, trace=logs.trace_of(error))
        state = f"published, and {alias!r} points at it" if alias else "published"
        why = error if isinstance(error, EspalierError) else "its log says why"
        raise NotServedError(
            f"{manifest.reference} is {state}, but this server could not load it: {why}; do not upload it again: "
            f"POST /v1/adapters/{manifest.name}/load tries anew, and an alias can be moved back"
        ) from error


def _coverage(adapter: Adapter) -> dict[str, Any]:
    """Which sites the adapter touches, and with what: what does nothing would show here."""
    primitives = Counter(entry.primitive for entry in adapter.entries)
    sites = [{"site": entry.site, "primitive": entry.primitive} for entry in adapter.entries]
    return {"num_sites": len({entry.site for entry in adapter.entries}), "primitives": dict(primitives), "sites": sites}
