"""What can go wrong in training.

EspalierError
└── TrainingError
    ├── ConfigError        a setting that is unknown, impossible or contradicts the run it resumes
    ├── DataError          a task folder that cannot be read; names file and line
    ├── RunError           a run folder that is taken, missing, unfinished or broken
    ├── DivergedError      a loss that is no number any more; names the task
    └── StoppedError       Ctrl-C or SIGTERM, after the checkpoint was written
"""

from adapters_store.errors import EspalierError


class TrainingError(EspalierError):
    """Base of what training raises on purpose."""

    code = "training"


class ConfigError(TrainingError):
    """A setting that cannot be used: the command line's fault, exit status 2."""

    code = "config"


class DataError(TrainingError):
    """A task folder that is not what it should be."""

    code = "data"


class RunError(TrainingError):
    """A run folder that cannot be written, resumed or read."""

    code = "run"


class DivergedError(TrainingError):
    """The loss of a task became NaN or infinite."""

    code = "diverged"


class StoppedError(TrainingError):
    """A signal asked to stop; everything done so far is in the checkpoint."""

    code = "stopped"

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
