"""What a published version says about itself: `adapters/<name>/versions/<number>.json`.

A manifest and the one blob of tensors it names are the whole adapter. Its `digest` covers exactly what decides an
answer (sites, primitives, options, head, backbone, tensor bytes), so two versions with one digest answer alike
whatever they are called, and every cache may be keyed by it.
"""

import hashlib
import json
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Backbone(_Strict):
    """Fingerprint of the frozen model an adapter belongs to."""

    architecture: str = Field(description="class name of the model, as in config.json")
    config_digest: str = Field(description="sha256 of the canonical config")
    weights_digest: str = Field(description="sha256 over the weight files")
    dtype: str = Field("float32", description="dtype of the backbone while training; not part of the identity")

    def is_same(self, other: "Backbone") -> bool:
        """True if both are the same weights in the same architecture, whatever their dtype."""
        mine = (self.architecture, self.config_digest, self.weights_digest)
        return mine == (other.architecture, other.config_digest, other.weights_digest)


class SiteEntry(_Strict):
    """One primitive at one site. `tensors` maps the primitive's own tensor names to names in the blob."""

    site: str
    primitive: str
    tensors: dict[str, str]
    options: dict[str, float | int | str | bool] = {}


class TensorSpec(_Strict):
    """Shape and dtype of one tensor in the blob."""

    shape: tuple[int, ...]
    dtype: Literal["float32", "float16", "bfloat16"]


class HeadSpec(_Strict):
    """How pooled hidden states become scores of labels. `tensors`: the head primitive's names to names in the blob."""

    type: Literal["linear", "cosine"] = "linear"
    labels: tuple[str, ...] = Field(min_length=1)
    label_texts: dict[str, str] = {}
    pooling: Literal["mean", "cls", "last", "pooler"] = "mean"
    hidden_activation: Literal["tanh", "relu", "gelu"] | None = None
    scale: float = Field(1.0, description="cosine: factor on the similarity")
    max_length: int | None = Field(
        None, ge=1, description="tokens the task was trained on, special ones included; longer texts are cut there"
    )
    tensors: dict[str, str]


class GenerationSpec(_Strict):
    """How a task that answers with text is asked, where a request does not say."""

    max_tokens: int = Field(ge=1, description="tokens of an answer at most")
    stop: tuple[str, ...] = Field((), max_length=16, description="an answer ends before the first of these")


class GoldenExample(_Strict):
    """A text and what this adapter alone must give it on its backbone in float32.

    A classifier gives logits. An adapter that generates gives each token of `completion`, and of the end of text behind
    it, a log-probability.
    """

    text: str
    logits: tuple[float, ...] = ()
    completion: str | None = None
    logprobs: tuple[float, ...] = ()


class Manifest(_Strict):
    """A published adapter version."""

    format_version: Literal[1] = 1
    name: str
    version: int = Field(ge=1)
    task: str
    kind: str
    hyperparameters: dict[str, Any] = {}
    sites: tuple[SiteEntry, ...] = ()
    tensors: dict[str, TensorSpec] = {}
    head: HeadSpec | None = None
    generation: GenerationSpec | None = None
    backbone: Backbone
    blob: str = Field(description="sha256:<hex> of the safetensors file")
    size_bytes: int = Field(ge=0, description="of the blob")
    metrics: dict[str, float] = Field({}, description="measured at training")
    provenance: dict[str, Any] = Field({}, description="data digest, seed, code version, source format")
    golden: tuple[GoldenExample, ...] = ()
    created_at: datetime

    @cached_property
    def digest(self) -> str:
        """`sha256:<hex>` of everything that decides an answer, and of nothing else."""
        deciding = self.model_dump(mode="json", include={"sites", "tensors", "head", "blob"})
        if self.generation:
            deciding["generation"] = self.generation.model_dump()
        deciding["backbone"] = self.backbone.model_dump(exclude={"dtype"})
        return digest_of(canonical_json(deciding))

    @property
    def reference(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(data: bytes) -> str:
    """`sha256:<hex>` of the bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
