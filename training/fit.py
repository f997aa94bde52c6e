"""fit: train one adapter per task on a frozen backbone, resumable, into a run folder.

The path: read_tasks -> load backbone -> one TaskState per task -> loop.train -> export. Training runs through the very
sites that serve (step.py), so what was trained is what is served.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from adapters_store.kinds import kind as kind_of
from adapters_store.manifest import Backbone
from training import checkpoint, curve, export, loop, step
from training.backbone import LoadedBackbone, load
from training.config import FitConfig, validate
from training.errors import RunError
from training.progress import bar, say
from training.run import Run, versions
from training.state import TaskState
from training.step import Part, Texts
from training.tasks import Sampling, Split, Task, read_tasks
from training.trainable import HeadChoice, TrainableAdapter

OnStep = Callable[[int], None]


def fit(config: FitConfig, *, resume: bool = False, on_step: OnStep | None = None) -> Run:
    """Train what the settings say and return the finished run. Raises a TrainingError that says what to do.

    resume: go on from the run's checkpoint; the result is the same, byte for byte, as if it had never stopped.
    """
    run = Run(config.runs / config.run_name)
    _check_free(run, resume)
    tasks, backbone, states = prepare(config)
    if resume and run.exists:
        _go_on(run, tasks, states)
    else:
        run.begin(config, tasks)
    loop.train(backbone.encoder, states, config, run, on_step)
    finish(run, config, backbone, tasks, states)
    return run


def dry_run(config: FitConfig) -> None:
    """One batch of every task through everything, nothing written."""
    tasks, backbone, states = prepare(config)
    losses = step.backward(backbone.encoder, [state.next_part() for state in states], config.token_budget)
    for state in states:
        state.advance()
    few = [
        Part(state.slot, state.adapter, state.dev.take(range(min(4, len(state.dev)))))
        for state in states
        if len(state.dev)
    ]
    step.score(backbone.encoder, few, config.token_budget)
    export.golden(backbone, states[0].adapter.adapter(), tasks[0])
    for state, loss in zip(states, losses, strict=True):
        say(
            f"{state.name}: {len(state.train)} train, {len(state.dev)} dev, {len(state.adapter.labels)} labels, "
            f"{state.adapter.num_parameters} parameters, {state.num_steps} steps, first loss {loss:.3f}"
        )
    say("dry run: everything works, nothing was written")


def _check_free(run: Run, resume: bool) -> None:
    if run.exists and not resume:
        way = (
            "it is finished; choose another --run"
            if run.is_finished
            else "--resume goes on with it, or choose another --run"
        )
        raise RunError(f"{run.folder} holds a run already: {way}")
    if run.exists and run.is_finished:
        raise RunError(f"{run.folder} is finished, there is nothing to resume; its results are in {run.summary_file}")


def prepare(config: FitConfig) -> tuple[list[Task], LoadedBackbone, list[TaskState]]:
    """Tasks read, backbone loaded, texts encoded once, and every task at its start."""
    if config.threads:
        torch.set_num_threads(config.threads)
    tasks = read_tasks(config.data, sampling(config), config.tasks)
    backbone = load(config.backbone, config.dtype, config.device)
    kind = kind_of(config.kind)
    hyperparameters = validate(kind.Config, config.hyperparameters, f"hyperparameter of {kind.name}")
    choice = HeadChoice(config.pooling or backbone.default_pooling, min(config.max_length, backbone.encoder.max_length))
    states = []
    for slot, task in enumerate(tasks):
        adapter = TrainableAdapter(task, kind, hyperparameters, backbone.encoder.sites, choice, config.seed)
        train, dev = (texts(backbone, task, split, choice) for split in (task.train, task.dev))
        states.append(TaskState(task.name, slot, adapter, train, dev, config))
    if not states[0].adapter.places:
        _pool_once(backbone, states, config.token_budget)
    say(f"{len(tasks)} tasks, {sum(len(state.train) for state in states)} training examples, kind {kind.name}")
    return tasks, backbone, states


def sampling(config: FitConfig) -> Sampling:
    """How the run cuts its splits."""
    return Sampling(config.seed, config.examples, config.dev_fraction, config.max_dev)


def texts(backbone: LoadedBackbone, task: Task, split: Split, choice: HeadChoice) -> Texts:
    """A split as token ids and label indices."""
    rows = backbone.encode([example.text for example in split], choice.max_length)
    return Texts(rows, task.targets(split))


def _pool_once(backbone: LoadedBackbone, states: Sequence[TaskState], token_budget: int) -> None:
    """A kind without sites leaves the backbone as it is: its hidden states are the same in every step."""
    with bar(2 * len(states), "reading texts") as shown:
        for state in states:
            state.train, state.dev = (
                _with_pooled(backbone, state, part, token_budget) for part in (state.train, state.dev)
            )
            shown.advance(2)


def _with_pooled(backbone: LoadedBackbone, state: TaskState, part: Texts, token_budget: int) -> Texts:
    poolings = [state.adapter.choice.pooling] * len(part)
    return replace(part, pooled=step.pool(backbone.encoder, part.rows, [None] * len(part), poolings, token_budget))


def _go_on(run: Run, tasks: Sequence[Task], states: Sequence[TaskState]) -> None:
    run.check_data(tasks)
    place = checkpoint.newest(run.checkpoints)
    if place:
        checkpoint.load(place, states)
    run.rewind_metrics({state.name: state.step for state in states})
    done, total = sum(state.step for state in states), sum(state.num_steps for state in states)
    say(f"resumed {run.folder} at step {done} of {total}")


def finish(
    run: Run, config: FitConfig, backbone: LoadedBackbone, tasks: Sequence[Task], states: Sequence[TaskState]
) -> None:
    """Export the best epoch of every task, draw the curve, write the summary, let the checkpoint go."""
    trained_on = backbone.fingerprint
    if config.dtype != "float32":  # golden examples are promised in float32
        backbone = load(config.backbone, "float32", config.device)
    for task, state in zip(tasks, states, strict=True):
        if state.best:
            state.adapter.load(state.best.tensors)
        _export(run, config, backbone, trained_on, task, state)
    curve.draw(run.metrics(), run.folder / "learning_curve.png")
    run.write("summary.json", _summary(config, states))
    shutil.rmtree(run.checkpoints, ignore_errors=True)


def _export(
    run: Run, config: FitConfig, backbone: LoadedBackbone, trained_on: Backbone, task: Task, state: TaskState
) -> None:
    adapter = state.adapter.adapter()
    manifest = export.manifest_of(
        adapter,
        trained_on,
        task,
        kind=config.kind,
        hyperparameters=state.adapter.config.model_dump(mode="json"),
        metrics=_metrics(state),
        provenance={"data_digest": task.digest, "seed": config.seed, "versions": versions(), "run": run.folder.name},
        golden=export.golden(backbone, adapter, task),
    )
    export.write(run.adapters / task.name, manifest, adapter)


def _metrics(state: TaskState) -> dict[str, float]:
    counts = {"train_examples": len(state.train), "dev_examples": len(state.dev), "epoch": state.epoch}
    if state.best is None:
        return {name: float(value) for name, value in counts.items()}
    counts["epoch"] = state.best.epoch
    scores = {"dev_accuracy": state.best.score.accuracy, "dev_loss": state.best.score.loss}
    return scores | {name: float(value) for name, value in counts.items()}


def _summary(config: FitConfig, states: Sequence[TaskState]) -> dict[str, Any]:
    tasks = {state.name: _metrics(state) | {"parameters": state.adapter.num_parameters} for state in states}
    scores = [task["dev_accuracy"] for task in tasks.values() if "dev_accuracy" in task]
    mean = sum(scores) / len(scores) if scores else None
    return {"kind": config.kind, "seed": config.seed, "mean_dev_accuracy": mean, "tasks": tasks}
