"""`/v1/adapters…`: list, upload, versions, aliases, residency; and what vLLM's and llama.cpp's users' tools call."""

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile

from adapters_store.errors import AdapterNotFoundError, FormatError
from adapters_store.manifest import Manifest
from adapters_store.references import check_alias, check_name
from server import openai_schema, uploads
from server import replies_schema as said
from server.errors import BadInputError
from server.openai_models import lora_id
from server.replies import reply
from server.routes import ActorDep, AllowedDep, ServiceDep
from server.schemas import AliasRequest, LoraRequest, ResidencyRequest
from server.security import require_tasks
from server.service import Service
from server.uploads import PARTS, Upload

_FILE = {"type": "string", "format": "binary"}
_UPLOAD_BODY = {
    "required": True,
    "content": {"multipart/form-data": {"schema": {
        "type": "object",
        "required": ["name", "task"],
        "properties": {"name": {"type": "string"}, "task": {"type": "string"}, "alias": {"type": "string"}}
        | dict.fromkeys(PARTS, _FILE),
    }}},
}  # fmt: skip
Allowed = frozenset[str] | None


router = APIRouter(tags=["adapters"])


@router.get("/v1/adapters", summary="All adapters", response_model=said.Adapters)
async def adapters(service: ServiceDep, allowed: AllowedDep) -> Response:
    """Names, versions, aliases, residency, of the tasks that the key may use."""
    described = [_described(service, name) for name in sorted(service.catalog.manifests)]
    return reply({"adapters": [one for one in described if allowed is None or one["task"] in allowed]})


@router.get("/v1/adapters/{name}", summary="One adapter", response_model=said.AdapterDetails)
async def adapter(name: str, service: ServiceDep, allowed: AllowedDep) -> Response:
    """404 if there is no such adapter."""
    _resolve(service, check_name(name), allowed)
    versions = service.catalog.manifests[name]
    details = {"manifests": [_version(service, manifest) for manifest in versions.values()]}
    return reply(_described(service, name) | details)


@router.get("/v1/adapters/{name}/versions/{version}", summary="One version", response_model=said.Version)
async def version(name: str, version: int, service: ServiceDep, allowed: AllowedDep) -> Response:
    """The manifest, and where its tensors are now."""
    return reply(_version(service, _resolve(service, f"{name}@{version}", allowed)))


@router.post(
    "/v1/adapters",
    status_code=201,
    summary="Upload, check and publish a version",
    response_model=said.Uploaded,
    openapi_extra={"requestBody": _UPLOAD_BODY},
)
async def upload(request: Request, service: ServiceDep, actor: ActorDep, allowed: AllowedDep) -> Response:
    """Form fields name, task, alias; files as PEFT or as we write them, each under its file name as the part's name."""
    async with request.form(max_files=len(PARTS), max_fields=8, max_part_size=2**20) as form:
        files = {part: await value.read() for part, value in form.multi_items() if isinstance(value, UploadFile)}
        fields = {part: value for part, value in form.multi_items() if isinstance(value, str)}
    unknown = sorted((set(files) - set(PARTS)) | (set(fields) - {"name", "task", "alias"} - set(PARTS)))
    if unknown:
        raise FormatError(f"unknown parts {unknown}; known are name, task, alias and the files {', '.join(PARTS)}")
    files |= {part: value.encode() for part, value in fields.items() if part in PARTS}  # sent without a file name
    missing = sorted({"name", "task"} - set(fields))
    if missing:
        raise FormatError(f"form field {missing[0]!r} is missing: an upload needs name, task and files")
    require_tasks(allowed, {fields["task"], *_tasks_of(service, fields["name"])})
    wanted = Upload(fields["name"], fields["task"], fields.get("alias") or None, files, actor)
    return reply(await uploads.publish(service, wanted), 201)


@router.put("/v1/adapters/{name}/aliases/{alias}", summary="Promote or roll back", response_model=said.Promoted)
async def promote(
    name: str, alias: str, body: AliasRequest, service: ServiceDep, actor: ActorDep, allowed: AllowedDep
) -> Response:
    """Point an alias at a version; the next request follows it, those in flight finish where they began."""
    check_alias(alias)
    _resolve(service, f"{name}@{body.version}", allowed)
    record = await service.work(lambda: service.store.set_alias(name, alias, body.version, actor))
    await service.refresh()
    return reply({"name": name, "alias": alias} | record.model_dump(mode="json"))


@router.delete("/v1/adapters/{name}/versions/{version}", summary="Delete a version", response_model=said.Deleted)
async def delete(name: str, version: int, service: ServiceDep, actor: ActorDep, allowed: AllowedDep) -> Response:
    """Delete a version: new requests do not find it, those in flight finish. 409 while an alias points at it."""
    manifest = _resolve(service, f"{name}@{version}", allowed)
    await service.work(lambda: service.store.delete(name, version, actor))
    await service.refresh()
    if not any(m.digest == manifest.digest for all_ in service.catalog.manifests.values() for m in all_.values()):
        await service.residency.unload([manifest], service.settings.drain_s)
    return reply({"name": name, "version": version, "deleted": True})


@router.post("/v1/adapters/{name}/load", summary="Make resident", response_model=said.Loaded)
async def load(name: str, service: ServiceDep, allowed: AllowedDep, body: ResidencyRequest | None = None) -> Response:
    """Bring a version to the device now instead of at its first request."""
    chosen = f"{name}@{body.version}" if body and body.version else name
    return reply(await _load(service, chosen, allowed))


@router.post("/v1/adapters/{name}/unload", summary="Take off the device; drains", response_model=said.Unloaded)
async def unload(name: str, service: ServiceDep, allowed: AllowedDep, body: ResidencyRequest | None = None) -> Response:
    """Take versions off the device once nobody holds them. They load again when asked for; DELETE takes them away."""
    return reply(await _unload(service, f"{name}@{body.version}" if body and body.version else name, allowed))


@router.post("/v1/load_lora_adapter", summary="As vLLM has it", response_model=said.Loaded)
async def load_lora(body: LoraRequest, service: ServiceDep, allowed: AllowedDep) -> Response:
    """lora_name, and lora_path if given, are store references to one version; never a path or URL."""
    reference = body.lora_path or body.lora_name
    wanted, served = _resolve(service, reference, allowed), _resolve(service, body.lora_name, allowed)
    if wanted.digest != served.digest:  # `model` will say lora_name, and must not get something else
        raise BadInputError(
            f"{body.lora_name!r} is {served.reference} here, not {wanted.reference}: leave lora_path out, "
            f"and load and ask for {wanted.reference!r}"
        )
    return reply(await _load(service, reference, allowed))


@router.post("/v1/unload_lora_adapter", summary="As vLLM has it", response_model=said.Unloaded)
async def unload_lora(body: LoraRequest, service: ServiceDep, allowed: AllowedDep) -> Response:
    """lora_name is a store reference."""
    return reply(await _unload(service, body.lora_name, allowed))


@router.get("/lora-adapters", summary="As llama.cpp has it", response_model=openai_schema.LoraAdapters)
async def lora_adapters(service: ServiceDep, allowed: AllowedDep) -> Response:
    """The numbers that `lora` in a body may give instead of names."""
    names = [
        name for name in service.catalog.manifests if allowed is None or service.catalog.resolve(name).task in allowed
    ]
    listed = [{"id": lora_id(name), "path": name, "scale": 0.0} for name in names]
    return reply(sorted(listed, key=lambda one: service.catalog.resolve(str(one["path"])).created_at))


def _resolve(service: Service, reference: str, allowed: Allowed) -> Manifest:
    """The version meant. Raises AdapterNotFoundError, also for what the key may not use: it shall not learn of it."""
    manifest = service.catalog.resolve(reference)
    if allowed is not None and not _tasks_of(service, manifest.name) <= allowed:
        raise AdapterNotFoundError(f"no {reference} that this key may use")
    return manifest


def _tasks_of(service: Service, name: str) -> set[str]:
    """Tasks of all versions of a name."""
    return {manifest.task for manifest in service.catalog.manifests.get(name, {}).values()}


async def _load(service: Service, reference: str, allowed: Allowed) -> dict[str, Any]:
    manifest = _resolve(service, reference, allowed)
    service.residency.release(await service.residency.lease([manifest]))
    return {"name": manifest.name, "version": manifest.version, "state": service.residency.state(manifest)}


async def _unload(service: Service, reference: str, allowed: Allowed) -> dict[str, Any]:
    manifest = _resolve(service, reference, allowed)
    chosen = [manifest] if "@" in reference else list(service.catalog.manifests[manifest.name].values())
    gone = await service.residency.unload(chosen, service.settings.drain_s)
    return {"name": manifest.name, "unloaded": sorted(m.version for m in gone)}


def _described(service: Service, name: str) -> dict[str, Any]:
    versions = service.catalog.manifests[name]
    latest = versions[max(versions)]
    return {
        "name": name, "task": latest.task, "kind": latest.kind, "latest": latest.version,
        "versions": sorted(versions), "aliases": dict(service.catalog.aliases.get(name, {})),
        "resident": sorted(n for n, m in versions.items() if service.residency.state(m) == "device"),
    }  # fmt: skip


def _version(service: Service, manifest: Manifest) -> dict[str, Any]:
    return {
        "manifest": manifest.model_dump(mode="json"),
        "reference": manifest.reference,
        "digest": manifest.digest,
        "state": service.residency.state(manifest),
    }
