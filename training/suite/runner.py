"""evaluate: every method on every cell of a suite, by several workers, to be stopped and gone on with at any time.

What is finished has a line in its cell's file (ledger.py) and is not done again. A job that fails is told, the others
go on, and the next run of the same command tries it again.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from training.errors import RunError, StoppedError
from training.interrupt import interrupt
from training.progress import Bar, bar, say
from training.suite import registry
from training.suite.crew import Crew
from training.suite.forecast import Forecast, by_key, told
from training.suite.identity import commit, digest, identity
from training.suite.ledger import Ledger
from training.suite.plan import SETUP, Job, jobs, needed
from training.suite.report import report
from training.suite.settings import EvaluateConfig, ReportConfig
from training.suite.worker import Event, Work, Worker

OnJob = Callable[[Event], None]


def evaluate(config: EvaluateConfig, on_job: OnJob | None = None) -> Ledger:
    """Do what has no line yet. on_job hears of every job that is over, and may raise.

    Raises ConfigError, DataError, RunError if jobs failed, StoppedError after a signal.
    """
    planned = jobs(config, registry.METHODS, relate=registry.RELATE is not None)
    found = identity(config)
    ledger = Ledger(config.folder, digest(found))
    with ledger.opened(found):
        planned = needed(planned, ledger.done())
        work = Work(config, planned, ledger.setting, commit())
        _work(work, ledger, on_job)
        _check(ledger, planned)
    return ledger


def evaluate_and_report(config: EvaluateConfig) -> None:
    """As `evaluate`; the report is written in any case, if there is anything to report."""
    try:
        ledger = evaluate(config)
    except RunError:
        _report(config, Ledger(config.folder, digest(identity(config))))
        raise
    _report(config, ledger)


def _report(config: EvaluateConfig, ledger: Ledger) -> None:
    if any(line["regime"] != SETUP for line in ledger.lines()):
        report(ReportConfig(results=(config.folder,), out=config.folder / "report"))


def dry_run(config: EvaluateConfig) -> None:
    """Say which cells and jobs there are and which of them are done; nothing is written. Raises ConfigError."""
    planned, found = jobs(config, registry.METHODS, relate=registry.RELATE is not None), identity(config)
    ledger = Ledger(config.folder, digest(found))
    ledger.check(found)
    done = ledger.done()
    planned = needed(planned, done)
    for cell in dict.fromkeys(job.cell for job in planned):
        own = [job for job in planned if job.cell == cell]
        say(f"{config.suite}, {cell.size} examples, seed {cell.seed}: {len(own)} jobs")
        for job in own:
            say(f"  {job.method}" + (f" ({job.regime})" if job.regime != SETUP else "") + _state(job, done))
    left = [job for job in planned if job.key not in done]
    say(f"{len(planned)} jobs, {len(left)} to do, into {config.folder}; nothing was written")


def _state(job: Job, done: set[str]) -> str:
    return "  done" if job.key in done else ""


def _work(work: Work, ledger: Ledger, on_job: OnJob | None) -> None:
    done = ledger.done()
    left = {job.key for job in work.jobs if job.key not in done}
    if not left:
        say(f"all {len(work.jobs)} jobs of {work.config.folder} are done")
        return
    workers = min(work.config.workers, len(left))
    forecast = Forecast(work.jobs, workers)
    for key, seconds in by_key(ledger.lines()).items():
        if key in {job.key for job in work.jobs}:
            forecast.add(key, seconds)
    with bar(len(work.jobs), f"evaluating {work.config.suite}", len(work.jobs) - len(left), jobs=True) as shown:
        teller = _Teller(shown, forecast, left, on_job)
        (_apart if workers > 1 else _here)(work, workers, teller)


class _Teller:
    """Hears of jobs and shows how far it all is."""

    def __init__(self, shown: Bar, forecast: Forecast, left: set[str], on_job: OnJob | None) -> None:
        self._shown, self._forecast, self._left, self._on_job = shown, forecast, left, on_job

    def tell(self, event: Event) -> None:
        """A job is over."""
        outcome, key, seconds = event
        self._left.discard(key)
        if outcome == "done":
            self._forecast.add(key, seconds)
        rest = told(self._forecast.left(self._left)) if self._left else ""
        self._shown.advance(note=f"{key} {outcome} in {seconds:.0f} s{'; ' + rest if rest else ''}")
        if self._on_job:
            self._on_job(event)

    def wait(self, seconds: float) -> None:
        """Never needed alone: what is claimed is one's own and over."""
        raise AssertionError(f"our bug: the only worker waits {seconds} s for others")


def _here(work: Work, workers: int, teller: _Teller) -> None:  # noqa: ARG001  # one of two ways
    """One worker, this process."""
    with _threads_kept():
        try:
            Worker(work, teller).run()
        except KeyboardInterrupt:
            raise _stopped(work, signal.SIGINT) from None


def _apart(work: Work, workers: int, teller: _Teller) -> None:
    """Several processes."""
    with interrupt() as asked:
        crew = Crew(work, workers)
        try:
            crew.watch(teller.tell, lambda: asked.signum is not None)
        finally:
            crew.end()
    if asked.signum is not None:
        raise _stopped(work, asked.signum)


@contextmanager
def _threads_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stopped(work: Work, signum: int) -> StoppedError:
    done = work.ledger.done()
    count = sum(job.key in done for job in work.jobs)
    return StoppedError(
        signum, f"stopped: {count} of {len(work.jobs)} jobs of {work.config.folder} are done; "
        "give the same command again to go on",
    )  # fmt: skip


def _check(ledger: Ledger, planned: Sequence[Job]) -> None:
    """Tell what failed. Raises RunError if anything did."""
    done, errors = ledger.done(), ledger.errors()
    missing = [job for job in planned if job.key not in done]
    if not missing:
        return
    for error in errors:
        say(f"failed: {error['method']} with {error['examples']} examples, seed {error['seed']}: {error['error']}")
    raise RunError(
        f"{len(missing)} of {len(planned)} jobs have no result ({len(errors)} failed, see {ledger.errors_file}); "
        "give the same command again to try them again"
    )
