"""Settings of `evaluate` and `report`: what a suite is run on, and where its results lie."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from training.config import Settings


class EvaluateConfig(Settings):
    """Settings of `evaluate`."""

    data: tuple[Path, ...] = Field(
        min_length=1, description="folders of task folders that make the suite; each task needs train.jsonl, test.jsonl"
    )
    name: str | None = Field(None, description="name of the suite in results; default: the data folders' names")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="each decides training examples and initial values")
    examples: tuple[Annotated[int, Field(ge=2)] | Literal["all"], ...] = Field(
        (100,), min_length=1, description="training examples per task, one or several numbers; all takes every one"
    )
    methods: tuple[str, ...] = Field(
        (),
        description="only these methods, by name or regime (pluggable, joint, unknown, sweep); default: all but sweeps",
    )
    workers: int = Field(1, ge=1, description="processes that share the jobs; each holds a backbone and a suite")
    threads: int = Field(1, ge=1, description="CPU threads of each worker")
    out: Path | None = Field(None, description="folder of the results; default: runs/evaluate/<name>")
    test_examples: int | None = Field(200, ge=1, description="test texts per task, the same for every seed")
    max_length: int = Field(96, ge=4, description="tokens of a text; the rest is cut")
    first_layer: int = Field(3, ge=0, description="adapters act from this layer on; what lies below runs once per text")
    backbone: str | None = Field(None, description="hub id or folder; default: all-MiniLM-L6-v2 from PyPI")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="of the frozen backbone; adapters train in float32"
    )
    token_budget: int = Field(6144, ge=16, description="tokens in one forward; less needs less memory")

    @property
    def suite(self) -> str:
        """Name of the suite."""
        return self.name or "-".join(folder.resolve().name for folder in self.data)

    @property
    def folder(self) -> Path:
        """Where the results lie."""
        return self.out or Path("runs") / "evaluate" / self.suite


class ReportConfig(Settings):
    """Settings of `report`."""

    results: tuple[Path, ...] = Field(min_length=1, description="folders that evaluate wrote")
    out: Path = Field(description="folder for results.jsonl, report.md and pictures")
    notes: Path | None = Field(None, description="Markdown file with your own words on the results; they come first")
