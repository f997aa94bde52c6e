"""Worker processes and the pipes to them: events come in, the end of a pipe is the end of its process.

A worker whose parent is gone stops at its next look; one that dies (out of memory) fails the job it had and is
replaced.
"""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from training.memory import keep_freed
from training.suite.worker import Event, Work, Worker

LOOK_S = 0.5  # between two looks whether a signal came


class _Pipe:
    """A worker's boss at the other end of a pipe."""

    def __init__(self, pipe: "Connection[Event, Event]") -> None:
        self._pipe = pipe

    def tell(self, event: Event) -> None:
        self._pipe.send(event)

    def wait(self, seconds: float) -> None:
        if self._pipe.poll(seconds):
            self._pipe.recv()  # nothing is ever sent: this is the end, EOFError


def _serve(work: Work, pipe: "Connection[Event, Event]") -> None:
    keep_freed()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends this process
    try:
        Worker(work, _Pipe(pipe)).run()
    except (EOFError, BrokenPipeError):
        return


class Crew:
    """Processes at work on one folder."""

    def __init__(self, work: Work, count: int) -> None:
        self.work = work
        self._context = multiprocessing.get_context("spawn")
        self._members: dict[Connection[Event, Event], BaseProcess] = {}
        for _ in range(count):
            self._hire()

    def _hire(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(self.work, theirs), daemon=True)
        process.start()
        theirs.close()
        self._members[ours] = process

    def watch(self, on_event: Callable[[Event], None], stopping: Callable[[], bool]) -> None:
        """Hear all events until every worker is done or the work is to stop."""
        while self._members and not stopping():
            for pipe in connection.wait(list(self._members), timeout=LOOK_S):
                assert isinstance(pipe, Connection), "our bug: only pipes are waited for"
                try:
                    on_event(pipe.recv())
                except EOFError:
                    self._bury(pipe, on_event)

    def _bury(self, pipe: "Connection[Event, Event]", on_event: Callable[[Event], None]) -> None:
        """A worker ended: if not by itself, what it had failed and another takes its place."""
        process = self._members.pop(pipe)
        process.join()
        ledger = self.work.ledger
        done, claims = ledger.done(), ledger.claimed()
        had = [job for job in self.work.jobs if claims.get(job.key) == str(process.pid) and job.key not in done]
        for job in had:
            ledger.failed(job, f"the worker died with exit code {process.exitcode}; out of memory?")
            on_event(("failed", job.key, 0.0))
        if had:
            self._hire()

    def end(self) -> None:
        """Stop all that still run; what they were at begins anew next time."""
        for process in self._members.values():
            process.terminate()
        for process in self._members.values():
            process.join()
        self._members.clear()
