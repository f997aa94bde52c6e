"""Server-sent events as OpenAI's clients read them: `data: {…}` and an empty line, `data: [DONE]` at the end.

The first event is awaited before the headers leave, so what goes wrong before it is an ordinary HTTP error; what goes
wrong later is an event of its own, after which the stream ends. A client that leaves cancels the events at once.
"""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Request, Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from adapters_store.errors import EspalierError
from server import logs
from server.errors import UnforeseenError, openai_error, status_of
from server.replies import unless_gone

log = logging.getLogger("espalier.request")
DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # nobody on the way may keep or collect events


def event(content: object) -> bytes:
    """One event, as it goes over the wire."""
    return b"data: " + to_json(content) + b"\n\n"


class EventStream(Response):
    """A response that sends pieces, each of one event or more, as they come."""

    def __init__(self, pieces: AsyncGenerator[bytes, None]) -> None:
        super().__init__(None, 200, _HEADERS, "text/event-stream")
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        self._pieces = pieces
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the pieces end or the client leaves."""
        request = Request(scope, receive)
        try:
            await unless_gone(request, self._send_all(request, send))
        except HTTPException:  # the client left; there is nobody to tell
            if not self._is_started:
                raise

    async def _send_all(self, request: Request, send: Send) -> None:
        async with aclosing(self._pieces) as pieces:
            try:
                async for piece in pieces:
                    await self._send(send, piece)
            except EspalierError as error:
                if not self._is_started:
                    raise
                await self._send(send, _error_event(request, error))
            except Exception:
                if self._is_started:
                    await self._end(send, _error_event(request, UnforeseenError("the server's log has the request id")))
                raise
            await self._end(send)

    async def _send(self, send: Send, piece: bytes) -> None:
        if not self._is_started:
            self._is_started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": piece, "more_body": True})

    async def _end(self, send: Send, piece: bytes = b"") -> None:
        await send({"type": "http.response.body", "body": piece, "more_body": False})


def _error_event(request: Request, error: EspalierError) -> bytes:
    status = status_of(error)
    if status >= 500:
        logs.note(log, "failed", logging.ERROR, id=request.state.request_id, code=error.code, detail=str(error))
    return event(openai_error(status, error.code, str(error)))
