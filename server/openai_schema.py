"""What replies of the OpenAI endpoints, and of those named after other servers, look like, for the OpenAPI document."""

from typing import Literal

from pydantic import BaseModel, Field, RootModel

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


class Extras(BaseModel):
    """Ours: which composition answered."""

    composition: Composition


class Embeddings(BaseModel):
    """Reply of `POST /v1/embeddings`."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
    espalier: Extras


class PromptDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int = Field(description="whose keys and values were there already")


class CompletionUsage(BaseModel):
    """What a generating call cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TextLogprobs(BaseModel):
    """Tokens with log-probabilities of the model's own distribution, before temperature and penalties."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int] = Field(description="where in the text each token begins, in characters")


class TextChoice(BaseModel):
    """One continuation."""

    index: int = Field(description="prompt index x n + choice")
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """Reply of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: CompletionUsage
    espalier: Extras


class LikelyToken(BaseModel):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(LikelyToken):
    """A token that was chosen, and what else was likely."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(BaseModel):
    """The tokens of a message."""

    content: list[ChatToken]
    refusal: None


class ChatMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer to a conversation."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """Reply of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    espalier: Extras


class LoraAdapter(BaseModel):
    """An adapter as llama.cpp lists it."""

    id: int = Field(description="made of the name, so it never means another adapter")
    path: str = Field(description="the adapter's name, which is a reference")
    scale: float = Field(description="0: an adapter takes part only where a request says so")


class LoraAdapters(RootModel[list[LoraAdapter]]):
    """Reply of `GET /lora-adapters`."""
