"""The HTTP endpoints, by subject. Routes translate; what they call does the work and raises; nothing is caught here."""

from typing import Annotated

from fastapi import Depends, Request

from server.service import Service

# async, though they wait for nothing: FastAPI would run plain functions in threads, which costs more than a call


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _allowed_tasks(request: Request) -> frozenset[str] | None:
    tasks: frozenset[str] | None = request.state.key.tasks
    return tasks


async def _actor(request: Request) -> str:
    name: str = request.state.key.name
    return name


ServiceDep = Annotated[Service, Depends(_service)]
AllowedDep = Annotated[frozenset[str] | None, Depends(_allowed_tasks)]
ActorDep = Annotated[str, Depends(_actor)]
