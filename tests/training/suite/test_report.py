"""report: tables and pictures of invented results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.errors import DataError
from training.suite import curves, plots, tables
from training.suite.ledger import append, write_json
from training.suite.report import report
from training.suite.results import Group, accuracies, groups, is_refitted, read
from training.suite.settings import ReportConfig

TASKS = ["books", "films", "intent", "alarms"]
FAMILIES = ["reviews", "reviews", "commands", "commands"]


def line(method: str, seed: int, gain: float, size: int | str = 30, **more: Any) -> dict[str, Any]:
    accuracy = [round(0.7 + gain + 0.02 * t + 0.003 * seed * t, 4) for t in range(4)]
    usual = {
        "suite": "toy", "examples": size, "seed": seed, "method": method, "regime": "pluggable", "tasks": TASKS,
        "families": FAMILIES, "accuracy": accuracy, "seconds": 2.0, "peak_mb": 100, "facts": {}, "commit": "abc",
        "setting": "s1",
    }  # fmt: skip
    return usual | more


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(*lines: dict[str, Any], folder: str = "results") -> Path:
        for one in lines:
            file = tmp_path / folder / "cells" / f"{one['examples']}-{one['seed']}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            append(file, one)
        return tmp_path / folder

    return make


def all_lines() -> list[dict[str, Any]]:
    weights = np.random.default_rng(0).normal(size=(4, 4, 2)).round(3).tolist()
    gains = {"single": 0.0, "ours": 0.05, "ours-random": 0.01, "ours-identity": 0.0, "averaged": 0.02}
    found = [line(m, s, g, size) for m, g in gains.items() for s in (0, 1) for size in (30, "all")]
    found += [line("ours-joint", 0, 0.07, regime="joint", weights=weights), line("nodes", 0, 0, regime="setup")]
    return found + [
        line(f"ours@c={c}", 0, c / 10, size, sweep={"name": "c", "value": c})
        for c in (0.2, 0.5)
        for size in (30, "all")
    ]


def one_group(*lines: dict[str, Any]) -> Group:
    return groups(list(lines), [])[0]


def test_the_report_has_tables_pictures_and_lines(write: Write, tmp_path: Path) -> None:
    folder = write(*all_lines())
    matrix = [[1, 0.5, 0, 0], [0.5, 1, -0.2, 0], [0, -0.2, 1, 0.9], [0, 0, 0.9, 1]]
    write_json(folder / "cells" / "30-0" / "relations.json", {
        "tasks": TASKS, "relations": matrix, "views": {"embedding": matrix}, "transfer": matrix,
        "seconds": {"embedding": 1.5}, "spearman": {"embedding": 0.61},
    })  # fmt: skip
    append(folder / "errors.jsonl", {"method": "broken", "examples": 30, "seed": 1, "error": "DivergedError: a | b"})

    (tmp_path / "notes.md").write_text("## In short\n\nRead with care.\n")

    file = report(ReportConfig(results=(folder,), out=tmp_path / "report", notes=tmp_path / "notes.md"))

    text = file.read_text()
    assert "| 1 | **ours-joint** | joint |" in text
    assert "0 (missing: 1)" in text
    assert text.index("What was run") < text.index("Read with care.") < text.index("## How to read this")
    assert "ours-random | the same graph with its nodes renamed" in text
    assert "| embedding | +0.610 | +0.610 to +0.610 | 1.5 |" in text
    assert "commands (2) | reviews (2)" in text
    assert "DivergedError: a \\| b" in text
    pictures = sorted(path.name for path in (tmp_path / "report").glob("*.png"))
    assert pictures == [
        "accuracy-toy.png", "graph-toy-30.png", "relations-toy-30.png", "sweep-toy-c.png",
        "weights-toy-30-ours-joint.png",
    ]  # fmt: skip
    assert all(f"]({name})" in text for name in pictures)
    assert all((tmp_path / "report" / name).stat().st_size < 300_000 for name in pictures)
    joined = [json.loads(row) for row in (tmp_path / "report" / "results.jsonl").read_text().splitlines()]
    assert len(joined) == len(all_lines()) - 1
    assert [row["examples"] for row in joined] == sorted((r["examples"] for r in joined), key=lambda n: n == "all")


def test_differences_are_in_points_over_common_pairs() -> None:
    group = one_group(line("single", 0, 0.0), line("single", 1, 0.0), line("ours", 1, 0.05))

    assert tables.compared(group, "ours", "single") == "**+5.00** [+5.00, +5.00] [+5.00, +5.00]"
    assert tables.compared(group, "ours", "ours") == ""
    assert tables.seeds(group, "ours") == "1 (missing: 0)"


def test_baselines_count_by_the_better_of_two_and_ours_do_not() -> None:
    facts = {"accuracy_refitted": [0.9, 0.9, 0.9, 0.9]}
    better, worse = line("averaged", 0, 0.0, facts=facts), line("averaged", 0, 0.5, facts=facts)

    assert accuracies(better) == facts["accuracy_refitted"]
    assert not is_refitted(worse)
    assert not is_refitted(line("ours", 0, 0.0, facts=facts))
    assert "0.9000\\*" in tables.methods_table(one_group(better))


def test_compositions_are_compared_under_the_heads_that_adapters_came_with() -> None:
    facts = {"accuracy_own_heads": [0.5, 0.6, 0.5, 0.6], "accuracy_refitted": [1.0] * 4}
    group = one_group(
        line("ours", 0, 0.2, facts=facts), line("averaged", 0, 0.0, facts=facts, accuracy=[0.4, 0.5, 0.4, 0.5]),
        line("shared", 0, 0.3, regime="joint"), line("head_only", 0, 0.0),
    )  # fmt: skip

    table = tables.own_heads_table(group).splitlines()

    assert [row.split(" | ")[:2] for row in table[2:]] == [["| ours", "0.5500"], ["| averaged", "0.4500"]]
    assert "**+10.00** [+10.00, +10.00]" in table[3]
    assert tables.own_heads_table(one_group(line("ours", 0, 0.2), line("averaged", 0, 0.0))) == ""


def test_unknown_tasks_are_compared_under_our_head_too() -> None:
    facts = {"accuracy_with_our_head": [0.7, 0.7, 0.7, 0.7]}
    group = one_group(
        line("unknown-ours", 0, 0.0, regime="unknown", accuracy=[0.8] * 4),
        line("unknown-bare", 0, 0.0, regime="unknown", accuracy=[0.5] * 4, facts=facts),
    )

    [row] = [row for row in tables.unknown_table(group).splitlines() if "unknown-bare" in row]

    assert "| 0.5000 | 0.7000 | **+30.00**" in row
    assert "**+10.00**" in row


def test_falsifiers_of_both_regimes_are_told_from_methods() -> None:
    assert tables.falsifier("ours-random") == tables.falsifier("ours-joint-random")
    assert tables.falsifier("ours") is None
    assert tables.falsifier("ours-joint") is None
    assert tables.falsifier("uniform") is None


def test_of_two_folders_the_later_line_counts_and_settings_are_kept_apart(write: Write) -> None:
    one = write(line("single", 0, 0.0), folder="one")
    two = write(line("single", 0, 0.1), line("single", 0, 0.2, setting="s2"), folder="two")

    lines = read([one, two])

    assert [row["accuracy"][0] for row in lines] == [0.8, 0.9]
    assert [group.suite for group in groups(lines, [one, two])] == ["toy (setting s1)", "toy (setting s2)"]


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a folder that espalier-train evaluate wrote"):
        report(ReportConfig(results=(tmp_path,), out=tmp_path / "report"))


def test_notes_that_are_not_there_are_refused_before_anything_is_written(write: Write, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"notes\.md of --notes could not be read"):
        report(ReportConfig(results=(write(*all_lines()),), out=tmp_path / "report", notes=tmp_path / "notes.md"))
    assert not (tmp_path / "report").exists()


def test_of_many_tasks_the_most_mixed_is_shown(tmp_path: Path) -> None:
    values = np.eye(60)[:, :, None].repeat(3, axis=2)
    values[7, 8] = 0.5

    assert plots.most_mixed(values) == 7
    plots.weights([f"task{t}" for t in range(60)], values, tmp_path / "w.png", "many")
    relations = np.random.default_rng(0).normal(size=(60, 60)) / 3
    plots.graph([f"task{t}" for t in range(60)], relations, ["f"] * 60, tmp_path / "g.png", "many")
    plots.heat_maps([f"task{t}" for t in range(60)], (relations + relations.T) / 9, relations, tmp_path / "r.png", "m")
    assert all((tmp_path / name).stat().st_size < 300_000 for name in ("w.png", "g.png", "r.png"))


def test_sweeps_are_sorted_by_value_and_size() -> None:
    found = curves.sweeps(all_lines())

    assert list(found) == [("toy", "c")]
    own = found["toy", "c"]
    assert set(own) == {("ours", 30), ("ours", "all")}
    assert list(own["ours", 30]) == [0.2, 0.5]


def test_a_drawn_graph_keeps_each_tasks_strongest_edges() -> None:
    both = np.array([[1.0, 0.9, 0.8, 0.0], [0.9, 1.0, 0.7, 0.0], [0.8, 0.7, 1.0, -0.1], [0.0, 0.0, -0.1, 1.0]])
    assert plots.strongest_edges(both, each=1) == [(1, 0, 0.9), (2, 0, 0.8), (3, 2, -0.1)]
