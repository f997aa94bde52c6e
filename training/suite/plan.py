"""What a suite's evaluation consists of: cells (examples, seed), and in each cell jobs that need one another.

nodes ──▶ relations, pluggable and unknown methods;   joint methods and sweeps train their own adapters and need nothing
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from training.errors import ConfigError
from training.suite.methods import Method
from training.suite.settings import EvaluateConfig
from training.suite.workbench import Setting

NODES, RELATIONS, SETUP = "nodes", "relations", "setup"
REGIMES = ("pluggable", "joint", "unknown", "sweep")
_TRAIN_THEIR_OWN = ("joint", "sweep")


@dataclass(frozen=True)
class Cell:
    """One number of training examples (None: all) and one seed."""

    examples: int | None
    seed: int

    @property
    def size(self) -> int | str:
        """Number of examples as results have it."""
        return "all" if self.examples is None else self.examples

    @property
    def name(self) -> str:
        """Of the cell's files."""
        return f"{self.size}-{self.seed}"


@dataclass(frozen=True)
class Job:
    """A method of a cell, or what methods need. needs: names of jobs of the same cell that come first."""

    cell: Cell
    method: str
    regime: str
    needs: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Unique within an evaluation; the name of its claim."""
        return f"{self.cell.name}.{self.method}"

    @property
    def needed(self) -> list[str]:
        """Keys of what comes first."""
        return [f"{self.cell.name}.{name}" for name in self.needs]


def cells(config: EvaluateConfig) -> list[Cell]:
    """All cells, few examples first."""
    sizes = [None if size == "all" else size for size in dict.fromkeys(config.examples)]
    return [Cell(size, seed) for size in sizes for seed in dict.fromkeys(config.seeds)]


def jobs(config: EvaluateConfig, methods: Mapping[str, Method], *, relate: bool) -> list[Job]:
    """All jobs, in the order in which they are preferred. Raises ConfigError.

    relate: relations can be measured; they are, if nothing or they are among what is wanted.
    """
    chosen = chosen_methods(config.methods, methods, relate=relate)
    asked = relate and (RELATIONS in config.methods or not config.methods)
    return [job for cell in cells(config) for job in _of_cell(cell, chosen, asked)]


def needed(planned: Sequence[Job], done: Set[str]) -> list[Job]:
    """The jobs without those that nothing waits for: nodes of cells whose methods all have their lines."""
    waiting = {key for job in planned if job.key not in done for key in job.needed}
    return [job for job in planned if job.method != NODES or job.key in done or job.key in waiting]


def chosen_methods(wanted: Sequence[str], methods: Mapping[str, Method], *, relate: bool) -> list[Method]:
    """The methods of these names and regimes; all but sweeps, if nothing is wanted. Raises ConfigError."""
    known = {*methods, *REGIMES} | ({RELATIONS} if relate else set())
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(f"unknown method {unknown[0]!r}; known are: {', '.join(methods)}, or {', '.join(REGIMES)}")
    if not wanted:
        return [method for method in methods.values() if method.regime != "sweep"]
    return [method for method in methods.values() if method.name in wanted or method.regime in wanted]


def _of_cell(cell: Cell, chosen: Sequence[Method], relate: bool) -> list[Job]:
    built = [Job(cell, m.name, m.regime, () if m.regime in _TRAIN_THEIR_OWN else (NODES,)) for m in chosen]
    if relate or any(job.needs for job in built):
        last = [Job(cell, RELATIONS, SETUP, (NODES,))] if relate else []  # slow, and nothing waits for it
        return [Job(cell, NODES, SETUP), *built, *last]
    return built


def setting_of(config: EvaluateConfig, cell: Cell) -> Setting:
    """What the bench of a cell is made of."""
    return Setting(
        data=config.data, examples=cell.examples, seed=cell.seed, test_examples=config.test_examples,
        max_length=config.max_length, first_layer=config.first_layer, backbone=config.backbone, dtype=config.dtype,
        token_budget=config.token_budget,
    )  # fmt: skip
