"""`/v1/graph`: read, replace (If-Match), versions."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Response
from pydantic_core import from_json, to_json

from adapters_store.errors import ConflictError, GraphNotFoundError, InvalidGraphError
from adapters_store.graph import RelationGraph
from server import replies_schema as said
from server.catalog import check_graph
from server.errors import PreconditionError
from server.replies import reply
from server.routes import ActorDep, AllowedDep, ServiceDep
from server.schemas import GraphBody
from server.security import require_all_tasks

router = APIRouter(tags=["graph"])


@router.get("/v1/graph", summary="The relation graph as node-link JSON", response_model=said.Graph)
async def graph(service: ServiceDep, allowed: AllowedDep, version: int | None = None) -> Response:
    """The graph that serves, or an older one with `?version=`, whose ETag is its version.

    Without it the ETag is the store's latest version, which an edit replaces, even where that one cannot be served.
    """
    require_all_tasks(allowed)
    current = service.catalog
    if version is not None and version != current.graph_version:
        number, document = await service.work(lambda: service.store.graph(version))
        return reply(document, headers={"etag": f'"{number}"'})
    if current.graph is None:
        raise GraphNotFoundError("there is no relation graph to serve; PUT /v1/graph or run `espalier-train relate`")
    number = current.graph_seen if version is None else version
    return reply(await service.work(current.graph.to_json), headers={"etag": f'"{number}"'})


@router.put("/v1/graph", summary="Replace the relation graph", response_model=said.GraphReplaced)
async def replace(
    body: GraphBody,
    service: ServiceDep,
    actor: ActorDep,
    allowed: AllowedDep,
    if_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Checked, published as a new version, and served from the next request on. If-Match: the ETag you fetched."""
    require_all_tasks(allowed)
    current = service.catalog.graph_seen
    if if_match is not None and not _matches(if_match, current):
        raise PreconditionError(f"the graph is at version {current}, If-Match says {if_match}; fetch it and edit again")
    document = await service.work(lambda: _checked(body, service.backbone.encoder.num_layers))
    expected = current if if_match is not None else None
    try:
        number = await service.work(lambda: service.store.publish_graph(document, None, actor, expected))
    except ConflictError as error:
        raise PreconditionError(f"another graph was published meanwhile: {error}") from error
    await service.refresh()
    num_tasks = sum(node["role"] == "task" for node in document["nodes"])
    counts = {"num_tasks": num_tasks, "num_edges": len(document["edges"])}
    return reply({"version": number} | counts, headers={"etag": f'"{number}"'})


def _matches(if_match: str, version: int) -> bool:
    """True if the header is * or lists the version's ETag."""
    tags = [tag.strip().removeprefix("W/").strip('"') for tag in if_match.split(",")]
    return "*" in tags or str(version) in tags


def _checked(body: GraphBody, num_layers: int) -> dict[str, Any]:
    """The graph as plain JSON. Raises InvalidGraphError if it is none, or does not fit the backbone."""
    try:
        found = RelationGraph.from_json(body)
        check_graph(found, num_layers)
        document = found.to_json()
        from_json(to_json(document))  # notes may hold what has no UTF-8, or nest deeper than can be read back
        return document
    except (ValueError, RecursionError) as error:
        raise InvalidGraphError(f"the graph is not plain JSON: {type(error).__name__}") from error


@router.get("/v1/graph/versions", summary="Versions of the graph", response_model=said.GraphVersions)
async def versions(service: ServiceDep) -> Response:
    """All of them, and the one that serves."""
    return reply(
        {"versions": await service.work(service.store.graph_versions), "current": service.catalog.graph_version}
    )
