"""How large a body may be, by route. What exceeds it is a 413 problem, told before the rest of the body is read."""

from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters_store.errors import TooLargeError

MAX_JSON_BYTES = 16 * 2**20
MAX_GRAPH_BYTES = 256 * 2**20  # 10,000 tasks with 50 edges each take about 50 MB


class BodyLimit:
    """ASGI middleware that raises TooLargeError; nothing that the app then wants to send leaves."""

    def __init__(self, app: ASGIApp, limits: Mapping[tuple[str, str], int]) -> None:
        """limits: (method, path) -> bytes, where it is not MAX_JSON_BYTES."""
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        limit = self._limits.get((scope["method"], scope["path"]), MAX_JSON_BYTES)
        error = TooLargeError(f"the body exceeds {limit} bytes")
        if _declared(scope) > limit:
            raise error
        read = 0

        async def receive_within() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise error
            return message

        async def send_within(message: Message) -> None:
            if read <= limit:
                await send(message)

        try:
            await self._app(scope, receive_within, send_within)
        finally:
            if read > limit:
                raise error  # whatever the app made of it


def _declared(scope: Scope) -> int:
    """Content-Length; 0 if it is not given or no number, for then the bytes are counted."""
    given = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    return int(given) if given.isdigit() else 0
