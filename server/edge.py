"""The outermost layer: request ids, keys, latency, one log line per request. Plain ASGI, so it costs microseconds.

Keys are checked here and denied by default: only PUBLIC paths go without one.
"""

import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ServerError, openai_error, problem, status_of
from server.metrics import Metrics
from server.security import Keys
from server.security import Scope as KeyScope

log = logging.getLogger("espalier.request")
PUBLIC = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json"})
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}\Z")
_OPENAI = ("/v1/embeddings", "/v1/models", "/v1/completions", "/v1/chat")


def is_openai(path: str) -> bool:
    """True where errors are OpenAI's object instead of a problem document."""
    return path.startswith(_OPENAI)


def needed_scope(method: str, path: str) -> KeyScope:
    """Scope a call needs: reading, inferring and explaining are `infer`, whatever changes the server is `admin`."""
    if method in ("GET", "HEAD", "OPTIONS") or path in ("/v1/infer", "/v1/explain", "/v1/embeddings"):
        return "infer"
    return "admin"


class Edge:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, seen = time.perf_counter(), {"status": 500}
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = _request_id(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            refused = self._authenticate(scope, state)
            if refused is None:
                await self._app(scope, receive, send_with_id)
            else:
                await _send_error(send_with_id, scope, refused, request_id)
        finally:
            self._note(scope, seen["status"], time.perf_counter() - start, request_id)

    def _authenticate(self, scope: Scope, state: dict[str, Any]) -> ServerError | None:
        path = scope["path"]
        if path in PUBLIC or path.startswith("/console/"):
            return None
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        try:
            state["key"] = self._keys.check(header.decode("latin-1"), needed_scope(scope["method"], path))
        except ServerError as error:
            return error
        return None

    def _note(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        route = scope.get("route")
        endpoint = getattr(route, "path", "unknown")  # the template, so that names in paths make no new labels
        self._metrics.requests.labels(endpoint, str(status)).inc()
        self._metrics.latency.labels(endpoint).observe(seconds)
        if log.isEnabledFor(logging.INFO) and endpoint not in ("/health", "/ready", "/metrics"):
            log.info("request method=%s endpoint=%s status=%d ms=%.1f id=%s", scope["method"], endpoint, status,
                     1e3 * seconds, request_id)  # fmt: skip


def _request_id(scope: Scope) -> str:
    """The client's id if it is a harmless one, else a new one."""
    given: bytes = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _REQUEST_ID.match(given) else uuid.uuid4().hex


async def _send_error(send: Send, scope: Scope, error: ServerError, request_id: str) -> None:
    status = status_of(error)
    if is_openai(scope["path"]):
        body, media = openai_error(status, error.code, str(error)), b"application/json"
    else:
        body, media = problem(status, error.code, str(error), request_id), b"application/problem+json"
    headers = [(b"content-type", media)] + ([(b"www-authenticate", b"Bearer")] if status == 401 else [])
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})
