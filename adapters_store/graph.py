"""The relation graph: how much each task's adapter helps each other task. The lattice of the espalier.

A directed networkx graph, kept and exchanged as node-link JSON. Nodes are tasks with the adapter that is their module,
or modules that tasks share (role "module": in walks and compositions like any node, but never asked for by name);
an edge source -> target with weight R says how much the target's adapter helps the source's task (R >= 0 helps, R < 0
hurts and is kept as a finding). Graph attributes hold the knobs of the prior (prior.py) and of composition.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import networkx as nx
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from adapters_store.errors import EspalierError, InvalidGraphError, TaskNotFoundError
from adapters_store.references import check_name, parse_reference

MAX_MASS = 1e4  # as for weights that callers give
TAKEN = {"self", "node_for_adding", "u_of_edge", "v_of_edge"}  # parameters of networkx, which takes notes as keywords


class Knobs(BaseModel):
    """What an operator may turn. Defaults as in the method's starting values."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    normalisation: Literal["directed", "symmetric"] = Field(
        "directed", description="row-stochastic R, or D^-1/2 R D^-1/2"
    )
    diffusion: Literal["ppr", "heat", "none"] = Field(
        "ppr", description="personalised PageRank, heat kernel, or R itself"
    )
    c: float = Field(0.3, ge=0, lt=1, description="ppr: probability to walk on; 0 leaves each task its own adapter")
    h: float = Field(1.0, ge=0, le=50, description="heat: diffusion time")
    epsilon: float = Field(0.01, ge=0, lt=1, description="prior weights below it are dropped")
    neighbours: int | None = Field(None, ge=1, description="keep at most so many adapters per prior row")
    strength: float = Field(1.0, ge=0, description="lambda_P: 0 ignores the prior's weights, 1 takes them as they are")
    temperature: float = Field(1.0, gt=0, description="tau: divides the evidence; large values leave the prior alone")
    threshold: float = Field(0.05, ge=0, le=1, description="theta: weights below theta x the largest are gated out")
    top_k: int | None = Field(None, ge=1, description="at most so many adapters per request")
    path: Literal["none", "marginals", "viterbi"] = Field(
        "none", description="select modules layer by layer along paths: by their marginal, or on the best paths"
    )
    stay: float = Field(0.8, ge=0, le=1, description="rho: how much a path prefers to stay on its module")
    path_strength: float = Field(1.0, ge=0, description="mu: weight of the transitions against the modules' own scores")
    path_threshold: float = Field(0.05, ge=0, le=1, description="marginals: keep what has this share of the largest")
    num_paths: int = Field(1, ge=1, le=64, description="viterbi: keep the modules of so many best paths")


class GraphAttributes(BaseModel):
    """Attributes of the graph as a whole."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    knobs: Knobs = Knobs()
    evidence: dict[str, dict[str, list[float]]] = Field({}, description="task -> module -> evidence per layer")
    mass: dict[str, list[float]] = Field(
        {}, description="task -> what its weights sum to at each layer; 1 where it is not given"
    )
    views: dict[str, float] = Field({}, description="fusion weight of each relation view")
    provenance: dict[str, Any] = Field({}, description="how and from what the relations were estimated")


class Node(BaseModel):
    """A task, its module, and whatever else the graph's author noted."""

    model_config = ConfigDict(extra="allow", frozen=True)

    id: str
    adapter: str | None = Field(None, description="reference of the module; the adapter of the task's name if absent")
    role: Literal["task", "module"] = Field("task", description="module: shared by tasks, and no task of its own")

    @field_validator("id")
    @classmethod
    def _is_name(cls, value: str) -> str:
        try:
            return check_name(value, "task")
        except EspalierError as error:
            raise ValueError(str(error)) from error

    @field_validator("adapter")
    @classmethod
    def _is_reference(cls, value: str | None) -> str | None:
        try:
            return value if value is None else str(parse_reference(value))
        except EspalierError as error:
            raise ValueError(str(error)) from error


class Edge(BaseModel):
    """How much target's module helps source's task."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    source: str
    target: str
    weight: float


class GraphDocument(BaseModel):
    """Node-link JSON as networkx writes it, checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    directed: Literal[True] = True
    multigraph: Literal[False] = False
    graph: GraphAttributes = GraphAttributes()
    nodes: list[Node]
    edges: list[Edge]


class RelationGraph:
    """A checked relation graph. Immutable: a change makes a new version."""

    def __init__(self, document: GraphDocument) -> None:
        """Raises InvalidGraphError for doubled nodes, edges to nowhere, evidence or mass for unknown nodes.

        Also for notes that networkx could not read back.
        """
        self.attributes = document.graph
        self.knobs = document.graph.knobs
        self.nodes: dict[str, Node] = {node.id: node for node in document.nodes}
        if len(self.nodes) != len(document.nodes):
            raise InvalidGraphError("two nodes have the same id")
        self.network = self._network(document)
        self._check_evidence()

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "RelationGraph":
        """From node-link JSON (`edges` or, as older networkx wrote it, `links`). Raises InvalidGraphError."""
        renamed = {("edges" if key == "links" else key): part for key, part in value.items()}
        try:
            return RelationGraph(GraphDocument.model_validate(renamed))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InvalidGraphError(f"not a relation graph in node-link JSON: {where}: {first['msg']}") from error

    @staticmethod
    def of(
        nodes: Mapping[str, str | None], weights: Mapping[tuple[str, str], float], **attributes: Any
    ) -> "RelationGraph":
        """From task -> adapter reference and (source, target) -> weight; attributes as in GraphAttributes."""
        return RelationGraph.from_json({
            "graph": attributes,
            "nodes": [{"id": task, "adapter": adapter} for task, adapter in nodes.items()],
            "edges": [{"source": i, "target": j, "weight": w} for (i, j), w in weights.items()],
        })  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Node-link JSON."""
        document: dict[str, Any] = nx.node_link_data(self.network, edges="edges")
        return document | {"graph": self.attributes.model_dump(mode="json")}

    def node(self, task: str) -> Node:
        """The task's node. Raises TaskNotFoundError."""
        if task not in self.nodes:
            raise TaskNotFoundError(
                f"task {task!r} is not in the relation graph; it has: {', '.join(sorted(self.nodes)[:20])}"
            )
        return self.nodes[task]

    @property
    def tasks(self) -> list[str]:
        """The nodes that are tasks, in the document's order."""
        return [name for name, node in self.nodes.items() if node.role == "task"]

    def _network(self, document: GraphDocument) -> "nx.DiGraph[str]":
        network: nx.DiGraph[str] = nx.DiGraph()
        for node in document.nodes:
            network.add_node(node.id, **_attributes(node, f"node {node.id}", {"id"}))
        for edge in document.edges:
            for end in (edge.source, edge.target):
                if end not in self.nodes:
                    raise InvalidGraphError(f"edge {edge.source} -> {edge.target} names {end!r}, which is no node")
            if network.has_edge(edge.source, edge.target):
                raise InvalidGraphError(f"edge {edge.source} -> {edge.target} is given twice")
            what = f"edge {edge.source} -> {edge.target}"
            network.add_edge(edge.source, edge.target, **_attributes(edge, what, {"source", "target"}))
        return network

    def _check_evidence(self) -> None:
        for task, row in self.attributes.evidence.items():
            for module, values in row.items():
                if task not in self.nodes or module not in self.nodes:
                    raise InvalidGraphError(f"evidence for {task} -> {module}: both must be nodes")
                if not values or not all(math.isfinite(value) for value in values):
                    raise InvalidGraphError(f"evidence for {task} -> {module} must be one finite number per layer")
        for task, masses in self.attributes.mass.items():
            if task not in self.nodes:
                raise InvalidGraphError(f"mass for {task}, which is no node")
            if not masses or not all(math.isfinite(value) and 0 <= value <= MAX_MASS for value in masses):
                raise InvalidGraphError(f"mass for {task} must be one number from 0 to {MAX_MASS:g} per layer")


def _attributes(part: Node | Edge, what: str, ends: set[str]) -> dict[str, Any]:
    """All but the ends, notes too, by name. Raises InvalidGraphError for a name that is networkx's own."""
    attributes = part.model_dump(exclude=ends)
    taken = sorted(TAKEN & attributes.keys())
    if taken:
        raise InvalidGraphError(f"{what} has an attribute {taken[0]!r}, which is networkx's own: call it otherwise")
    return attributes
