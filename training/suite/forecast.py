"""How long the rest takes, by the seconds that jobs like it took."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from training.suite.plan import Job


class Forecast:
    """Seconds of finished jobs, by method and examples."""

    def __init__(self, jobs: Sequence[Job], workers: int) -> None:
        self._jobs = {job.key: job for job in jobs}
        self._workers = workers
        self._seen: dict[tuple[str, int | str], list[float]] = {}

    def add(self, key: str, seconds: float) -> None:
        """A job took so long."""
        job = self._jobs[key]
        self._seen.setdefault((job.method, job.cell.size), []).append(seconds)

    def left(self, keys: Iterable[str]) -> float | None:
        """Seconds that these jobs will take all workers together; None while nothing is known.

        A job takes what the same method took with as many examples, or what all jobs took in the mean.
        """
        if not self._seen:
            return None
        anything = mean(value for values in self._seen.values() for value in values)
        jobs = [self._jobs[key] for key in keys]
        like = [self._seen.get((job.method, job.cell.size)) for job in jobs]
        return sum(mean(values) if values else anything for values in like) / self._workers


def told(seconds: float | None) -> str:
    """About how long, in words."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"


def by_key(lines: Iterable[Mapping[str, object]]) -> dict[str, float]:
    """Seconds of results' lines, by their jobs' keys."""
    return {f"{line['examples']}-{line['seed']}.{line['method']}": float(str(line["seconds"])) for line in lines}
