"""A run folder: what was asked for, where it ran, what happened, and what came out.

config.json        the resolved settings        checkpoint/       to go on from; removed when the run is finished
environment.json   versions, machine, data      adapters/<task>/  manifest.json + tensors.safetensors, for publish
metrics.jsonl      a line per task and step     summary.json      written last: the run is finished
learning_curve.png
"""

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from training.config import FitConfig, Settings, validate
from training.errors import RunError
from training.tasks import Task

PACKAGES = ("torch", "transformers", "espalier")


class Run:
    """The folder of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_file = folder / "config.json"
        self.metrics_file = folder / "metrics.jsonl"
        self.checkpoints = folder / "checkpoint"
        self.adapters = folder / "adapters"
        self.summary_file = folder / "summary.json"

    @property
    def exists(self) -> bool:
        """True once a run has begun here."""
        return self.config_file.is_file()

    @property
    def is_finished(self) -> bool:
        """True once everything is written."""
        return self.summary_file.is_file()

    def config(self) -> FitConfig:
        """The settings of a run of fit. Raises RunError, also for a run of another command."""
        if self.is_finished and (command := self.summary().get("command", "fit")) != "fit":
            raise RunError(f"{self.folder} is a run of {command}, which related its adapters itself; give a run of fit")
        return validate(FitConfig, self._read(self.config_file))

    def environment(self) -> dict[str, Any]:
        """What `begin` noted. Raises RunError."""
        return self._read(self.folder / "environment.json")

    def summary(self) -> dict[str, Any]:
        """The results of a finished run. Raises RunError."""
        return self._read(self.summary_file)

    def begin(self, config: Settings, tasks: Sequence[Task]) -> None:
        """Note settings and surroundings, the settings last: their presence means that the run has begun."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write("environment.json", environment() | {"data": {task.name: task.digest for task in tasks}})
        self.metrics_file.write_text("")
        self.write("config.json", config.model_dump(mode="json"))

    def check_data(self, tasks: Sequence[Task]) -> None:
        """Refuse to go on with other data than the run began with. Raises RunError."""
        noted = self.environment()["data"]
        changed = [task.name for task in tasks if noted.get(task.name) != task.digest]
        if changed or len(noted) != len(tasks):
            which = ", ".join(changed) or "other tasks"
            raise RunError(f"the data of {self.folder} changed since it began ({which}); start a new run")

    def rewind_metrics(self, step_of: Mapping[str, int]) -> None:
        """Drop lines of steps behind the checkpoint: they are about to be taken again."""
        kept = [line for line in self.metrics() if line["step"] <= step_of[line["task"]]]
        beside = self.folder / f".{self.metrics_file.name}"
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        beside.replace(self.metrics_file)

    def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append to metrics.jsonl."""
        with self.metrics_file.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; of a last one that was cut off by a crash or a full disk nothing."""
        *lines, last = self.metrics_file.read_text(errors="replace").split("\n")
        return [json.loads(line) for line in lines] + ([json.loads(last)] if _is_json(last) else [])

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file beside its place, then rename."""
        beside = self.folder / f".{name}"
        beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        beside.replace(self.folder / name)

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads(file.read_text())
        except FileNotFoundError as error:
            raise RunError(
                f"{file} is missing: {self.folder} is not a finished run (espalier-train fit makes one)"
            ) from error
        except json.JSONDecodeError as error:
            raise RunError(f"{file} is not JSON: {error}") from error
        return value


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def newest_unfinished(runs: Path) -> Run:
    """The run under `runs` that was begun last and is not finished. Raises RunError."""
    found = [Run(path) for path in runs.iterdir() if path.is_dir()] if runs.is_dir() else []
    open_runs = [run for run in found if run.exists and not run.is_finished]
    if not open_runs:
        raise RunError(f"{runs} has no unfinished run to resume")
    return max(open_runs, key=lambda run: run.config_file.stat().st_mtime)


def environment() -> dict[str, Any]:
    """Versions and machine."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def versions() -> dict[str, str]:
    """Of what decides the numbers; espalier itself may run from a checkout that is not installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
