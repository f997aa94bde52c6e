"""`/v1/adapters…`: list, upload, versions, aliases, residency; and vLLM's two endpoints for its users' tools."""

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile

from adapters_store.errors import AdapterNotFoundError, FormatError
from adapters_store.manifest import Manifest
from adapters_store.references import check_alias
from server import uploads
from server.replies import reply
from server.routes import ActorDep, ServiceDep
from server.schemas import AliasRequest, LoraRequest, ResidencyRequest
from server.service import Service
from server.uploads import Upload

PARTS = (
    "adapter_config.json", "adapter_model.safetensors", "manifest.json", "tensors.safetensors",
    "head.json", "head.safetensors", "examples.jsonl",
)  # fmt: skip


def make_router(max_upload_mb: int) -> APIRouter:
    """The router; uploads may be as large as the operator allows."""
    router = APIRouter(tags=["adapters"])
    size = {"max_body_size": max_upload_mb * 2**20 + 2**20}
    router.add_api_route("/v1/adapters", adapters, methods=["GET"], summary="All adapters")
    router.add_api_route(
        "/v1/adapters", upload, methods=["POST"], status_code=201, summary="Upload, check and publish a version",
        openapi_extra={"requestBody": _UPLOAD_BODY}, **size,
    )  # fmt: skip
    router.add_api_route("/v1/adapters/{name}", adapter, methods=["GET"], summary="One adapter")
    router.add_api_route("/v1/adapters/{name}/versions/{version}", version, methods=["GET"], summary="One version")
    router.add_api_route(
        "/v1/adapters/{name}/versions/{version}", delete, methods=["DELETE"], summary="Delete a version"
    )
    router.add_api_route(
        "/v1/adapters/{name}/aliases/{alias}", promote, methods=["PUT"], summary="Promote or roll back"
    )
    router.add_api_route("/v1/adapters/{name}/load", load, methods=["POST"], summary="Make resident")
    router.add_api_route("/v1/adapters/{name}/unload", unload, methods=["POST"], summary="Take off the device; drains")
    router.add_api_route("/v1/load_lora_adapter", load_lora, methods=["POST"], summary="As vLLM has it")
    router.add_api_route("/v1/unload_lora_adapter", unload_lora, methods=["POST"], summary="As vLLM has it")
    return router


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


async def adapters(service: ServiceDep) -> Response:
    """Names, versions, aliases, residency."""
    return reply({"adapters": [_described(service, name) for name in sorted(service.catalog.manifests)]})


async def adapter(name: str, service: ServiceDep) -> Response:
    """404 if there is no such adapter."""
    service.catalog.resolve(name)
    versions = service.catalog.manifests[name]
    details = {"manifests": [_version(service, manifest) for manifest in versions.values()]}
    return reply(_described(service, name) | details)


async def version(name: str, version: int, service: ServiceDep) -> Response:
    """The manifest, and where its tensors are now."""
    return reply(_version(service, service.catalog.resolve(f"{name}@{version}")))


async def upload(request: Request, service: ServiceDep, actor: ActorDep) -> Response:
    """Form fields name, task, alias; files as PEFT or as we write them, each under its file name as the part's name."""
    async with request.form(max_files=len(PARTS), max_fields=8, max_part_size=2**20) as form:
        files = {part: await value.read() for part, value in form.multi_items() if isinstance(value, UploadFile)}
        fields = {part: value for part, value in form.multi_items() if isinstance(value, str)}
    unknown = sorted((set(files) - set(PARTS)) | (set(fields) - {"name", "task", "alias"} - set(PARTS)))
    if unknown:
        raise FormatError(f"unknown parts {unknown}; known are name, task, alias and the files {', '.join(PARTS)}")
    files |= {
        part: value.encode() for part, value in fields.items() if part in PARTS
    }  # sent as fields, without a filename
    missing = sorted({"name", "task"} - set(fields))
    if missing:
        raise FormatError(f"form field {missing[0]!r} is missing: an upload needs name, task and files")
    wanted = Upload(fields["name"], fields["task"], fields.get("alias") or None, files, actor)
    return reply(await uploads.publish(service, wanted), 201)


async def promote(name: str, alias: str, body: AliasRequest, service: ServiceDep, actor: ActorDep) -> Response:
    """Point an alias at a version; the next request follows it, those in flight finish where they began."""
    check_alias(alias)
    service.catalog.resolve(f"{name}@{body.version}")
    record = await service.work(lambda: service.store.set_alias(name, alias, body.version, actor))
    await service.refresh()
    return reply({"name": name, "alias": alias} | record.model_dump(mode="json"))


async def delete(name: str, version: int, service: ServiceDep, actor: ActorDep) -> Response:
    """Delete a version: new requests do not find it, those in flight finish. 409 while an alias points at it."""
    manifest = service.catalog.resolve(f"{name}@{version}")
    await service.work(lambda: service.store.delete(name, version, actor))
    await service.refresh()
    if not any(
        m.digest == manifest.digest for versions in service.catalog.manifests.values() for m in versions.values()
    ):
        await service.residency.unload([manifest], service.settings.drain_s)
    return reply({"name": name, "version": version, "deleted": True})


async def load(name: str, service: ServiceDep, body: ResidencyRequest | None = None) -> Response:
    """Bring a version to the device now instead of at its first request."""
    chosen = f"{name}@{body.version}" if body and body.version else name
    return reply(await _load(service, chosen))


async def unload(name: str, service: ServiceDep, body: ResidencyRequest | None = None) -> Response:
    """Take versions off the device once nobody holds them. They load again when asked for; DELETE takes them away."""
    return reply(await _unload(service, f"{name}@{body.version}" if body and body.version else name))


async def load_lora(body: LoraRequest, service: ServiceDep) -> Response:
    """lora_name, or lora_path if given, is a store reference; never a path or URL."""
    return reply(await _load(service, body.lora_path or body.lora_name))


async def unload_lora(body: LoraRequest, service: ServiceDep) -> Response:
    """lora_name is a store reference."""
    return reply(await _unload(service, body.lora_name))


async def _load(service: Service, reference: str) -> dict[str, Any]:
    manifest = service.catalog.resolve(reference)
    service.residency.release(await service.residency.lease([manifest]))
    return {"name": manifest.name, "version": manifest.version, "state": service.residency.state(manifest)}


async def _unload(service: Service, reference: str) -> dict[str, Any]:
    manifest = service.catalog.resolve(reference)
    chosen = [manifest] if "@" in reference else list(service.catalog.manifests[manifest.name].values())
    gone = await service.residency.unload(chosen, service.settings.drain_s)
    return {"name": manifest.name, "unloaded": sorted(m.version for m in gone)}


def _described(service: Service, name: str) -> dict[str, Any]:
    versions = service.catalog.manifests.get(name)
    if not versions:
        raise AdapterNotFoundError(f"no adapter {name!r}")
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
