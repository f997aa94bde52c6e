"""The HTTP/1.1 parser with a bound on what it keeps before a request's headers are complete."""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.edge import MAX_HEADER_BYTES


class BoundedHeaders(HttpToolsProtocol):
    """uvicorn's httptools protocol collects headers without end; this one answers 400 and closes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = False
        self._head_bytes = 0

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """From here on the edge and the routes bound what comes."""
        self._in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        super().data_received(data)
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        if self._head_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"Request line and headers exceed {MAX_HEADER_BYTES} bytes.")
