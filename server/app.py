"""The ASGI application: routes over one Service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from server import replies
from server.config import Settings
from server.edge import Edge
from server.limits import MAX_GRAPH_BYTES, BodyLimit
from server.replies import DOCUMENTED
from server.routes import adapters, completions, graph, health, infer, openai
from server.security import Keys
from server.service import Service


def make_app(service: Service) -> FastAPI:
    """The application of a service, which starts and stops with it. Raises ValueError for an unusable key file."""
    settings: Settings = service.settings
    keys = Keys.read(settings.api_keys)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="Espalier", summary="Many task adapters, composed by a relation graph, on one backbone",
        version=_version(), lifespan=lifespan, responses=DOCUMENTED,
        docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.state.service = service
    for part in (infer, adapters, graph, openai, completions, health):
        app.include_router(part.router)
    app.mount("/console", StaticFiles(directory=health.CONSOLE), name="console")
    replies.install(app)
    limits = {
        ("PUT", "/v1/graph"): MAX_GRAPH_BYTES,
        ("POST", "/v1/adapters"): settings.max_upload_mb * 2**20 + 2**20,
    }
    app.add_middleware(BodyLimit, limits=limits)
    app.add_middleware(Edge, keys=keys, metrics=service.metrics)
    return app


def _version() -> str:
    try:
        return version("espalier")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
