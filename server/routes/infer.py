"""`/v1/infer`, `/v1/explain`, `/v1/tasks`."""

from typing import Any

from fastapi import APIRouter, Request, Response

from adapters_store.errors import TaskNotFoundError
from server import inference
from server import replies_schema as said
from server.compose import Ask
from server.replies import reply, unless_gone
from server.routes import AllowedDep, ServiceDep
from server.schemas import InferRequest
from server.service import Service

router = APIRouter(tags=["inference"])


@router.post("/v1/infer", summary="Answer task-tagged texts; mixed tasks in one call", response_model=said.Inferred)
async def infer(body: InferRequest, request: Request, service: ServiceDep, allowed: AllowedDep) -> Response:
    """One output per input, in order; inputs with `tasks` give one per task. One bad input refuses the call."""
    answer = await unless_gone(request, inference.infer(service, body, allowed))
    request.state.facts = {"rows": len(answer["outputs"])} | answer["usage"] | answer["timing"]
    return reply({"id": request.state.request_id, **answer})


@router.post(
    "/v1/explain",
    summary="The composition each input would get, per layer, without running it",
    response_model=said.Explained,
)
async def explain(body: InferRequest, request: Request, service: ServiceDep, allowed: AllowedDep) -> Response:
    """The same body as `/v1/infer`."""
    return reply({"id": request.state.request_id, **inference.explain(service, body, allowed)})


@router.get(
    "/v1/tasks", summary="All tasks, their labels, prior rows and default compositions", response_model=said.Tasks
)
async def tasks(service: ServiceDep, allowed: AllowedDep) -> Response:
    """Tasks that the key may use."""
    names = [task for task in service.catalog.tasks if allowed is None or task in allowed]
    return reply({"tasks": [_described(service, task) for task in names]})


@router.get("/v1/tasks/{task}", summary="One task", response_model=said.Task)
async def task(task: str, service: ServiceDep, allowed: AllowedDep) -> Response:
    """404 for a task that does not exist, or that the key may not use."""
    if task not in service.catalog.task_set or (allowed is not None and task not in allowed):
        known = [name for name in service.catalog.tasks if allowed is None or name in allowed]
        raise TaskNotFoundError(f"no task {task!r}; tasks are: {', '.join(known[:20])}")
    return reply(_described(service, task))


def _described(service: Service, task: str) -> dict[str, Any]:
    catalog = service.catalog
    manifest = catalog.manifest_of_task(task) if catalog.has_module(task) else None
    in_graph = catalog.graph is not None and task in catalog.graph.nodes
    prior = catalog.prior.row(task) if catalog.prior and in_graph else {task: 1.0}
    head = manifest.head if manifest else None
    described: dict[str, Any] = {
        "task": task,
        "adapter": manifest.reference if manifest else None,
        "kind": manifest.kind if manifest else None,
        "answers": "label" if head else "text" if service.generator else None,
        "labels": list(head.labels) if head else [],
        "label_texts": head.label_texts if head else {},
        "in_graph": in_graph,
        "prior": {module: round(weight, 6) for module, weight in prior.items()},
    }
    if manifest and described["answers"]:
        ask = Ask(task=task)
        described["composition"] = service.composer.compose(ask, catalog).brief
    return described
