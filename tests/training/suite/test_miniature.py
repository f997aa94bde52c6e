"""The whole of a suite in small: every method, sweep and view on three tiny tasks, and the report of it."""

from pathlib import Path

from training.suite import runner
from training.suite.registry import METHODS
from training.suite.settings import EvaluateConfig


def test_every_method_runs_and_is_reported(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(
        data=(data_folder,), name="tiny", seeds=(0,), examples=(6,), out=tmp_path / "out", test_examples=6,
        first_layer=1, backbone=str(bert_folder), dtype="float32",
        methods=("pluggable", "joint", "unknown", "sweep", "relations"),
    )  # fmt: skip
    runner.evaluate_and_report(config)

    ledger = runner.evaluate(config)
    assert ledger.errors() == []
    lines = {line["method"]: line for line in ledger.lines()}
    assert set(lines) == {*METHODS, "nodes", "relations"}
    for name in METHODS:
        assert len(lines[name]["accuracy"]) == 3
        assert all(0 <= accuracy <= 1 for accuracy in lines[name]["accuracy"])
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "ours-joint" in report
    assert "lookahead" in report
