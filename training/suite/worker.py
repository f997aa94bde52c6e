"""What works through a suite's jobs: in this process, or in several that share the folder."""

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from training.backbone import LoadedBackbone, load
from training.suite import nodes, registry
from training.suite.ledger import FAILED, Ledger, write_json
from training.suite.methods import Nodes, Result
from training.suite.plan import NODES, RELATIONS, SETUP, Cell, Job, setting_of
from training.suite.settings import EvaluateConfig
from training.suite.workbench import Workbench, prepare

PAUSE_S = 0.2  # between two looks for work that others' jobs make possible
Event = tuple[str, str, float]  # "done" or "failed", key of the job, seconds


class Boss(Protocol):
    """Whom a worker reports to."""

    def tell(self, event: Event) -> None:
        """A job is over."""

    def wait(self, seconds: float) -> None:
        """Give others time."""


@dataclass(frozen=True)
class Work:
    """What there is to do, for every worker the same. commit: of the code that runs."""

    config: EvaluateConfig
    jobs: Sequence[Job]
    setting: str
    commit: str | None

    @property
    def ledger(self) -> Ledger:
        """The folder where it is noted."""
        return Ledger(self.config.folder, self.setting)


class Worker:
    """Takes jobs until none is left that can be done; keeps the bench of the cell it works on."""

    def __init__(self, work: Work, boss: Boss) -> None:
        self.work, self.boss, self.ledger = work, boss, work.ledger
        self.cell: Cell | None = None
        self._bench: Workbench | None = None
        self._backbone: LoadedBackbone | None = None

    def run(self) -> None:
        """Work until nothing is left."""
        torch.set_num_threads(self.work.config.threads)
        while (ready := ready_jobs(self.work.jobs, self.ledger.done(), claims := self.ledger.claimed())) is not None:
            chosen = next((job for job in preferred(ready, self.cell, claims) if self.ledger.claim(job)), None)
            if chosen is None:
                self.boss.wait(PAUSE_S)
            else:
                self._do(chosen)

    def _do(self, job: Job) -> None:
        start = time.perf_counter()
        try:
            self.ledger.add(job.cell, self._line(job))
            outcome = "done"
        except Exception as error:  # noqa: BLE001  # whatever a method does wrong, the others go on
            self.ledger.failed(job, f"{type(error).__name__}: {error}")
            outcome = "failed"
        self.boss.tell((outcome, job.key, time.perf_counter() - start))

    def _line(self, job: Job) -> dict[str, Any]:
        """Do the job; what is known of it then."""
        bench = self._held(job.cell)
        reset_peak()
        start = time.perf_counter()
        result = self._result(job, bench)
        used = {"seconds": round(time.perf_counter() - start, 3), "peak_mb": peak_mb()}
        return describe(job, bench, result, self.work) | used

    def _held(self, cell: Cell) -> Workbench:
        if self.cell != cell or self._bench is None:
            self._bench, self.cell = None, None  # the old one's memory first
            config = self.work.config
            self._backbone = self._backbone or load(config.backbone, config.dtype)
            self._bench, self.cell = prepare(setting_of(config, cell), self._backbone), cell
        return self._bench

    def _result(self, job: Job, bench: Workbench) -> Result:
        folder = self.ledger.nodes(job.cell)
        if job.method == NODES:
            nodes.save(nodes.train_nodes(bench), bench.names, folder)
            return Result([])
        trained = nodes.load(folder, bench.names) if NODES in job.needs else Nodes([], [])
        if job.method != RELATIONS:
            return registry.METHODS[job.method].run(bench, trained)
        if registry.RELATE is None:
            raise AssertionError("our bug: relations were planned and cannot be measured")
        write_json(self.ledger.relations(job.cell), registry.RELATE(bench, trained))
        return Result([])


def ready_jobs(jobs: Sequence[Job], done: set[str], claims: Mapping[str, str]) -> list[Job] | None:
    """Jobs that can begin now; an empty list if they wait for others' jobs; None if there is nothing to wait for."""
    open_jobs = [job for job in jobs if job.key not in done and job.key not in claims]
    lost = {key for key, owner in claims.items() if owner == FAILED}
    alive = [job for job in open_jobs if not lost.intersection(job.needed)]
    return [job for job in alive if done.issuperset(job.needed)] if alive else None


def preferred(ready: Sequence[Job], held: Cell | None, claims: Mapping[str, str]) -> list[Job]:
    """The held cell's jobs first, then those of cells that nobody has begun; otherwise in the plan's order."""
    begun = {key.rpartition(".")[0] for key in claims}
    return sorted(ready, key=lambda job: (job.cell != held, job.cell.name in begun))


def describe(job: Job, bench: Workbench, result: Result, work: Work) -> dict[str, Any]:
    """A line of results, without what it cost."""
    facts = dict(result.facts)
    sweep = {"sweep": facts.pop("sweep")} if "sweep" in facts else {}
    scores: dict[str, Any] = {"accuracy": [round(float(value), 6) for value in result.accuracy]}
    if result.weights is not None:
        scores["weights"] = [[[round(v, 3) or 0 for v in row] for row in task] for task in result.weights.tolist()]
    about = {"suite": work.config.suite, "examples": job.cell.size, "seed": job.cell.seed, "method": job.method}
    tasks = {"regime": job.regime, "tasks": bench.names, "families": families(bench)}
    last = {"facts": facts, "commit": work.commit, "setting": work.setting}
    return about | sweep | tasks | (scores if job.regime != SETUP else {"accuracy": []}) | last


def families(bench: Workbench) -> list[str]:
    """Of each task: its own family, or the name of the folder it came from."""
    home = {path.name.lower(): folder.resolve().name for folder in bench.setting.data for path in folder.iterdir()}
    return [task.family or home[task.name] for task in bench.tasks]


def reset_peak() -> None:
    """Let the peak of memory count from here, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_mb() -> int:
    """Largest memory of this process, in MB; since `reset_peak` where the system can."""
    try:
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) // 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
