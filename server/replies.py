"""How answers and errors leave: JSON, problem documents, OpenAI's errors; and how a client that leaves is noticed."""

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from adapters_store.errors import EspalierError
from server import logs
from server.edge import is_openai
from server.errors import OverloadedError, openai_error, problem, status_of
from server.openai_schema import OpenAIError
from server.replies_schema import Problem

Result = TypeVar("Result")
log = logging.getLogger("espalier.request")
_CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
    499: "client_left",
}
_MEANING = {
    400: "the body is no JSON", 401: "no key, or an unknown one", 403: "the key may not do this",
    404: "unknown task, adapter or version", 409: "somebody else was first", 412: "If-Match names another version",
    413: "too large", 415: "not JSON", 422: "cannot be processed; `code` says why", 429: "too much is waiting",
    431: "headers too large", 500: "our fault", 503: "starting or stopping",
}  # fmt: skip


def _documented(model: type[BaseModel], media: str) -> dict[int | str, dict[str, Any]]:
    schema = {"schema": model.model_json_schema()}
    if "$defs" in schema["schema"]:  # one level is all there is
        schema = {"schema": _inlined(schema["schema"])}
    return {status: {"description": text, "content": {media: schema}} for status, text in _MEANING.items()}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    definitions = schema.pop("$defs")
    found = {name: definitions[part["$ref"].rsplit("/", 1)[1]] for name, part in schema["properties"].items()}
    return schema | {"properties": found}


DOCUMENTED = _documented(Problem, "application/problem+json")
OPENAI_DOCUMENTED = _documented(OpenAIError, "application/json")


def reply(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(to_json(content), status, headers, "application/json")


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What work gives; it is cancelled as soon as the client leaves, and nobody reads the 499 that comes then."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # heard, also if nobody waits any more
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client left")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def install(app: FastAPI) -> None:
    """Errors of every sort become one of the two documents."""
    app.add_exception_handler(EspalierError, _on_known)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)


def _error(request: Request, status: int, code: str, detail: str, *, index: int | None = None, param: str | None = None,
           headers: Mapping[str, str] | None = None) -> Response:  # fmt: skip
    detail = _printable(detail)
    if is_openai(request.url.path):
        status = 400 if status == 422 else status  # OpenAI's clients know no 422
        return reply(openai_error(status, code, detail, param), status, headers)
    where = {} if index is None else {"index": index}
    document = problem(status, code, detail, request.state.request_id, **where)
    return Response(to_json(document), status, headers, "application/problem+json")


async def _on_known(request: Request, error: Exception) -> Response:
    assert isinstance(error, EspalierError), "our bug: registered for EspalierError"
    status = status_of(error)
    if status >= 500:
        logs.note(log, "failed", logging.ERROR, id=request.state.request_id, code=error.code, detail=str(error))
    headers = {"retry-after": str(error.retry_after_s)} if isinstance(error, OverloadedError) else None
    return _error(request, status, error.code, str(error), index=getattr(error, "index", None), headers=headers)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), "our bug: registered for RequestValidationError"
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", first["msg"])
        return _error(request, 400, "bad_json", f"the body is not JSON: {why}")
    if first["loc"] == ("body",) and not _says_json(request):
        return _error(request, 415, "unsupported_media_type", "send JSON with 'content-type: application/json'")
    where = [part for part in first["loc"] if part != "body"]
    place, said = ".".join(map(str, where)), first["msg"].removeprefix("Value error, ")
    param = str(where[0]) if where else None  # what follows may be names of types
    if first["type"] == "extra_forbidden":
        said, place = "no such field", ", ".join(_unknown(error))
        param = place
    detail = f"{place}: {said}" if place else said
    index = where[1] if len(where) > 1 and where[0] == "inputs" and isinstance(where[1], int) else None
    return _error(request, 422, "invalid_request", detail, index=index, param=param and _printable(param))


def _unknown(error: RequestValidationError) -> list[str]:
    """All fields that nobody knows, so that a client is not told one after the other."""
    found = [one["loc"][1:] for one in error.errors() if one["type"] == "extra_forbidden"]
    return [".".join(map(str, where)) for where in found]


def _says_json(request: Request) -> bool:
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media == "application/json" or media.endswith("+json")


def _printable(text: str) -> str:
    """The text with the lone surrogates that a client may send written out, for they have no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "our bug: registered for HTTPException"
    code = _CODES.get(error.status_code, "http_error")
    return _error(request, error.status_code, code, str(error.detail), headers=error.headers)
