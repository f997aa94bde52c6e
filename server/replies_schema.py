"""What replies look like, for the OpenAPI document and for people who write clients. The replies are built raw."""

from typing import Any, Literal

from pydantic import BaseModel, Field

Scores = dict[str, float]


class Problem(BaseModel):
    """An RFC 9457 problem document; programs go by `code`."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    request_id: str
    index: int | None = Field(None, description="which of the inputs is meant")


class ComposedAdapter(BaseModel):
    """One adapter of a composition."""

    name: str
    version: int
    digest: str
    weight: float = Field(description="mean over the layers")
    weights_by_layer: list[float] | None = Field(None, description="only with explain")


class Composition(BaseModel):
    """Which adapter versions answer, with what weights."""

    mode: Literal["prior", "single", "explicit", "none"]
    graph_version: int
    adapters: list[ComposedAdapter]


class Labelled(BaseModel):
    """The answer to one row by a head."""

    task: str
    label: str
    score: float
    scores: Scores
    composition: Composition


class Written(BaseModel):
    """The answer to one row with text."""

    task: str | None
    text: str
    finish_reason: Literal["stop", "length"]
    composition: Composition


class Usage(BaseModel):
    """What a call cost in tokens."""

    input_tokens: int
    output_tokens: int | None = Field(None, description="of generated texts")


class Timing(BaseModel):
    """Longest wait and longest forward of the call's rows, in milliseconds."""

    queue_ms: float
    forward_ms: float


class Inferred(BaseModel):
    """Reply of `POST /v1/infer`."""

    id: str
    backbone: str
    outputs: list[Labelled | Written]
    usage: Usage
    timing: Timing


class Explanation(BaseModel):
    """The composition of one row."""

    task: str
    composition: Composition


class Explained(BaseModel):
    """Reply of `POST /v1/explain`."""

    id: str
    backbone: str
    num_layers: int
    outputs: list[Explanation]


class Task(BaseModel):
    """A task that can be asked for."""

    task: str
    adapter: str | None = Field(description="reference of its own adapter")
    kind: str | None
    answers: Literal["label", "text"] | None = Field(description="None: it has no head, and nothing generates here")
    labels: list[str]
    label_texts: dict[str, str]
    in_graph: bool
    prior: dict[str, float] = Field(description="module -> prior weight")
    composition: Composition | None = None


class Tasks(BaseModel):
    """Reply of `GET /v1/tasks`."""

    tasks: list[Task]


class Adapter(BaseModel):
    """An adapter with its versions."""

    name: str
    task: str
    kind: str
    latest: int
    versions: list[int]
    aliases: dict[str, int]
    resident: list[int] = Field(description="versions on the device now")


class Adapters(BaseModel):
    """Reply of `GET /v1/adapters`."""

    adapters: list[Adapter]


class Version(BaseModel):
    """One published version."""

    manifest: dict[str, Any]
    reference: str
    digest: str
    state: Literal["device", "loading", "host", "store"]


class AdapterDetails(Adapter):
    """Reply of `GET /v1/adapters/{name}`."""

    manifests: list[Version]


class Coverage(BaseModel):
    """Which sites an uploaded adapter touches, and with what."""

    num_sites: int
    primitives: dict[str, int]
    sites: list[dict[str, str]]


class Uploaded(BaseModel):
    """Reply of `POST /v1/adapters`."""

    manifest: dict[str, Any]
    reference: str
    digest: str
    coverage: Coverage


class Promoted(BaseModel):
    """Where an alias points now."""

    name: str
    alias: str
    version: int
    time: str
    actor: str


class Deleted(BaseModel):
    """Reply of a deletion."""

    name: str
    version: int
    deleted: Literal[True]


class Loaded(BaseModel):
    """Where a version is now."""

    name: str
    version: int
    state: Literal["device", "loading", "host", "store"]


class Unloaded(BaseModel):
    """Versions that were on the device and now are not."""

    name: str
    unloaded: list[int]


class Graph(BaseModel):
    """A relation graph as node-link JSON."""

    directed: Literal[True]
    multigraph: Literal[False]
    graph: dict[str, Any]
    nodes: list[dict[str, Any]]
    edges: list[dict[str, Any]]


class GraphReplaced(BaseModel):
    """Reply of `PUT /v1/graph`."""

    version: int
    num_tasks: int
    num_edges: int


class GraphVersions(BaseModel):
    """Reply of `GET /v1/graph/versions`."""

    versions: list[int]
    current: int


class Alive(BaseModel):
    """Reply of `GET /health`."""

    status: Literal["ok"]


class Generation(BaseModel):
    """How texts are generated."""

    forward: Literal["packed", "padded"]
    attention_path: str
    decoding_path: str
    greedy_path: str = Field(description="how the likeliest token is found")
    max_length: int = Field(description="tokens of prompt and text")
    kv_tokens: int = Field(description="tokens that have a place in KV memory at once")
    prefix_cache: bool


class Ready(BaseModel):
    """Reply of `GET /ready`; without a key, where keys are asked for, only the first two."""

    ready: bool
    reason: str | None
    backbone: str | None = None
    dtype: str | None = None
    device: str | None = None
    forward: Literal["packed", "padded"] | None = None
    operator_path: str | None = Field(None, description="what adds low-rank adapters")
    linear_path: str | None = Field(None, description="what multiplies the backbone's weights")
    adapters: int | None = None
    tasks: int | None = None
    graph_version: int | None = None
    generation: Generation | None = Field(None, description="None where the backbone does not generate")
    refused: dict[str, str] | None = Field(None, description="adapter or graph -> why it is not served")
