"""Checkpoints: everything a run needs to go on as if it had never stopped, as safetensors and JSON in one folder.

`checkpoint/<step>/` is written beside its place and renamed into it; the newest complete one counts and older ones are
removed afterwards. Batches and initial values follow from seeds (seeds.py), so no random state is kept.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.errors import RunError
from training.objectives import Score
from training.state import Best, TaskState

_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(folder: Path, states: Sequence[TaskState]) -> Path:
    """Write a checkpoint of all tasks under `folder` and remove older ones; its path."""
    step = sum(state.step for state in states)
    place, beside = folder / f"{step:08d}", folder / f".{step:08d}-{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file(_tensors(states), beside / "state.safetensors")
    (beside / "state.json").write_text(json.dumps({state.name: _facts(state) for state in states}, indent=1))
    for file in beside.iterdir():
        _sync(file)
    if place.exists():  # the same step again: a run stopped before it took another one
        shutil.rmtree(place)
    beside.rename(place)
    _sync(folder)
    for old in folder.iterdir():
        if old != place:
            shutil.rmtree(old, ignore_errors=True)
    return place


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder`, if there is one."""
    found = sorted(path for path in folder.glob("[0-9]*") if path.is_dir()) if folder.is_dir() else []
    return found[-1] if found else None


def load(place: Path, states: Sequence[TaskState]) -> None:
    """Put every task back to where it stood. Raises RunError for a checkpoint of other tasks or a broken one."""
    try:
        facts = json.loads((place / "state.json").read_text())
        tensors = load_file(place / "state.safetensors")
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise RunError(f"checkpoint {place} cannot be read: {error}") from error
    names = {state.name for state in states}
    if set(facts) != names:
        raise RunError(f"checkpoint {place} is of tasks {sorted(facts)}, this run has {sorted(names)}")
    for state in states:
        _restore(state, facts[state.name], tensors)


def _facts(state: TaskState) -> dict[str, Any]:
    best = state.best and {
        "epoch": state.best.epoch,
        "accuracy": state.best.score.accuracy,
        "loss": state.best.score.loss,
    }
    return {"step": state.step, "is_stopped": state.is_stopped, "best": best}


def _tensors(states: Sequence[TaskState]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for state in states:
        named |= {f"{state.name}/now/{name}": tensor for name, tensor in state.adapter.copy().items()}
        named |= {
            f"{state.name}/best/{name}": tensor for name, tensor in (state.best.tensors if state.best else {}).items()
        }
        for name, tensor in state.adapter.tensors().items():
            moments = state.optimizer.state.get(tensor, {})
            named |= {f"{state.name}/{kind}/{name}": moments[kind].cpu() for kind in _MOMENTS if kind in moments}
    return {name: tensor.contiguous() for name, tensor in named.items()}


def _restore(state: TaskState, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    state.step, state.is_stopped = int(facts["step"]), bool(facts["is_stopped"])
    state.adapter.load(_under(tensors, state.name, "now"))
    if facts["best"]:
        score = Score(facts["best"]["accuracy"], facts["best"]["loss"])
        state.best = Best(int(facts["best"]["epoch"]), score, _under(tensors, state.name, "best"))
    moments = {kind: _under(tensors, state.name, kind) for kind in _MOMENTS}
    for name, tensor in state.adapter.tensors().items():
        if name in moments["exp_avg"]:
            kept = {kind: moments[kind][name].to(tensor.device) for kind in _MOMENTS}
            state.optimizer.state[tensor] = {"step": torch.tensor(float(state.step)), **kept}


def _under(tensors: dict[str, Tensor], task: str, part: str) -> dict[str, Tensor]:
    prefix = f"{task}/{part}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
