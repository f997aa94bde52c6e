"""What replies of the OpenAI endpoints look like, for the OpenAPI document."""

from typing import Literal

from pydantic import BaseModel

from server.replies_schema import Composition


class OpenAIProblem(BaseModel):
    """The error object of the OpenAI endpoints."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(BaseModel):
    """An error as OpenAI's clients expect it."""

    error: OpenAIProblem


class Model(BaseModel):
    """A model as OpenAI lists it; `kind` and `parent` are ours."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["backbone", "task", "adapter"]
    parent: str | None


class Models(BaseModel):
    """Reply of `GET /v1/models`."""

    object: Literal["list"]
    data: list[Model]


class Embedding(BaseModel):
    """One vector: floats, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """What an embeddings call cost."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingExtras(BaseModel):
    """Ours: which composition gave the vectors."""

    composition: Composition


class Embeddings(BaseModel):
    """Reply of `POST /v1/embeddings`."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
    espalier: EmbeddingExtras
