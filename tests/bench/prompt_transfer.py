"""Relations against transfer that others measured: 17 tasks, soft prompts for t5-base (Su et al., NAACL 2022).

For each target the transfer from every other task's prompt is predicted, and compared by Spearman's rank correlation.
Leave one target out: neither the target's row nor its column of measured transfer is seen, by weights, knobs or prior.
  alone     one view of the prompts, which needs no measurement at all
  fused     ranks of all views, weighted by least squares on the other tasks' measured transfer
  diffused  pi_u S: the fused row's strongest tasks, then the prior of the graph of the other tasks' measured transfer
`helpfulness` is the mean measured rank of a source over the other targets: no property of prompts, told apart. Knobs of
the diffusion are the project's defaults, or chosen by the same procedure among the other tasks alone (nested). Which
views and which grid of knobs there are was settled with all targets in sight.
Run: python -m tests.bench.prompt_transfer [--data ../shared/data/relations_prompt_transfer]
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adapters_store.graph import RelationGraph
from adapters_store.prior import Prior
from tests.bench.prompt_views import prompts_of, read, views_of
from tests.bench.rounds import write
from training.relations import Matrix
from training.relations.fitted import simplex
from training.relations.fuse import strongest
from training.relations.unknown import Vector, diffuse, nearest, prior_matrix

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "relations_prompt_transfer"
OTHER_BACKBONES = ("t5-small", "roberta-base", "roberta-large")
Knobs = tuple[float, int | None, int | None]  # c, neighbours of the new row, neighbours in the graph
DEFAULTS: Knobs = (0.3, 4, 4)
GRID: list[Knobs] = list(itertools.product((0.1, 0.3, 0.6), (4, None), (4, None)))
Known = tuple[int, ...]
DRAWS = 20  # of shuffled graphs


@dataclass(eq=False)
class Study:
    """Views and measured transfer of K tasks, and what was computed of them for sets of known tasks."""

    views: Mapping[str, Matrix]
    measured: Matrix
    helps: bool
    _rows: dict[tuple[int, Known], Vector] = field(default_factory=dict)
    _priors: dict[tuple[Known, float, int | None], Matrix] = field(default_factory=dict)

    def fused(self, target: int, known: Known) -> Vector:
        """(known,) The target's row, weighted as fits the known tasks best."""
        if (target, known) not in self._rows:
            ranked = self._ranked(target, known)
            wanted = by_row(self.measured, known)
            pairs = [(i, j) for i in known for j in known if i != j]
            rows, columns = np.array(pairs).T
            shares = simplex(np.stack([view[rows, columns] for view in ranked], axis=1), wanted[rows, columns])
            row = sum(share * view[target] for share, view in zip(shares, ranked, strict=True))
            self._rows[target, known] = row[list(known)]
        return self._rows[target, known]

    def _ranked(self, target: int, known: Known) -> list[Matrix]:
        """Of each view the rows of the known tasks and the target, as ranks among known sources."""
        ranked = [by_row(view, known, target) for view in self.views.values()]
        return [*ranked, by_row(helpfulness(self.measured, known), known, target)] if self.helps else ranked

    def diffused(self, target: int, known: Known, knobs: Knobs, order: Sequence[int] | None = None) -> Vector:
        """(known,) The fused row's strongest tasks, diffused over the known tasks' graph.

        order: places that the known tasks take in the graph in place of their own, for a graph that means nothing.
        """
        c, neighbours, in_graph = knobs
        row, prior = nearest(self.fused(target, known), neighbours or len(known)), self._prior(known, c, in_graph)
        return diffuse(row, prior if order is None else prior[np.ix_(order, order)])

    def _prior(self, known: Known, c: float, neighbours: int | None) -> Matrix:
        if (known, c, neighbours) not in self._priors:
            among = by_row(self.measured, known)[np.ix_(known, known)]
            np.fill_diagonal(among, 1)
            kept = strongest(among, neighbours)
            edges = {(f"t{i}", f"t{j}"): float(kept[i, j]) for i, j in np.argwhere(kept > 0).tolist() if i != j}
            nodes = {f"t{k}": None for k in range(len(known))}
            graph = RelationGraph.of(nodes, edges, knobs={"c": c, "epsilon": 0})
            self._priors[known, c, neighbours] = prior_matrix(Prior(graph))
        return self._priors[known, c, neighbours]

    def chosen(self, known: Known) -> Knobs:
        """The knobs that predict the known tasks best, each from the others."""
        return max(GRID, key=lambda knobs: self._inner(known, knobs))

    def _inner(self, known: Known, knobs: Knobs) -> float:
        scores = []
        for target in known:
            others = tuple(k for k in known if k != target)
            scores.append(spearman(self.diffused(target, others, knobs), self.measured[target, list(others)]))
        return float(np.mean(scores))


def by_row(values: Matrix, known: Sequence[int], target: int | None = None) -> Matrix:
    """(K, K) each row's values of known sources as ranks in [0, 1], without the row's own task; elsewhere NaN."""
    ranked, rows = np.full_like(values, np.nan), [*known, *([] if target is None else [target])]
    among = np.where(np.eye(len(values), dtype=bool), np.nan, values)[
        np.ix_(rows, known)
    ]  # NaN is above and below none
    below = (among[:, :, None] > among[:, None, :]).sum(axis=2)
    ties = np.clip((among[:, :, None] == among[:, None, :]).sum(axis=2) - 1, 0, None)  # others of the same value
    sources = (~np.isnan(among)).sum(axis=1, keepdims=True)
    ranked[np.ix_(rows, known)] = np.where(np.isnan(among), np.nan, (below + ties / 2) / (sources - 1))
    return ranked


def helpfulness(measured: Matrix, known: Sequence[int]) -> Matrix:
    """(K, K) of each known source the mean rank of its transfer over known targets other than the row's and itself."""
    ranked = np.nan_to_num(by_row(measured, known))  # 0 outside
    there = np.zeros_like(measured)
    there[np.ix_(known, known)] = 1 - np.eye(len(known))
    counts = there.sum(axis=0) - there  # without row i, sources as columns
    found: Matrix = np.divide(ranked.sum(axis=0) - ranked, counts, out=np.full_like(measured, np.nan), where=counts > 0)
    return found.round(12)  # equal means are to stay ties


def spearman(a: Vector, b: Vector) -> float:
    """Rank correlation; 0 where one is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Vector) -> Vector:
    """(n,) Mean ranks by comparing all pairs: for a few values much faster than sorting them in scipy."""
    return (values[:, None] > values[None]).sum(axis=1) + (values[:, None] == values[None]).sum(axis=1) / 2


def others(target: int, size: int) -> Known:
    """All tasks but the target."""
    return tuple(k for k in range(size) if k != target)


def line(name: str, rows: Sequence[Vector], measured: Matrix, **facts: Any) -> dict[str, Any]:
    """Mean over targets, each target's own, and all pairs at once against transfer relative to the target's own prompt.

    rows: per target the predicted values of the others, in their order.
    """
    size = len(measured)
    true = [measured[t, list(others(t, size))] for t in range(size)]
    each = [spearman(row, one) for row, one in zip(rows, true, strict=True)]
    relative = np.concatenate([one / measured[t, t] for t, one in enumerate(true)])
    pooled = spearman(np.concatenate(list(rows)), relative)
    return {"prediction": name, "spearman": round(float(np.mean(each)), 4), "pooled": round(pooled, 4), **facts,
            "by_target": [round(value, 3) for value in each]}  # fmt: skip


def alone(name: str, view: Matrix, measured: Matrix, **facts: Any) -> dict[str, Any]:
    """A view by itself, its raw values."""
    size = len(measured)
    return line(name, [view[t, list(others(t, size))] for t in range(size)], measured, **facts)


def predicted(study: Study, name: str) -> list[dict[str, Any]]:
    """Fused, then diffused: over a graph whose tasks changed places, with default knobs, with nested knobs."""
    size = len(study.measured)
    sets = [others(t, size) for t in range(size)]
    knobs = [study.chosen(known) for known in track(sets, description=name, console=Console(stderr=True))]
    fused = [study.fused(t, known) for t, known in enumerate(sets)]
    default = [study.diffused(t, known, DEFAULTS) for t, known in enumerate(sets)]
    nested = [study.diffused(t, known, knobs[t]) for t, known in enumerate(sets)]
    return [
        line(name, fused, study.measured),
        shuffled(study, f"{name}, diffused, shuffled graphs", knobs),
        line(f"{name}, diffused, default knobs", default, study.measured, knobs=DEFAULTS),
        line(f"{name}, diffused, nested knobs", nested, study.measured, knobs=knobs),
    ]


def shuffled(study: Study, name: str, knobs: Sequence[Knobs]) -> dict[str, Any]:
    """What diffusion gives if the graph's tasks change places: means over draws."""
    size, generator, draws = len(study.measured), np.random.default_rng(0), []
    for _ in range(DRAWS):
        orders = [generator.permutation(size - 1) for _ in range(size)]
        rows = [study.diffused(t, others(t, size), knobs[t], orders[t]) for t in range(size)]
        draws.append(line(name, rows, study.measured))
    means = {key: round(float(np.mean([one[key] for one in draws])), 4) for key in ("spearman", "pooled")}
    each = np.mean([one["by_target"] for one in draws], axis=0)
    return {"prediction": name} | means | {"draws": DRAWS, "by_target": each.round(3).tolist()}


def run(folder: Path) -> list[dict[str, Any]]:
    """All lines of the results file, the headline last."""
    prompts = prompts_of(folder)
    tasks, measured = list(prompts), read(folder, "t5-base", list(prompts))
    views = views_of(list(prompts.values()))
    lines = [alone(name, view, measured, kind="prompts alone") for name, view in views.items()]
    known = [others(t, len(tasks)) for t in range(len(tasks))]
    helps = np.stack([helpfulness(measured, known[t])[t] for t in range(len(tasks))])
    lines.append(alone("helpfulness of sources", helps, measured, kind="measured on other targets"))
    for backbone in OTHER_BACKBONES:
        other = read(folder, backbone, tasks)
        if not np.isnan(other).any():
            lines.append(alone(f"transfer on {backbone}", other, measured, kind="extra: measured, target included"))
    for name, helping in (("fused with helpfulness", True), ("fused", False)):
        lines += [one | {"kind": "leave one target out"} for one in predicted(Study(views, measured, helping), name)]
    baseline = next(one for one in lines if one["prediction"] == "flat cosine, centred")
    return [{"tasks": tasks}, *lines[:-1], lines[-1] | against(lines[-1], baseline)]


def against(ours: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """Mean difference over targets with a bootstrap interval of 95 % over targets, and on how many it is positive."""
    difference = np.array(ours["by_target"]) - np.array(baseline["by_target"])
    draws = np.random.default_rng(0).choice(difference, size=(10_000, len(difference))).mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975)).tolist()
    return {"over": baseline["prediction"], "difference": round(float(difference.mean()), 4),
            "interval": [round(low, 4), round(high, 4)], "better_on": int((difference > 0).sum())}  # fmt: skip


def show(lines: Sequence[Mapping[str, Any]]) -> Table:
    """The table that people read."""
    table = Table("prediction", "what it knows", "mean Spearman per target", "all pairs at once")
    for one in lines[1:]:
        table.add_row(one["prediction"], one["kind"], f"{one['spearman']:.3f}", f"{one['pooled']:.3f}")
    return table


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    lines = run(parser.parse_args().data)
    Console().print(show(lines))
    print(write("prompt_transfer", lines))


if __name__ == "__main__":
    main()
