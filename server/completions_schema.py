"""Bodies of `/v1/completions` and `/v1/chat/completions`, as OpenAI's clients send them.

What OpenAI's API lacks has vLLM's names (`top_k`, `min_p`, `repetition_penalty`, `stop_token_ids`, `ignore_eos`). A
field that would change the answer and that this server cannot honour is refused by name; fields that change nothing
here are read and ignored; fields that nobody knows are refused.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from server.schemas import MAX_TEXT, CompositionOptions, Ref

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI has it
MAX_STOPS = 16
TokenId = Annotated[int, Field(ge=0)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


def _only(*fine: object, why: str) -> AfterValidator:
    """Of a field that can be left out or have these values; the reason why not others."""

    def check(value: object) -> object:
        if value not in fine:
            raise ValueError(why)
        return value

    return AfterValidator(check)


HALF_A_CHARACTER = "a text has half a character (a lone surrogate, U+D800 to U+DFFF); send whole ones"


def is_whole(text: str) -> bool:
    """True for text that can be encoded: JSON may write half a character, tokenizers read whole ones."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _prompts(value: object) -> list[str] | list[list[int]]:
    """The list of prompts, however they were sent."""
    many = [value] if isinstance(value, str) or _is_ids(value) else value
    if isinstance(many, list) and many and all(isinstance(one, str) for one in many):
        if max(map(len, many)) > MAX_TEXT:
            raise ValueError(f"a text has more than {MAX_TEXT} characters")
        if not all(map(is_whole, many)):
            raise ValueError(HALF_A_CHARACTER)
        return many
    if isinstance(many, list) and many and all(map(_is_ids, many)):
        return many
    raise ValueError("send a text, a list of texts, a list of token ids, or a list of such lists; none may be empty")


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _joined(content: object) -> object:
    """The text of a message that came in parts; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise ValueError(f"a part of type {kind!r} cannot be read: this server reads parts of type 'text' only")
        if not isinstance(part.get("text"), str):
            raise ValueError("a part of type 'text' needs 'text', a string")
        texts.append(part["text"])
    return "\n".join(texts)  # as vLLM joins them, for templates that want one string


Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
Content = Annotated[
    Annotated[str, Field(max_length=MAX_TEXT)] | None,
    BeforeValidator(_joined, json_schema_input_type=str | list[dict[str, Any]] | None),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraScale(_Body):
    """An adapter with its weight, as llama.cpp has it."""

    id: Annotated[int, Field(strict=True)] | Ref = Field(description="as GET /lora-adapters lists it, or a reference")
    scale: float


class StreamOptions(_Body):
    """Goes with `stream: true`."""

    include_usage: bool | None = Field(None, description="one more chunk, without choices, that tells the usage")
    include_obfuscation: bool | None = Field(None, description="ignored: nothing is obfuscated")


class Generate(_Body):
    """What both endpoints read."""

    model: str = Field(min_length=1, max_length=300, description="the backbone, a task, or an adapter reference")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128, description="choices per prompt; default 1")
    temperature: float | None = Field(None, ge=0, le=2, description="default 1; 0 is greedy")
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | list[StopString] | None = Field(None, description=f"one text, or up to {MAX_STOPS}")
    top_k: int | None = Field(None, ge=-1, description="-1 or 0: off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    stop_token_ids: list[TokenId] | None = Field(None, max_length=256)
    ignore_eos: bool | None = None
    min_tokens: Annotated[Any, _only(None, 0, why="this server keeps no minimum; leave it out")] = None
    espalier: CompositionOptions = CompositionOptions()
    lora: list[LoraScale] | None = Field(None, max_length=64, description="explicit composition, as llama.cpp has it")
    user: Any = Field(None, description="ignored")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """True if a stream ends with a chunk about usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _goes_together(self) -> "Generate":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' goes with 'stream': true")
        if len(self.stops) > MAX_STOPS:
            raise ValueError(f"'stop' has {len(self.stops)} texts, at most {MAX_STOPS} are watched for")
        return self


class CompletionRequest(Generate):
    """`POST /v1/completions`."""

    prompt: Prompts
    max_tokens: int | None = Field(None, ge=1, description=f"tokens of each choice; default {DEFAULT_MAX_TOKENS}")
    logprobs: int | None = Field(None, ge=0, le=20, strict=True, description="of the chosen and so many likely tokens")
    echo: Annotated[Any, _only(None, False, why="prompts are not repeated in answers; leave it out")] = None
    suffix: Annotated[Any, _only(None, "", why="this server continues texts, it does not fill gaps in them")] = None
    best_of: int | None = Field(None, ge=1, description="only the value of n")

    @model_validator(mode="after")
    def _has_no_best(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n or 1):
            raise ValueError("'best_of' other than 'n' is not supported: ask for n and choose by logprobs")
        return self


_NO_TOOLS = "this server calls no tools; leave it out"
_TEXT_ONLY = "this server answers in text only"


class Message(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = Field(None, description="a text, or a list of parts of type 'text'")
    name: str | None = Field(None, max_length=200)
    tool_calls: list[dict[str, Any]] | None = Field(None, max_length=128, description="for the chat template to tell")
    tool_call_id: str | None = Field(None, max_length=200)
    refusal: Annotated[Any, _only(None, why="a refusal cannot be told to the chat template")] = None
    audio: Annotated[Any, _only(None, why=_TEXT_ONLY)] = None
    function_call: Annotated[Any, _only(None, why="send 'tool_calls' instead")] = None
    annotations: Any = Field(None, description="ignored: they are about the text")

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise ValueError("'content' is missing: a text, or a list of parts of type 'text'")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"'tool_calls' are the assistant's, not of role {self.role!r}")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: arguments of tool calls as objects, not as JSON in a string."""
        told = {"name": self.name, "tool_call_id": self.tool_call_id}
        calls = {"tool_calls": [_parsed(call) for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": self.role, "content": self.content or ""} | {k: v for k, v in told.items() if v} | calls


def _parsed(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):  # the model that called wrote no JSON; the template gets what it wrote
        return call
    return call | {"function": function | {"arguments": arguments}}


class ChatRequest(Generate):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1, description="default: what the context leaves")
    max_tokens: int | None = Field(None, ge=1, description="the older name of the same")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="with logprobs: so many likely tokens each")

    tools: Annotated[Any, _only(None, [], why=_NO_TOOLS)] = None
    functions: Annotated[Any, _only(None, [], why=_NO_TOOLS)] = None
    tool_choice: Annotated[Any, _only(None, "none", "auto", why=_NO_TOOLS)] = None
    function_call: Annotated[Any, _only(None, "none", "auto", why=_NO_TOOLS)] = None
    tool_prompt: Annotated[Any, _only(None, why=_NO_TOOLS)] = None  # huggingface_hub's
    response_format: Annotated[
        Any, _only(None, {"type": "text"}, why='only {"type": "text"}: nothing enforces JSON')
    ] = None
    modalities: Annotated[Any, _only(None, [], ["text"], why=_TEXT_ONLY)] = None
    audio: Annotated[Any, _only(None, why=_TEXT_ONLY)] = None
    reasoning_effort: Annotated[Any, _only(None, "none", why="this server does not steer reasoning; leave it out")] = (
        None
    )
    verbosity: Annotated[Any, _only(None, "medium", why="this server does not steer verbosity; leave it out")] = None
    moderation: Annotated[Any, _only(None, why="this server does not moderate; leave it out")] = None
    web_search_options: Annotated[Any, _only(None, why="this server does not search; leave it out")] = None

    metadata: Any = Field(None, description="ignored")
    parallel_tool_calls: Any = Field(None, description="ignored: there are no tools")
    prediction: Any = Field(None, description="ignored: it would only save time")
    prompt_cache_key: Any = Field(None, description="ignored")
    prompt_cache_options: Any = Field(None, description="ignored")
    prompt_cache_retention: Any = Field(None, description="ignored")
    safety_identifier: Any = Field(None, description="ignored")
    service_tier: Any = Field(None, description="ignored: there is one")
    store: Any = Field(None, description="ignored: nothing is stored")

    @model_validator(mode="after")
    def _agrees(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("'max_tokens' and 'max_completion_tokens' are two names of one limit; give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' goes with 'logprobs': true")
        return self
