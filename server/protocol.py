"""The HTTP/1.1 parser with a bound on what it keeps of a request besides its body."""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.edge import MAX_HEADER_BYTES


class BoundedHeaders(HttpToolsProtocol):
    """uvicorn's httptools protocol collects headers and trailers without end; this one drops trailers and cuts off.

    Where a request has no answer yet that is a 400, and in any case the connection's end.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = False
        self._moved_on = False  # body came, or a message ended, in the bytes at hand
        self._unbodied_bytes = 0  # read since then: request line, headers, sizes of chunks, trailers

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; of trailers nothing is kept: the request is already being answered, and nobody here reads them."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """From here on the edge and the routes bound the body."""
        self._in_head = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._moved_on = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The last byte of a request."""
        self._moved_on = True
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        self._moved_on = False
        super().data_received(data)
        self._unbodied_bytes = 0 if self._moved_on else self._unbodied_bytes + len(data)
        if self._unbodied_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._cut_off()

    def _cut_off(self) -> None:
        if self._in_head or not self.cycle.response_started:
            self.send_400_response(f"Request line, headers and trailers exceed {MAX_HEADER_BYTES} bytes.")
        else:  # a second answer would be read as part of the first
            self.transport.close()
