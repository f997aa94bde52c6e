"""OpenAI's endpoints that make text: `/v1/completions`, `/v1/chat/completions`; whole, or as a stream of events."""

from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from server import completions
from server import openai_schema as said
from server.completions import Call
from server.completions_schema import ChatRequest, CompletionRequest
from server.errors import NoGenerationError
from server.replies import OPENAI_DOCUMENTED, reply, unless_gone
from server.routes import AllowedDep, ServiceDep
from server.service import Service
from server.sse import EventStream


async def _generates(service: ServiceDep) -> None:
    """Whatever the body is: without a generator there is nothing to ask for."""
    if service.generator is None:
        raise NoGenerationError(
            f"the backbone {service.backbone.name} makes no text here (an encoder, or --no-generate); "
            "/v1/infer and /v1/embeddings are answered"
        )


def _documented(chunk: str) -> dict[int | str, dict[str, Any]]:
    """The other form that a good answer has, with `stream: true`."""
    text = f"data: {{…}} of {chunk} each, then data: [DONE]; the last chunk has `espalier`"
    return {200: {"content": {"text/event-stream": {"schema": {"type": "string", "description": text}}}}}


router = APIRouter(tags=["openai"], responses=OPENAI_DOCUMENTED, dependencies=[Depends(_generates)])


@router.post(
    "/v1/completions",
    summary="Continue prompts, under a task's composition",
    response_model=said.Completion,
    responses=_documented("text_completion"),
)
async def complete(body: CompletionRequest, request: Request, service: ServiceDep, allowed: AllowedDep) -> Response:
    """`model`: the backbone (no adapters), a task (its composition), or an adapter reference (that one alone)."""
    call = await completions.complete(service, body, allowed, request.state.request_id)
    return await _respond(service, call, request)


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation, under a task's composition",
    response_model=said.ChatCompletion,
    responses=_documented("chat.completion.chunk"),
)
async def converse(body: ChatRequest, request: Request, service: ServiceDep, allowed: AllowedDep) -> Response:
    """`model` as above. The prompt is written by the chat template of the backbone's tokenizer, if it has one."""
    call = await completions.converse(service, body, allowed, request.state.request_id)
    return await _respond(service, call, request)


async def _respond(service: Service, call: Call, request: Request) -> Response:
    request.state.facts = call.facts  # filled when all is said
    if call.body.stream:
        return EventStream(completions.events(service, call))
    return reply(await unless_gone(request, completions.answer(service, call)))
