"""evaluate: jobs and their order, stops, failures, several workers, refusals."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from training.errors import ConfigError, DivergedError, RunError, StoppedError
from training.suite import registry, runner
from training.suite.crew import Crew
from training.suite.identity import identity
from training.suite.ledger import Ledger
from training.suite.methods import Method, Nodes, Result
from training.suite.plan import Cell, Job
from training.suite.settings import EvaluateConfig
from training.suite.workbench import Workbench
from training.suite.worker import Event, Work

COST = ("seconds", "peak_mb")
Make = Callable[..., EvaluateConfig]


@pytest.fixture
def suite_config(bert_folder: Path, data_folder: Path, tmp_path: Path) -> Make:
    def make(**changes: object) -> EvaluateConfig:
        usual: dict[str, object] = {
            "data": (data_folder,), "name": "tiny", "seeds": (0, 1), "examples": (6,), "out": tmp_path / "out",
            "test_examples": 8, "first_layer": 1, "backbone": str(bert_folder), "dtype": "float32",
            "methods": ("single", "uniform"),
        }  # fmt: skip
        return EvaluateConfig.model_validate(usual | changes)

    return make


def without_cost(ledger: Ledger) -> list[dict[str, object]]:
    lines = [{key: value for key, value in line.items() if key not in COST} for line in ledger.lines()]
    return sorted(lines, key=lambda line: (line["seed"], line["method"]))  # type: ignore[no-any-return]


def plugged(monkeypatch: pytest.MonkeyPatch, name: str, run: Callable[[Workbench, Nodes], Result]) -> None:
    monkeypatch.setitem(registry.METHODS, name, Method(name, "pluggable", run))


def test_every_job_has_a_line(suite_config: Make, tmp_path: Path) -> None:
    ledger = runner.evaluate(suite_config())

    lines = ledger.lines()
    assert [(line["seed"], line["method"]) for line in lines] == [
        (seed, method) for seed in (0, 1) for method in ("nodes", "single", "uniform")
    ]
    line = lines[1]
    assert line["suite"] == "tiny"
    assert line["examples"] == 6
    assert line["regime"] == "pluggable"
    assert line["tasks"] == ["books", "films", "intent"]
    assert line["families"][2] == "intent"
    assert len(line["accuracy"]) == 3
    assert [len(line["weights"]), len(line["weights"][0]), len(line["weights"][0][0])] == [3, 3, 2]
    assert line["setting"] == ledger.setting
    assert (tmp_path / "out" / "cells" / "6-0" / "nodes" / "nodes.safetensors").is_file()


def test_a_stopped_run_goes_on_to_the_same_lines(suite_config: Make, tmp_path: Path) -> None:
    whole = runner.evaluate(suite_config(out=tmp_path / "whole"))
    seen: list[Event] = []

    def stop(event: Event) -> None:
        seen.append(event)
        if len(seen) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        runner.evaluate(suite_config(), on_job=stop)
    again = runner.evaluate(suite_config(), on_job=seen.append)

    assert len({key for _, key, _ in seen}) == len(seen) == 6
    assert without_cost(again) == without_cost(whole)


def test_nodes_that_are_gone_are_made_again_when_something_needs_them(suite_config: Make, tmp_path: Path) -> None:
    """Lines are kept and shared; the node adapters beside them need not be."""
    first = runner.evaluate(suite_config(seeds=(0,), methods=("single",)))
    before = without_cost(first)
    shutil.rmtree(first.cells / "6-0")
    assert without_cost(runner.evaluate(suite_config(seeds=(0,), methods=("single",)))) == before
    assert not (first.cells / "6-0").exists()

    again = runner.evaluate(suite_config(seeds=(0,)))

    assert {line["method"] for line in again.lines()} == {"nodes", "single", "uniform"}
    whole = runner.evaluate(suite_config(seeds=(0,), out=tmp_path / "whole"))
    kept = {line["method"]: line["accuracy"] for line in again.lines()}
    assert kept == {line["method"]: line["accuracy"] for line in whole.lines()}


def test_two_workers_give_what_one_gives(suite_config: Make, tmp_path: Path) -> None:
    one = runner.evaluate(suite_config(out=tmp_path / "one"))

    two = runner.evaluate(suite_config(workers=2))

    assert without_cost(two) == without_cost(one)


def test_what_is_added_later_is_all_that_is_done(suite_config: Make) -> None:
    runner.evaluate(suite_config(seeds=(0,), methods=("single",)))
    seen: list[Event] = []

    runner.evaluate(suite_config(seeds=(0,)), on_job=seen.append)

    assert [key for _, key, _ in seen] == ["6-0.uniform"]


def test_a_failing_method_is_told_and_tried_again(
    suite_config: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(bench: Workbench, nodes: Nodes) -> Result:
        raise DivergedError("the loss became nan")

    plugged(monkeypatch, "broken", breaks)
    config = suite_config(seeds=(0,), methods=("broken", "single"))
    with pytest.raises(RunError, match="1 of 3 jobs have no result"):
        runner.evaluate(config)

    ledger = Ledger(config.folder, "")
    assert [(e["method"], e["error"]) for e in ledger.errors()] == [("broken", "DivergedError: the loss became nan")]
    plugged(monkeypatch, "broken", lambda bench, nodes: Result([1.0, 1.0, 1.0], facts={"note": "mended"}))
    lines = runner.evaluate(config).lines()
    assert {line["method"] for line in lines} == {"nodes", "single", "broken"}
    assert ledger.errors() == []


def test_relations_are_measured_once_per_cell(suite_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "RELATE", lambda bench, nodes: {"tasks": bench.names, "known": len(nodes.heads)})
    config = suite_config(seeds=(0,), methods=("relations",))

    ledger = runner.evaluate(config)

    assert json.loads(ledger.relations(Cell(6, 0)).read_text()) == {"tasks": ["books", "films", "intent"], "known": 3}
    assert [line["method"] for line in ledger.lines()] == ["nodes", "relations"]


def test_relations_alone_are_no_error_and_a_failure_is_not_hidden_by_the_report(
    suite_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "RELATE", lambda bench, nodes: {"tasks": bench.names})
    config = suite_config(seeds=(0,), methods=("relations",))
    runner.evaluate_and_report(config)
    assert not (config.folder / "report").exists()

    def breaks(bench: Workbench, nodes: Nodes) -> Result:
        raise DivergedError("the loss became nan")

    plugged(monkeypatch, "broken", breaks)
    with pytest.raises(RunError, match="1 of 2 jobs have no result"):
        runner.evaluate_and_report(suite_config(seeds=(0,), methods=("broken",)))


def test_a_line_cut_within_a_character_is_done_again(suite_config: Make) -> None:
    config = suite_config(seeds=(0,), methods=("single",))
    ledger = runner.evaluate(config)
    file = ledger.cells / "6-0.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + '{"method": "…'.encode()[:-1])

    again = runner.evaluate(suite_config(seeds=(0,)))

    assert {line["method"] for line in again.lines()} == {"nodes", "single", "uniform"}
    assert file.read_bytes().startswith(whole)


def test_two_data_folders_of_one_name_both_count(suite_config: Make, data_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / data_folder.name
    shutil.copytree(data_folder / "books", other / "novels")
    before = identity(suite_config(data=(other, data_folder)))
    (other / "novels" / "test.jsonl").write_text('{"text": "other", "label": "good"}\n')

    assert identity(suite_config(data=(other, data_folder)))["data"] != before["data"]


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_examples_are_refused_at_once(suite_config: Make, count: int) -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        suite_config(examples=(count,))


def test_joint_methods_need_no_nodes(suite_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method("alone", "joint", lambda bench, nodes: Result([float(len(nodes.heads))] * 3))
    monkeypatch.setitem(registry.METHODS, "alone", method)

    ledger = runner.evaluate(suite_config(seeds=(0,), methods=("joint", "alone")))

    alone = [line for line in ledger.lines() if line["method"] == "alone"]
    assert [line["accuracy"] for line in alone] == [[0.0, 0.0, 0.0]]


def test_a_changed_setting_is_refused(suite_config: Make, tmp_path: Path) -> None:
    runner.evaluate(suite_config(seeds=(0,), methods=("single",)))

    with pytest.raises(ConfigError, match="test_examples was 8, now it is 9; give another --out"):
        runner.evaluate(suite_config(test_examples=9))


def test_one_run_at_a_time(suite_config: Make) -> None:
    config = suite_config()
    with (
        Ledger(config.folder, "x").opened(identity(config)),
        pytest.raises(RunError, match="another evaluation is at work"),
    ):
        runner.evaluate(config)


def test_a_dry_run_lists_and_writes_nothing(suite_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = suite_config()

    runner.dry_run(config)

    told = capsys.readouterr().err
    assert "tiny, 6 examples, seed 1: 3 jobs" in told
    assert "6 jobs, 6 to do" in told
    assert not config.folder.exists()


def test_ctrl_c_says_how_to_go_on(suite_config: Make) -> None:
    def interrupted(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(StoppedError, match=r"1 of 6 jobs .*; give the same command again to go on") as stopped:
        runner.evaluate(suite_config(), on_job=interrupted)

    assert stopped.value.signum == 2


def test_a_worker_that_dies_fails_its_job_and_is_replaced(suite_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config, job = suite_config(), Job(Cell(6, 0), "nodes", "setup")
    crew = Crew(Work(config, [job], "x", None), 0)
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    crew._members[ours] = SimpleNamespace(pid=os.getpid(), exitcode=-9, join=lambda: None)  # type: ignore[assignment]
    hired: list[bool] = []
    monkeypatch.setattr(crew, "_hire", lambda: hired.append(True))
    seen: list[Event] = []

    with crew.work.ledger.opened(identity(config)):
        crew.work.ledger.claim(job)
        crew.watch(seen.append, lambda: False)

    assert seen == [("failed", "6-0.nodes", 0.0)]
    assert hired == [True]
    assert "exit code -9" in crew.work.ledger.errors()[0]["error"]
