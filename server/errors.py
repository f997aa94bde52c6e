"""What the server refuses, and with what status: one table for the native API and the OpenAI API.

ServerError
├── OverloadedError        the queue is full; try again
├── DrainingError          the server is stopping
├── HeadersTooLargeError   more bytes before the body than anybody needs
├── UnauthorizedError      no key, or an unknown one
├── ForbiddenError         a key without the scope or the task
├── PreconditionError      If-Match names another version than the current one
├── TooManyAdaptersError   one request needs more adapters than there are slots
├── NoHeadError            the task's adapter has no head to answer with
├── ModelNotFoundError     OpenAI's `model` is neither the backbone, nor a task, nor an adapter
├── NoGenerationError      the backbone makes no text
├── BadInputError          an input that is well formed but cannot be answered
│   └── ContextLengthError     prompt and completion are longer than the backbone's context
├── NotServedError         an upload was published, and then this server could not load it
├── NotFiniteAnswerError   a composition whose numbers left what the dtype can hold
├── BatchFailedError       the forward pass of the row's batch failed
└── UnforeseenError        our fault; the log says more
"""

from typing import Any

from adapters_store import errors as store
from adapters_store.backbones import BackboneNotFoundError


class ServerError(store.EspalierError):
    """Base of what only the server raises."""


class OverloadedError(ServerError):
    """The queue is full."""

    code = "overloaded"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DrainingError(ServerError):
    """The server is stopping and takes nothing new."""

    code = "draining"


class HeadersTooLargeError(ServerError):
    """More bytes in query and headers than the server reads."""

    code = "headers_too_large"


class UnauthorizedError(ServerError):
    """No API key, or an unknown one."""

    code = "unauthorized"


class ForbiddenError(ServerError):
    """The key, or without keys the page it comes from, may not do this."""

    code = "forbidden"


class PreconditionError(ServerError):
    """If-Match named another version than the current one."""

    code = "precondition_failed"


class TooManyAdaptersError(ServerError):
    """One request needs more adapters than fit on the device."""

    code = "too_many_adapters"


class NoHeadError(ServerError):
    """The adapter that should answer has no head."""

    code = "no_head"


class BadInputError(ServerError):
    """An input that is well formed but cannot be answered."""

    code = "invalid_input"


class ContextLengthError(BadInputError):
    """Prompt and completion do not fit the backbone's context."""

    code = "context_length_exceeded"  # as OpenAI calls it


class NoGenerationError(ServerError):
    """The backbone is an encoder, or the server runs without generation."""

    code = "no_generation"


class ModelNotFoundError(ServerError):
    """`model` names nothing that the server has."""

    code = "model_not_found"


class NotServedError(ServerError):
    """An upload was published, and then this server could not load it."""

    code = "not_served"


class NotFiniteAnswerError(ServerError):
    """A composition gave NaN or infinity."""

    code = "not_finite_answer"


class BatchFailedError(ServerError):
    """The forward pass that a row was in failed."""

    code = "forward_failed"


class UnforeseenError(ServerError):
    """Anything that no other class says."""

    code = "internal"


# The most specific class listed wins.
STATUS: dict[type[Exception], int] = {
    store.EspalierError: 500,
    store.NotFoundError: 404,
    store.InvalidError: 422,
    store.RefusedError: 422,
    store.TooLargeError: 413,
    store.CorruptError: 500,
    store.ConflictError: 409,
    BackboneNotFoundError: 500,
    OverloadedError: 429,
    DrainingError: 503,
    HeadersTooLargeError: 431,
    UnauthorizedError: 401,
    ForbiddenError: 403,
    PreconditionError: 412,
    TooManyAdaptersError: 422,
    NoHeadError: 422,
    ModelNotFoundError: 404,
    NoGenerationError: 404,
    BadInputError: 422,
    ContextLengthError: 422,
    NotServedError: 500,
    NotFiniteAnswerError: 422,
    BatchFailedError: 500,
    UnforeseenError: 500,
}

TITLES = {
    400: "Bad request", 401: "Unauthorized", 403: "Forbidden", 404: "Not found", 405: "Method not allowed",
    409: "Conflict", 412: "Precondition failed", 413: "Too large", 415: "Unsupported media type",
    422: "Cannot be processed", 429: "Too many requests", 431: "Headers too large", 499: "Client left",
    500: "Internal error", 503: "Unavailable",
}  # fmt: skip


def status_of(error: Exception) -> int:
    """HTTP status of an error; 500 for what nobody foresaw."""
    return next((STATUS[cls] for cls in type(error).__mro__ if cls in STATUS), 500)


def problem(status: int, code: str, detail: str, request_id: str, **extra: Any) -> dict[str, Any]:
    """An RFC 9457 problem document."""
    return {
        "type": f"urn:espalier:{code}", "title": TITLES.get(status, "Error"), "status": status,
        "code": code, "detail": detail, "request_id": request_id, **extra,
    }  # fmt: skip


def openai_error(status: int, code: str, detail: str, param: str | None = None) -> dict[str, Any]:
    """The same as OpenAI's clients expect it."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": detail, "type": kind, "param": param, "code": code}}
