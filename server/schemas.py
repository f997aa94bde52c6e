"""Bodies of requests, as clients send them. Unknown fields are refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_TEXT = 1_000_000  # characters; the tokenizer cuts to the backbone's length, this only bounds work

Weight = float | list[float]
Name = Annotated[str, Field(min_length=1, max_length=64)]
Ref = Annotated[str, Field(min_length=1, max_length=200)]
Mix = Annotated[dict[Name, Annotated[float, Field(le=1e6)]], Field(min_length=1, max_length=64)]
Temperature = Annotated[float, Field(ge=1e-3, le=1e6)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Input(_Strict):
    """One text, tagged with exactly one of task, tasks, mix or adapters."""

    text: Text = Field(description="the text to answer")
    task: Name | None = Field(None, description="the task to answer")
    tasks: list[Name] | None = Field(
        None, min_length=1, max_length=256, description="answer the same text once per task"
    )
    mix: Mix | None = Field(None, description="a mixture of tasks: shares")
    adapters: dict[Ref, Weight] | None = Field(None, max_length=64, description="reference -> weight, or one per layer")
    head: Ref | None = Field(None, description="whose head answers: a task or an adapter reference")

    @model_validator(mode="after")
    def _has_one_tag(self) -> "Input":
        tags = [name for name in ("task", "tasks", "mix", "adapters") if getattr(self, name) is not None]
        if len(tags) != 1:
            raise ValueError(
                f"give exactly one of task, tasks, mix, adapters; this input has {' and '.join(tags) or 'none'}"
            )
        if tags[0] == "tasks" and self.head is not None:
            raise ValueError("'tasks' answers each task with its own head; leave 'head' out")
        return self


class TextOptions(_Strict):
    """How tasks that answer with text are generated. The default is greedy: the same question, the same answer."""

    max_tokens: int | None = Field(None, ge=1, description="tokens of a text; if not given, as the task was trained")
    temperature: float = Field(0.0, ge=0, le=100, description="0 takes the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: off")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] | None = Field(
        None, max_length=16, description="a text ends before the first of these; if not given, as the task was trained"
    )


class Options(_Strict):
    """How to compose. What is left out is as the relation graph has it."""

    mode: Literal["prior", "single", "explicit", "none"] | None = Field(None, description="default: prior")
    top_k: int | None = Field(None, ge=1, le=256, description="adapters per row at most")
    temperature: Temperature | None = Field(None, description="divides the evidence")
    threshold: float | None = Field(None, ge=0, le=1, description="relative gate: drop weights below it x the largest")
    explain: bool = Field(False, description="also tell the weight of each layer")
    text: TextOptions = Field(TextOptions(), description="of tasks that answer with text")


class InferRequest(_Strict):
    """`POST /v1/infer` and `/v1/explain`."""

    inputs: list[Input] = Field(min_length=1, max_length=4096)
    options: Options = Options()


class AliasRequest(_Strict):
    """`PUT /v1/adapters/{name}/aliases/{alias}`."""

    version: int = Field(ge=1)


class ResidencyRequest(_Strict):
    """`POST /v1/adapters/{name}/load` and `/unload`; without a version: the latest, or all of them to unload."""

    version: int | None = Field(None, ge=1)


class LoraRequest(BaseModel):
    """`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM's clients send them."""

    model_config = ConfigDict(extra="ignore")

    lora_name: str = Field(min_length=1, max_length=200)
    lora_path: str | None = Field(None, max_length=200, description="a store reference; never a path or URL")


class CompositionOptions(_Strict):
    """How to compose, in an OpenAI body (`extra_body={"espalier": {…}}` in its SDK)."""

    mode: Literal["prior", "single", "explicit", "none"] | None = Field(None, description="default: prior")
    adapters: dict[Ref, Weight] | None = Field(None, max_length=64, description="reference -> weight, or one per layer")
    mix: Mix | None = Field(None, description="a mixture of tasks: shares")
    top_k: int | None = Field(None, ge=1, le=256, description="adapters at most")
    temperature: Temperature | None = Field(None, description="of the router: divides the evidence")
    threshold: float | None = Field(None, ge=0, le=1, description="relative gate: drop weights below it x the largest")
    explain: bool = Field(False, description="also tell the weight of each layer")


class EmbeddingOptions(CompositionOptions):
    """The same for embeddings, and which vector to give."""

    pooling: Literal["mean", "cls", "last"] | None = None
    normalize: bool = True


class EmbeddingRequest(BaseModel):
    """`POST /v1/embeddings`, as OpenAI has it; `model` is a task, an adapter reference, or the backbone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, max_length=200)
    input: Text | list[Text] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None
    espalier: EmbeddingOptions = EmbeddingOptions()


GraphBody = dict[str, Any]
