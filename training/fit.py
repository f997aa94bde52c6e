"""fit: train one adapter per task on a frozen backbone, resumable, into a run folder.

The path: read_tasks -> load backbone -> one TaskState per task -> loop.train -> export. Training runs through the very
sites that serve (step.py), so what was trained is what is served.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adapters_store.manifest import Backbone, GenerationSpec
from training import checkpoint, curve, export, loop, step
from training.backbone import LoadedBackbone, load
from training.config import FitConfig
from training.errors import RunError
from training.prepare import prepare
from training.progress import say
from training.run import Run, versions
from training.state import TaskState
from training.tasks import Task

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
    few = [state.dev_part(4) for state in states if len(state.dev)]
    step.score(backbone.encoder, few, config.token_budget)
    export.golden(backbone, states[0].adapter.adapter(), tasks[0])
    for state, loss in zip(states, losses, strict=True):
        answers = state.adapter.objective.describe(state.train)
        say(
            f"{state.name}: {len(state.train)} train, {len(state.dev)} dev, {answers}, "
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
        backbone = load(config.backbone, "float32", config.device, generates=backbone.language is not None)
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
        generation=_generation(task, state),
    )
    export.write(run.adapters / task.name, manifest, adapter)


def _generation(task: Task, state: TaskState) -> GenerationSpec | None:
    """How a server should ask the task: as its texts suggest and as task.toml says."""
    spec = state.adapter.objective.generation([state.train, state.dev])
    return spec and spec.model_copy(update={"stop": task.stop})


def _metrics(state: TaskState) -> dict[str, float]:
    counts = {"train_examples": len(state.train), "dev_examples": len(state.dev), "epoch": state.epoch}
    cuts = state.train.cuts, state.dev.cuts
    counts |= {
        f"cut_{name}": sum(getattr(cut, name) for cut in cuts) for name in ("prompts", "completions") if all(cuts)
    }
    if state.best is None:
        return {name: float(value) for name, value in counts.items()}
    counts["epoch"] = state.best.epoch
    return state.dev_metrics(state.best.score) | {name: float(value) for name, value in counts.items()}


def _summary(config: FitConfig, states: Sequence[TaskState]) -> dict[str, Any]:
    tasks = {state.name: _metrics(state) | {"parameters": state.adapter.num_parameters} for state in states}
    return {"kind": config.kind, "seed": config.seed, **_means(tasks, states), "tasks": tasks}


def _means(tasks: Mapping[str, Mapping[str, Any]], states: Sequence[TaskState]) -> dict[str, float | None]:
    """Of each objective's first metric over its tasks; None where no task has a dev split."""
    found = {}
    for name in dict.fromkeys(f"dev_{state.adapter.objective.headline}" for state in states):
        mine = [state.name for state in states if f"dev_{state.adapter.objective.headline}" == name]
        scores = [tasks[task][name] for task in mine if name in tasks[task]]
        found[f"mean_{name}"] = sum(scores) / len(scores) if scores else None
    return found
