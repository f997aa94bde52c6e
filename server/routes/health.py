"""`/health`, `/ready`, `/metrics`, and the console at `/`."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from adapters_store import linear
from adapters_store.encoder import Encoder
from server import replies_schema as said
from server.generation.generator import Generator
from server.generation.pages import PAGE
from server.replies import reply
from server.routes import ServiceDep
from server.service import Service

router = APIRouter(tags=["operations"])
CONSOLE = Path(__file__).parents[1] / "console"


@router.get("/health", summary="The process is alive", response_model=said.Alive)
async def health() -> Response:
    """Always 200."""
    return reply({"status": "ok"})


@router.get("/ready", summary="The backbone is loaded and its adapters are proved", response_model=said.Ready)
async def ready(request: Request, service: ServiceDep) -> Response:
    """503 while starting or draining; to a key it also tells what serves, and which adapters were refused."""
    facts = {"ready": service.unready is None, "reason": service.unready}
    more = _details(service) if hasattr(request.state, "key") else {}
    return reply(facts | more, 200 if service.unready is None else 503)


def _details(service: Service) -> dict[str, Any]:
    encoder = service.backbone.encoder
    return {
        "backbone": service.backbone.name,
        "dtype": service.settings.dtype,
        "device": str(encoder.device),
        "forward": "packed" if encoder.is_packed else "padded",
        "operator_path": service.operator_path,
        "linear_path": _linear_path(encoder),
        "adapters": len(service.catalog.manifests),
        "tasks": len(service.catalog.tasks),
        "graph_version": service.catalog.graph_version,
        "generation": _generation(service.generator, service.settings.prefix_cache) if service.generator else None,
        "refused": service.problems,
    }


def _linear_path(encoder: Encoder) -> str:
    if encoder.device.type != "cpu":
        return f"torch on {encoder.device}"
    if linear.status().active and not encoder.is_laid_out:
        return "torch: the layers are small, or the model reads their weights past them"
    return linear.status().detail


def _generation(generator: Generator, prefix_cache: bool) -> dict[str, Any]:
    decoder = generator.batcher.decoder
    return {
        "forward": "packed" if decoder.is_packed else "padded",
        "attention_path": decoder.attention_path,
        "decoding_path": decoder.decoding_path,
        "greedy_path": decoder.language.greedy_path,
        "max_length": generator.max_length,
        "kv_tokens": decoder.memory.num_pages * PAGE,
        "prefix_cache": prefix_cache,
    }


@router.get("/metrics", summary="Prometheus metrics")
async def metrics(service: ServiceDep) -> Response:
    """All names begin with espalier_."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
async def console() -> Response:
    """A page to look at tasks, adapters and the graph, and to try a text."""
    return FileResponse(CONSOLE / "index.html")


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """The OpenAPI document as a page; it needs nothing from the network."""
    return FileResponse(CONSOLE / "docs.html")
