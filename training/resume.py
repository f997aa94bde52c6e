"""Which run `fit --resume` goes on with, and with what settings: the run's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.config import FitConfig, read_file, resolve, validate
from training.errors import ConfigError
from training.run import Run, newest_unfinished

_MAY_CHANGE = frozenset({"runs", "run", "checkpoint_s"})  # settings that decide no number


def settings(file: Path | None, flags: Mapping[str, Any]) -> FitConfig:
    """The settings of the run to go on with: the one that is named, else the newest unfinished one.

    A named run that has not begun yet begins. Raises ConfigError for a setting that would change the run's numbers, and
    RunError if there is nothing to resume.
    """
    given = (read_file(file) if file else {}) | dict(flags)
    runs = Path(given.get("runs", FitConfig.model_fields["runs"].default))
    run = Run(runs / resolve(FitConfig, file, flags).run_name) if "data" in given else _find(runs, given.get("run"))
    if not run.exists:
        return resolve(FitConfig, file, flags)
    return _merged(run, given | {"runs": runs, "run": run.folder.name})


def _find(runs: Path, name: str | None) -> Run:
    return Run(runs / name) if name else newest_unfinished(runs)


def _merged(run: Run, given: Mapping[str, Any]) -> FitConfig:
    saved = run.config()
    merged = validate(FitConfig, saved.model_dump() | dict(given))
    changed = [name for name in FitConfig.model_fields if getattr(merged, name) != getattr(saved, name)]
    for name in changed:
        if name not in _MAY_CHANGE:
            raise ConfigError(
                f"--resume goes on with the settings of {run.folder}, where {name} is {getattr(saved, name)!r}, "
                f"not {getattr(merged, name)!r}; leave it out, or begin another --run"
            )
    return merged
