"""The outermost layer: request ids, keys, latency, one log line per request. Plain ASGI, so it costs microseconds.

Keys are checked here and denied by default: only PUBLIC paths go without one. What no handler foresaw ends here as a
500 with the request's id, and its traceback in the log.
"""

import logging
import re
import time
import uuid
from typing import Any

from pydantic_core import to_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters_store.errors import EspalierError
from server import logs
from server.errors import (
    ForbiddenError,
    HeadersTooLargeError,
    ServerError,
    UnforeseenError,
    openai_error,
    problem,
    status_of,
)
from server.metrics import Metrics
from server.security import ANYONE, Keys
from server.security import Scope as KeyScope

log = logging.getLogger("espalier.request")
PUBLIC = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json"})
MAX_HEADER_BYTES = 64 * 2**10  # request line and headers together
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})  # methods that change nothing
_QUIET = frozenset({"/health", "/ready", "/metrics"})
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}\Z")
_INFERRING = frozenset({"/v1/infer", "/v1/explain", "/v1/embeddings", "/v1/completions", "/v1/chat/completions"})
_OPENAI = ("/v1/embeddings", "/v1/models", "/v1/completions", "/v1/chat")


def is_openai(path: str) -> bool:
    """True where errors are OpenAI's object instead of a problem document."""
    return path.startswith(_OPENAI)


def needed_scope(method: str, path: str) -> KeyScope:
    """Scope a call needs: reading, inferring and explaining are `infer`, whatever changes the server is `admin`."""
    if method in _SAFE or path in _INFERRING:
        return "infer"
    return "admin"


class Edge:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, seen = time.perf_counter(), {"status": 0}
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = _request_id(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._admit(scope, state)
            await self._app(scope, receive, send_with_id)
        except EspalierError as error:
            await _send_error(send_with_id, scope, error, request_id)
        except Exception as error:  # noqa: BLE001  # nobody foresaw it; the client must have an answer all the same
            logs.note(log, "unforeseen", logging.ERROR, id=request_id, path=_route(scope), trace=logs.trace_of(error))
            if not seen["status"]:
                unforeseen = UnforeseenError("an error that the server did not foresee; its log has the request id")
                await _send_error(send_with_id, scope, unforeseen, request_id)
        finally:
            self._note(scope, seen["status"] or 499, time.perf_counter() - start)

    def _admit(self, scope: Scope, state: dict[str, Any]) -> None:
        """Put the caller's key into the state. Raises UnauthorizedError, ForbiddenError or HeadersTooLargeError."""
        path = scope["path"]
        if len(scope["query_string"]) + sum(len(n) + len(v) for n, v in scope["headers"]) > MAX_HEADER_BYTES:
            raise HeadersTooLargeError(f"query and headers exceed {MAX_HEADER_BYTES} bytes")
        is_public = path in PUBLIC or path.startswith("/console/")
        try:
            state["key"] = self._keys.check(_header(scope, b"authorization") or "", needed_scope(scope["method"], path))
        except ServerError:
            if not is_public:  # there, a key only lets one see more
                raise
        if state.get("key") is ANYONE:
            _refuse_foreign(scope)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        endpoint = _route(scope)
        self._metrics.requests.labels(endpoint, str(status)).inc()
        self._metrics.latency.labels(endpoint).observe(seconds)
        if endpoint in _QUIET:
            return
        state = scope["state"]
        facts = {"key": state["key"].name} if "key" in state else {}
        logs.note(
            log, "request", method=scope["method"], endpoint=endpoint, status=status, ms=round(1e3 * seconds, 1),
            id=state["request_id"], **facts, **state.get("facts", {}),
        )  # fmt: skip


def _route(scope: Scope) -> str:
    """The route's template, so that names in paths make no new labels and no log entries."""
    return str(getattr(scope.get("route"), "path", "unknown"))


def _header(scope: Scope, name: bytes) -> str | None:
    """The first header of this name, in lower case; None if there is none."""
    return next((value.decode("latin-1") for found, value in scope["headers"] if found == name), None)


def _refuse_foreign(scope: Scope) -> None:
    """Refuse what a page of another site sends through its reader's browser. Raises ForbiddenError.

    Browsers send a form or an upload anywhere without asking, and what they say here no page can forge. Programs say
    nothing of the kind.
    """
    site, origin = _header(scope, b"sec-fetch-site"), _header(scope, b"origin")
    host = _header(scope, b"host")
    foreign = site not in ("same-origin", "none") if site else origin and origin.partition("://")[2] != host
    if foreign and scope["method"] not in _SAFE:
        raise ForbiddenError(
            f"a web page of another origin ({origin or site}) sent this, and without API keys this server takes "
            f"{scope['method']} only from its own pages and from programs: use the page at its own address, {host}, "
            "or start it with --api-keys FILE"
        )


def _request_id(scope: Scope) -> str:
    """The client's id if it is a harmless one, else a new one."""
    given: bytes = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _REQUEST_ID.match(given) else uuid.uuid4().hex


async def _send_error(send: Send, scope: Scope, error: EspalierError, request_id: str) -> None:
    status = status_of(error)
    if is_openai(scope["path"]):
        body, media = openai_error(status, error.code, str(error)), b"application/json"
    else:
        body, media = problem(status, error.code, str(error), request_id), b"application/problem+json"
    content = to_json(body)
    headers = [(b"content-type", media), (b"content-length", str(len(content)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
