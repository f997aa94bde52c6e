"""The training loop: steps, scores at the end of an epoch, checkpoints, and stopping when asked.

Tasks train in groups: one group of all tasks (mixed), or a group of one each (one by one). Every step takes a batch of
each unfinished task of the group; the results are the same, the mixed way reads the backbone's weights less often.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from adapters_store.encoder import Encoder
from training import checkpoint, step
from training.config import FitConfig
from training.errors import DivergedError, StoppedError
from training.interrupt import interrupt
from training.objectives import Score
from training.progress import Bar, bar
from training.run import Run
from training.state import TaskState

OnStep = Callable[[int], None]


def train(
    encoder: Encoder, states: Sequence[TaskState], config: FitConfig, run: Run, on_step: OnStep | None = None
) -> None:
    """Train all tasks to their end, from wherever they stand. Raises DivergedError, StoppedError.

    on_step: called after every step with the number of steps taken since the run began (a seam for tests).
    """
    groups = [[state] for state in states] if config.one_by_one else [list(states)]
    total, done = sum(state.num_steps for state in states), sum(state.step for state in states)
    saved = time.monotonic()
    with interrupt() as asked, bar(total, "training", done) as shown:
        for group in groups:
            while unfinished := [state for state in group if not state.is_finished]:
                run.log(_step(encoder, unfinished, config, shown))
                signum = asked.signum  # read once: a signal that comes later is for the next step
                if signum or time.monotonic() - saved > config.checkpoint_s:
                    checkpoint.save(run.checkpoints, states)
                    saved = time.monotonic()
                _stop_if_asked(signum, run)
                if on_step:
                    on_step(sum(state.step for state in states))


def _stop_if_asked(signum: int | None, run: Run) -> None:
    if signum is not None:
        command = f"espalier-train fit --resume --runs {run.folder.parent} --run {run.folder.name}"
        raise StoppedError(signum, f"stopped after a checkpoint; go on with: {command}")


def _step(encoder: Encoder, states: Sequence[TaskState], config: FitConfig, shown: Bar) -> list[dict[str, Any]]:
    """One optimiser step of every task, and scores of those whose epoch ends with it; lines for metrics.jsonl."""
    losses = step.backward(encoder, [state.next_part() for state in states], config.token_budget)
    for state, loss in zip(states, losses, strict=True):
        _check_finite(state, loss)
    lines = []
    for state, loss in zip(states, losses, strict=True):
        lr = state.advance()
        lines.append({"task": state.name, "step": state.step, "epoch": state.epoch, "loss": loss, "lr": lr})
    lines += _epoch_ends(encoder, [state for state in states if state.is_at_epoch_end], config.token_budget, shown)
    skipped = sum(state.num_steps - state.step for state in states if state.is_stopped)
    shown.advance(len(states) + skipped, f"loss {sum(losses) / len(losses):.3f}")
    return lines


def _check_finite(state: TaskState, loss: float) -> None:
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss of task {state.name!r} became {loss} at step {state.step + 1} (epoch {state.epoch + 1}): "
            "lower --lr or --clip, or look at the task's texts"
        )


def _epoch_ends(encoder: Encoder, states: Sequence[TaskState], token_budget: int, shown: Bar) -> list[dict[str, Any]]:
    """Score tasks on their dev splits and keep what is best; a task without one keeps its last epoch."""
    judged = [state for state in states if len(state.dev)]
    scores = step.score(encoder, [state.dev_part() for state in judged], token_budget)
    for state, score in zip(judged, scores, strict=True):
        state.judge(score)
    for headline, found in _headlines(judged, scores).items():
        epoch = max(state.epoch for state in judged)
        shown.say(f"epoch {epoch}: dev {headline} {sum(found) / len(found):.3f} over {len(found)} tasks")
    return [
        {"task": state.name, "step": state.step, "epoch": state.epoch} | state.dev_metrics(score)
        for state, score in zip(judged, scores, strict=True)
    ]


def _headlines(states: Sequence[TaskState], scores: Sequence[Score]) -> dict[str, list[float]]:
    """The metric that people look at first, by objective."""
    found: dict[str, list[float]] = defaultdict(list)
    for state, score in zip(states, scores, strict=True):
        objective = state.adapter.objective
        found[objective.headline].append(objective.metrics(score)[objective.headline])
    return found
