"""Which jobs there are and which can begin, how long they take, and lines on disk."""

from pathlib import Path

import pytest

from training.errors import ConfigError
from training.suite import registry
from training.suite.forecast import Forecast, told
from training.suite.ledger import FAILED, Ledger, append, read_lines
from training.suite.plan import Cell, Job, jobs
from training.suite.settings import EvaluateConfig
from training.suite.worker import preferred, ready_jobs


def test_unknown_methods_are_refused() -> None:
    config = EvaluateConfig(data=(Path("d"),), methods=("magic",))
    with pytest.raises(ConfigError, match="unknown method 'magic'; known are: single, uniform"):
        jobs(config, {m: registry.METHODS[m] for m in ("single", "uniform")}, relate=False)


def test_what_can_begin_and_what_is_lost() -> None:
    a, b = Cell(6, 0), Cell(6, 1)
    plan = [Job(cell, *rest) for cell in (a, b) for rest in (("nodes", "setup"), ("m", "pluggable", ("nodes",)))]

    assert ready_jobs(plan, set(), {}) == [plan[0], plan[2]]
    assert preferred([plan[0], plan[2]], None, {"6-0.m": "1"}) == [plan[2], plan[0]]
    assert preferred([plan[1], plan[2]], a, {}) == [plan[1], plan[2]]
    assert ready_jobs(plan, set(), {"6-0.nodes": "1", "6-1.nodes": FAILED}) == []
    assert ready_jobs(plan, set(), {"6-0.nodes": FAILED, "6-1.nodes": FAILED}) is None
    assert ready_jobs(plan, {job.key for job in plan}, {}) is None


def test_half_a_line_is_left_behind(tmp_path: Path) -> None:
    file = tmp_path / "cell.jsonl"
    file.write_text('{"method": "a"}\n{"meth')

    append(file, {"method": "b"})

    assert [line["method"] for line in read_lines(file)] == ["a", "b"]


def test_the_rest_is_foretold_by_like_jobs() -> None:
    plan = [Job(Cell(n, s), m, "pluggable") for m in ("a", "b") for n in (6, 30) for s in (0, 1)]
    forecast = Forecast(plan, workers=2)
    assert forecast.left(["6-0.a"]) is None

    forecast.add("6-0.a", 10)
    forecast.add("30-0.a", 50)

    assert forecast.left(["6-1.a"]) == 5
    assert forecast.left(["6-1.a", "30-1.b"]) == 5 + 15
    assert (told(None), told(8), told(600), told(7200)) == (
        "", "about 8 s left", "about 10 min left", "about 2.0 h left",
    )  # fmt: skip


def test_done_hears_of_new_lines_and_not_of_half_ones(tmp_path: Path) -> None:
    ledger, file = Ledger(tmp_path, "s"), tmp_path / "cells" / "6-0.jsonl"
    file.parent.mkdir()
    append(file, {"method": "a", "setting": "s"})
    append(file, {"method": "b", "setting": "other"})
    assert ledger.done() == {"6-0.a"}

    file.write_text(file.read_text() + '{"method": "c", "set')
    assert ledger.done() == {"6-0.a"}
    append(file, {"method": "d", "setting": "s"})
    assert ledger.done() == {"6-0.a", "6-0.d"} == Ledger(tmp_path, "s").done()
