"""What a run needs before its first step: tasks read, backbone loaded, texts encoded once, adapters at their start."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from adapters_store.kinds import KINDS
from adapters_store.kinds import kind as kind_of
from training import objectives, step
from training.backbone import LoadedBackbone, load
from training.config import FitConfig, listed, validate
from training.errors import ConfigError
from training.objectives import Texts
from training.progress import bar, say
from training.state import TaskState
from training.tasks import Sampling, Task, read_tasks
from training.trainable import TrainableAdapter


def prepare(config: FitConfig) -> tuple[list[Task], LoadedBackbone, list[TaskState]]:
    """Tasks read, backbone loaded, texts encoded once, and every task at its start."""
    if config.threads:
        torch.set_num_threads(config.threads)
    tasks = read_tasks(config.data, sampling(config), config.tasks)
    backbone = load(config.backbone, config.dtype, config.device, generates=any(task.generates for task in tasks))
    kind = kind_of(config.kind)
    given = listed(kind.Config, config.hyperparameters)
    hyperparameters = validate(kind.Config, given, f"hyperparameter of {kind.name}")
    states = []
    for slot, task in enumerate(tasks):
        objective = objectives.begin(
            task, backbone, config.length(generates=task.generates), config.pooling, config.seed
        )
        adapter = TrainableAdapter(kind, hyperparameters, backbone.encoder.sites, objective, config.seed)
        _check_trains(task, adapter)
        train, dev = objective.texts(task.train), objective.texts(task.dev)
        _tell_cuts(task, (train, dev), objective.max_length)
        states.append(TaskState(task.name, slot, adapter, train, dev, config))
    if not states[0].adapter.places:
        _pool_once(backbone, states, config.token_budget)
    say(f"{len(tasks)} tasks, {sum(len(state.train) for state in states)} training examples, kind {kind.name}")
    return tasks, backbone, states


def _check_trains(task: Task, adapter: TrainableAdapter) -> None:
    if not adapter.tensors():
        raise ConfigError(
            f"kind {adapter.kind.name!r} trains a classifier's head and nothing else, but task {task.name!r} generates "
            f"and has no head; choose a kind that changes the backbone: {', '.join(sorted(set(KINDS) - {'head'}))}"
        )


def _tell_cuts(task: Task, parts: Sequence[Texts], limit: int) -> None:
    """Say what of prompts and completions did not fit; nothing is lost in silence."""
    cuts = [part.cuts for part in parts if part.cuts]
    prompts, completions = sum(cut.prompts for cut in cuts), sum(cut.completions for cut in cuts)
    if prompts or completions:
        say(
            f"{task.name}: of {sum(map(len, parts))} examples {prompts} prompts are cut at their beginning and "
            f"{completions} completions at their end to fit --max-length {limit}; "
            f"the longest has {max(cut.longest for cut in cuts)} tokens"
        )


def sampling(config: FitConfig) -> Sampling:
    """How the run cuts its splits."""
    return Sampling(config.seed, config.examples, config.dev_fraction, config.max_dev)


def _pool_once(backbone: LoadedBackbone, states: Sequence[TaskState], token_budget: int) -> None:
    """A kind without sites leaves the backbone as it is: its hidden states are the same in every step."""
    with bar(2 * len(states), "reading texts") as shown:
        for state in states:
            state.train, state.dev = (
                _with_pooled(backbone, state, part, token_budget) for part in (state.train, state.dev)
            )
            shown.advance(2)


def _with_pooled(backbone: LoadedBackbone, state: TaskState, part: Texts, token_budget: int) -> Texts:
    pooled = step.pool(backbone.encoder, part.rows, state.adapter.objective.pooling, token_budget)
    return replace(part, pooled=pooled)
