"""Does any graph within one family beat the same graph on the wrong tasks? Tries on texts that no cell of a suite uses.

Ours where adapters were trained apart, under several graphs, wide (every related task) and narrow (4 of them), each
beside itself with its nodes renamed at random. The node adapters are those of the suite's cells; what is answered are
training texts that are not among the cell's N examples, at most 200 a task. Test texts decide nothing.

Run: python -m tests.bench.graph_tries [--examples 30] [--seeds 1,2]
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from tests.bench.rounds import write
from training.backbone import load
from training.composing.pluggable import USUAL, compose, knobs_of
from training.examples import Split, labelled
from training.memory import keep_freed
from training.relations import Matrix
from training.suite import relating
from training.suite.intervals import difference
from training.suite.methods import Nodes, accuracies, pooled_under
from training.suite.nodes import train_nodes
from training.suite.tables import markdown
from training.suite.workbench import Setting, Texts, Workbench, prepare, texts_of
from training.tasks import Sampling, read_tasks, sample

HELD = 200
NARROW = 4


def graphs(bench: Workbench, nodes: Nodes) -> dict[str, Matrix]:
    """R0 (T, T) by name: as ours has it, single views, sharpened ones, and measured transfer."""
    views = relating.of_nodes(bench, nodes)
    alike, weights = (np.clip(views.matrices[name], 0, 1) for name in ("embedding", "weights"))
    found = {
        "as ours": relating.estimate(views),
        "embedding": alike,
        "embedding ^ 8": alike**8,
        "adapter weights": weights,
        "measured transfer": relating.oracle(views.matrices["transfer"]),
    }
    for matrix in found.values():
        np.fill_diagonal(matrix, 1)
    return found


def held_out(bench: Workbench) -> Workbench:
    """The bench answering training texts that are not among its examples."""
    whole = Sampling(bench.setting.seed, None, dev_fraction=0.0, max_dev=0)
    every = {task.name: task for folder in bench.setting.data for task in read_tasks(folder, whole)}
    return replace(bench, test=[_held(bench, every[task.name].train, t) for t, task in enumerate(bench.tasks)])


def _held(bench: Workbench, every: Split, t: int) -> Texts:
    task = bench.tasks[t]
    used = {example.text for example in labelled(task.train)}
    rest = tuple(example for example in labelled(every) if example.text not in used)
    return texts_of(bench.backbone, bench.tail, bench.setting, task, sample(rest, HELD, "held", task.name))


def tried(bench: Workbench, nodes: Nodes, relations: Matrix, neighbours: int | None) -> list[float]:
    """Accuracy of every task under a graph from which it gets so many modules, None for all."""
    knobs = knobs_of(USUAL).model_copy(update={"neighbours": neighbours})
    found = compose(bench, nodes, relations, knobs=knobs)
    return accuracies(found.heads, pooled_under(bench, nodes, found.weights, bench.test), bench.test)


def lines_of(setting: Setting) -> Iterator[dict[str, Any]]:
    """A line per try of one cell, each with its twin."""
    bench = held_out(prepare(setting, load(setting.backbone, setting.dtype)))
    nodes = train_nodes(bench)
    tries = [(name, R, neighbours) for name, R in graphs(bench, nodes).items() for neighbours in (None, NARROW)]
    label = f"{setting.examples} examples, seed {setting.seed}"
    for name, R, neighbours in track(tries, label, console=Console(stderr=True)):
        twin = relating.renamed(R, setting.seed)
        yield {
            "examples": setting.examples, "seed": setting.seed, "graph": name, "neighbours": neighbours,
            "tasks": bench.names, "accuracy": tried(bench, nodes, R, neighbours),
            "renamed": tried(bench, nodes, twin, neighbours),
        }  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row per number of examples and try, over seeds."""
    named: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        named.setdefault((line["examples"], line["graph"], line["neighbours"] or "all"), []).append(line)
    head = ["examples", "graph", "modules per task", "accuracy", "minus renamed, points", "seeds"]
    rows = [[*map(str, what), *_compared(own), ", ".join(str(x["seed"]) for x in own)] for what, own in named.items()]
    return markdown(head, rows)


def _compared(lines: list[dict[str, Any]]) -> tuple[str, str]:
    """Mean accuracy, and how much more that is than under the renamed graph."""
    found = difference(_scores(lines, "accuracy"), _scores(lines, "renamed"))
    if found is None or found.t is None:
        raise AssertionError("our bug: tries have at least two tasks")
    mean = np.mean(list(_scores(lines, "accuracy").values()))
    return f"{mean:.4f}", f"{100 * found.mean:+.2f} [{100 * found.t[0]:+.2f}, {100 * found.t[1]:+.2f}]"


def _scores(lines: list[dict[str, Any]], which: str) -> Mapping[tuple[str, int], float]:
    return {
        (task, line["seed"]): value for line in lines for task, value in zip(line["tasks"], line[which], strict=True)
    }


def main() -> None:
    """Try, print the table and write results/graph_tries.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/fdu_mtl", help="folder of task folders")
    parser.add_argument("--examples", default="30", help="training examples per task, separated by commas")
    parser.add_argument("--seeds", default="1,2")
    args = parser.parse_args()
    keep_freed()
    lines: list[dict[str, Any]] = []
    for examples in map(int, args.examples.split(",")):
        for seed in map(int, args.seeds.split(",")):
            lines += lines_of(Setting(data=(Path(args.data),), examples=examples, seed=seed))
    write("graph_tries", lines)
    print(table(lines))


if __name__ == "__main__":
    main()
