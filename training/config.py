"""Every setting of every command: its name, default and one line of help, and how a file and flags become one of them.

A command's flags are made from its class (cli.py), so what stands here is all there is to say about a setting.
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.errors import ConfigError

STORE = Path("adapters_store/data")
ViewName = Literal[
    "lookahead", "gradients", "task2vec", "transfer", "weights", "arrow", "subspace", "cka", "embedding", "labels"
]
Mode = Literal["none", "single", "prior"]


class Settings(BaseModel):
    """What all commands share: strict and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Forward(Settings):
    """How a backbone runs."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the frozen backbone; adapters train in float32"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; default: all cores")
    token_budget: int = Field(2048, ge=16, description="tokens in one forward; less needs less memory")


class Machine(Forward):
    """Where and how a backbone runs."""

    device: str = Field("cpu", description="where the backbone runs: cpu, cuda, cuda:1 …")


class TrainingSettings(Settings):
    """What `fit` and `cotrain` share: which tasks of which model, the folder of runs, and how the optimiser goes."""

    tasks: tuple[str, ...] = Field((), description="train only these tasks")
    runs: Path = Field(Path("runs"), description="folder that holds the runs")
    backbone: str | None = Field(
        None, description="hub id or folder of the frozen model; default: all-MiniLM-L6-v2 from PyPI"
    )
    pooling: Literal["mean", "cls", "last", "pooler"] | None = Field(
        None, description="what the head reads; default: mean for encoders, last for decoders"
    )
    examples: int | None = Field(None, ge=2, description="training examples per task; default: all")
    batch_size: int = Field(8, ge=1, description="examples per task and step")
    lr: float = Field(2e-3, gt=0, description="learning rate of the adapters")
    head_lr: float = Field(2e-2, gt=0, description="learning rate of the heads")
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps in which the learning rates rise from 0")
    clip: float = Field(1.0, gt=0, description="largest gradient norm of a task")


class FitConfig(TrainingSettings, Machine):
    """Settings of `fit`."""

    data: Path = Field(
        description="folder of task folders, each with train.jsonl and perhaps dev.jsonl, test.jsonl, task.toml; lines "
        'are {"text", "label"}, or {"prompt", "completion"} for tasks that generate'
    )
    run: str | None = Field(None, description="name of the run's folder; default: <data>-<kind>")
    kind: str = Field("lora", description="kind of adapter: lora, ssf, norm, bottleneck, or head (classifiers only)")
    hyperparameters: dict[str, Any] = Field({}, description="of the kind, for example r=16 or target_modules=q,v,up")
    max_length: int | None = Field(
        None,
        ge=4,
        description="tokens of a text, or of a prompt and its completion; of longer texts the end is cut, of longer "
        "pairs the beginning of the prompt, and only then the completion's end, which is told; "
        "default: 128 for texts, 512 for pairs",
    )
    dev_fraction: float = Field(0.2, ge=0, lt=1, description="cut from train where a task has no dev.jsonl")
    max_dev: int = Field(100, ge=0, description="at most so many examples are cut from train")
    epochs: int = Field(5, ge=1, description="times each example is seen")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, on matrices only")
    schedule: Literal["linear", "constant"] = Field(
        "linear", description="learning rates after warm-up: fall to 0, or stay"
    )
    patience: int | None = Field(None, ge=1, description="stop a task after so many epochs without a better one")
    one_by_one: bool = Field(False, description="train one task after the other; the same result, slower")
    checkpoint_s: float = Field(60.0, ge=0, description="seconds between checkpoints; one is always written on Ctrl-C")
    seed: int = Field(
        0, ge=0, description="decides splits, initial values and batches; the same seed gives the same bytes"
    )

    def length(self, *, generates: bool) -> int:
        """Tokens of a row of a task that generates, or classifies."""
        return self.max_length or (512 if generates else 128)

    @property
    def run_name(self) -> str:
        """Name of the run's folder."""
        return self.run or f"{self.data.resolve().name}-{self.kind}"


class RelateConfig(Machine):
    """Settings of `relate`."""

    run: Path = Field(description="folder of a finished run of fit")
    store: Path = Field(STORE, description="adapter store that the graph is written to")
    alias: str | None = Field(
        "prod", description="nodes name <adapter>@<alias> where it exists; also given to the graph"
    )
    views: tuple[ViewName, ...] = Field(
        ("embedding", "weights", "transfer"),
        min_length=1,
        description="ways to estimate relations: " + ", ".join(get_args(ViewName)),
    )
    view_weights: dict[str, float] = Field(
        {}, description="share of each view in R, for example transfer=2; default: 1 each"
    )
    fusion: Literal["fixed", "fitted"] = Field(
        "fixed",
        description="shares of the views: as given, or fitted to predict measured transfer, which keeps its own",
    )
    trunk_epochs: int = Field(
        1, ge=1, description="epochs of the shared adapter that lookahead, gradients and task2vec look at"
    )
    transfer_examples: int = Field(64, ge=4, description="dev examples per task on which transfer is measured")
    neighbours: int | None = Field(
        4, ge=1, description="edges kept per task: the strongest; negative ones are always kept"
    )
    evidence: bool = Field(True, description="weights per layer from the layers' own similarity")
    knobs: dict[str, Any] = Field({}, description="of the prior and composition, for example c=0.5 or threshold=0.1")


class PublishConfig(Settings):
    """Settings of `publish`."""

    run: Path = Field(description="folder of a finished run of fit")
    store: Path = Field(STORE, description="adapter store to publish into")
    alias: str | None = Field("prod", description="alias that the new versions get")
    tasks: tuple[str, ...] = Field((), description="publish only these tasks")
    actor: str = Field("", description="who publishes; noted in the store")


class ScoreConfig(Machine):
    """Settings of `score`."""

    data: Path = Field(description="folder of task folders with a test.jsonl each")
    store: Path = Field(STORE, description="adapter store to load adapters and graph from")
    backbone: str | None = Field(None, description="hub id or folder; default: all-MiniLM-L6-v2 from PyPI")
    alias: str | None = Field("prod", description="versions to score; the latest where a task has no such alias")
    tasks: tuple[str, ...] = Field((), description="only these tasks; default: all that the store has")
    modes: tuple[Mode, ...] = Field(("none", "single", "prior"), min_length=1, description="compositions to compare")
    graph: int | None = Field(None, ge=1, description="version of the relation graph; default: the latest")
    examples: int | None = Field(None, ge=1, description="test examples per task, the first ones; default: all")
    out: Path | None = Field(None, description="file for the results, one JSON line per task and mode")


class DemoConfig(Machine):
    """Settings of `demo`."""

    store: Path = Field(STORE, description="adapter store to publish into")
    runs: Path = Field(Path("runs"), description="folder that holds the runs")
    backbone: str | None = Field(None, description="hub id or folder; default: all-MiniLM-L6-v2 from PyPI")
    seed: int = Field(0, ge=0, description="decides initial values and batches")


class StylesConfig(Settings):
    """Settings of `styles`."""

    out: Path = Field(description="folder that the task folders are written into")
    examples: int = Field(320, ge=16, description="training examples per task; dev and test get an eighth as many each")
    seed: int = Field(0, ge=0, description="decides the texts")


Model = TypeVar("Model", bound=BaseModel)


def resolve(model: type[Model], file: Path | None, flags: Mapping[str, Any]) -> Model:
    """The settings of a file (TOML or JSON, or none) with the flags that were given over them. Raises ConfigError."""
    return validate(model, (read_file(file) if file else {}) | dict(flags))


def read_file(file: Path) -> dict[str, Any]:
    """What a config file says. Raises ConfigError."""
    try:
        text = file.read_text()
        value = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (OSError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {file}: expected a readable TOML or JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"--config {file}: expected a table of settings, found a {type(value).__name__}")
    return value


_ORDER = {"extra_forbidden": 0, "missing": 2}  # a misspelt setting explains a missing one


def validate(model: type[Model], values: Mapping[str, Any], what: str = "setting") -> Model:
    """The model of these values. Raises ConfigError, which names the first thing that is wrong."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first = min(error.errors(), key=lambda e: _ORDER.get(e["type"], 1))
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"unknown {what} {name!r}; known are: {', '.join(model.model_fields)}") from error
        if first["type"] == "missing":
            raise ConfigError(
                f"{what} {name!r} is needed: give --{name.replace('_', '-')} or put it in the --config file"
            ) from error
        raise ConfigError(f"{what} {name!r}: {first['msg']}, got {first['input']!r}") from error


def listed(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with one text where the model wants several as a list of one: `target_modules=all-linear`."""
    several = {name for name, field in model.model_fields.items() if get_origin(field.annotation) is tuple}
    return {name: [value] if name in several and isinstance(value, str) else value for name, value in values.items()}


def pairs(items: list[str]) -> dict[str, Any]:
    """Of `key=value` flags. Values are JSON (16, 0.5, true, ["q", "v"]), else text; a comma makes a list."""
    found = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"expected key=value, got {item!r}")
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return [part.strip() for part in text.split(",") if part.strip()] if "," in text else text
