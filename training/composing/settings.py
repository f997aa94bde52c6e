"""Settings of `compose` and `cotrain`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from training.config import STORE, Forward, TrainingSettings


class Composing(Forward):
    """What both share: how the backbone runs, on the CPU, and where the outcome goes."""

    store: Path = Field(STORE, description="adapter store to publish into")
    alias: str | None = Field("prod", description="alias that the new versions and the graph get")
    actor: str = Field("", description="who publishes; noted in the store")


class ComposeConfig(Composing):
    """Settings of `compose`."""

    run: Path = Field(description="folder of a finished run of fit, of tasks that classify")
    relations: Literal["data", "transfer", "store"] = Field(
        "data",
        description="where relations come from: data: the train texts and the label names; transfer: what each adapter "
        "does for the others' train texts; store: a graph of the store",
    )
    graph: int | None = Field(None, ge=1, description="version of the graph for --relations store; default: the latest")
    own_head: float = Field(
        0.3, ge=0, le=1, description="share of a task's own head in where it starts; related tasks give the rest"
    )
    l2: float = Field(0.1, ge=0, description="how near a refitted head stays to the mean of related heads")
    mass: bool = Field(True, description="scale a composition so that it is as long an update as its parts")
    knobs: dict[str, Any] = Field(
        {}, description="of the prior and composition; default: c=0.95 epsilon=0.001 threshold=0"
    )


class CotrainConfig(TrainingSettings, Composing):
    """Settings of `cotrain`."""

    data: Path = Field(
        description='folder of task folders, each with a train.jsonl of {"text", "label"} and perhaps dev.jsonl, '
        "task.toml"
    )
    run: str | None = Field(None, description="name of the run's folder; default: <data>-cotrain")
    kind: str = Field("lora", description="kind of adapter: lora, ssf, norm or bottleneck")
    hyperparameters: dict[str, Any] = Field({}, description="of the kind, for example r=16; lora: on all linears")
    first_layer: int = Field(0, ge=0, description="adapters act from this layer on; what lies below runs once per text")
    max_length: int = Field(128, ge=4, description="tokens of a text; the rest is cut")
    dev_fraction: float = Field(
        0.0, ge=0, lt=1, description="cut from train where a task has no dev.jsonl, to tell an accuracy"
    )
    relations: Literal["data", "store"] = Field(
        "data", description="where training's relations start: the train texts and label names, or a graph of the store"
    )
    graph: int | None = Field(None, ge=1, description="version of the graph for --relations store; default: the latest")
    epochs: int = Field(5, ge=1, description="times each example of the largest task is seen")
    graph_lr: float = Field(2e-2, gt=0, description="learning rate of relations and evidence")
    learn_relations: bool = Field(True, description="train the relations; else they stay as estimated")
    learn_evidence: bool = Field(True, description="train weights per layer")
    tie_heads: bool = Field(True, description="heads share their labels' rows along the prior")
    loss: dict[str, float] = Field(
        {},
        description="weight of an added loss: relation, sparsity, smoothness, orthogonality, prior, entropy, balance; "
        "for example relation=0",
    )
    knob: dict[str, Any] = Field(
        {}, description="of the prior and composition; default: c=0.9 epsilon=0.001 threshold=0"
    )
    seed: int = Field(0, ge=0, description="decides splits, initial values and batches")

    @property
    def run_name(self) -> str:
        """Name of the run's folder."""
        return self.run or f"{self.data.resolve().name}-cotrain"
