"""Pictures of relations and weights: estimates beside what was measured, the graph, weights per layer."""

from collections.abc import Sequence
from pathlib import Path

import networkx as nx
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training.relations import Matrix
from training.relations.heatmap import cluster

DPI = 110
MOST_PANELS = 16  # tasks with a panel of their own; of more, one is shown
MOST_EDGES = 90  # of a drawn graph
EDGES_EACH = 3  # of a drawn graph, at least, per task: the strongest
MOST_NAMED = 40  # tasks whose names are written beside a matrix


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that no window knows."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def heat_maps(tasks: Sequence[str], relations: Matrix, transfer: Matrix, file: Path, title: str) -> None:
    """Relations (K, K) beside measured transfer (K, K), in one order of tasks; the diagonals are left out."""
    side = min(9.0, max(3.5, 0.28 * len(tasks) + 1.5))
    figure = new_figure(2 * side + 1, side + 0.5)
    left, right = figure.subplots(1, 2)
    order = cluster(relations)
    _matrix(left, relations, order, tasks, "relations")
    _matrix(right, transfer, order, tasks, "measured transfer (nats)")
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=DPI)


def _matrix(axes: Axes, values: Matrix, order: Sequence[int], tasks: Sequence[str], title: str) -> None:
    shown = np.array(values, dtype=np.float64)[np.ix_(order, order)]
    np.fill_diagonal(shown, np.nan)
    most = float(np.nanmax(np.abs(shown))) if len(order) > 1 else 0.0
    image = axes.imshow(shown, cmap="RdBu_r", vmin=-(most or 1), vmax=most or 1)
    if len(order) <= MOST_NAMED:
        names = [tasks[k] for k in order]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_xlabel("adapter of task", fontsize=8)
    axes.set_ylabel("helps task", fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.figure.colorbar(image, ax=axes, shrink=0.7)


def graph(tasks: Sequence[str], relations: Matrix, families: Sequence[str], file: Path, title: str) -> None:
    """The relation graph: each task's strongest edges and the strongest negative ones; related tasks lie close.

    Width and darkness of an edge by |weight|, dashed if negative, colours by family.
    """
    both = (relations + relations.T) / 2
    edges = sorted(strongest_edges(both), key=lambda edge: -abs(edge[2]))[:MOST_EDGES]
    places = _places(both)
    figure = new_figure(7, 6)
    axes = figure.subplots()
    largest = max((abs(value) for _, _, value in edges), default=1.0)
    for i, j, value in edges:
        share = abs(value) / largest
        ends = np.array([places[i], places[j]])
        style, colour = ("-", "tab:red") if value > 0 else ("--", "tab:blue")
        axes.plot(
            ends[:, 0], ends[:, 1], style, color=colour, linewidth=0.3 + 3 * share, alpha=0.2 + 0.6 * share, zorder=1
        )
    _nodes(axes, tasks, families, np.array([places[k] for k in range(len(tasks))]))
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    figure.savefig(file, dpi=DPI)


def strongest_edges(both: Matrix, each: int = EDGES_EACH) -> list[tuple[int, int, float]]:
    """(i, j, weight) with i > j: of each node the `each` largest |weights|, without repeats and zeros."""
    off = np.where(np.eye(len(both), dtype=bool), 0, both)
    chosen = {(max(i, int(j)), min(i, int(j))) for i, row in enumerate(off) for j in np.argsort(-np.abs(row))[:each]}
    return [(i, j, float(off[i, j])) for i, j in sorted(chosen) if off[i, j]]


def _places(both: Matrix) -> dict[int, Matrix]:
    """Positions whose distances are those of the relations as well as a plane allows: 1 - R, from 0.25 to 1."""
    size = len(both)
    scaled = np.clip(both, 0, None) / max(float(np.abs(both - np.diag(both.diagonal())).max()), 1e-9)
    apart = 1 - 0.75 * np.clip(scaled, 0, 1)
    distances = {i: {j: float(apart[i, j]) for j in range(size) if i != j} for i in range(size)}
    found: dict[int, Matrix] = nx.kamada_kawai_layout(nx.complete_graph(size), dist=distances)
    return found


def _nodes(axes: Axes, tasks: Sequence[str], families: Sequence[str], places: Matrix) -> None:
    colours = colormaps["tab20"]
    for n, family in enumerate(dict.fromkeys(families)):
        own = [k for k in range(len(tasks)) if families[k] == family]
        axes.scatter(places[own, 0], places[own, 1], s=90, color=colours(n % 20), label=family, zorder=2)
    for k, task in enumerate(tasks):
        axes.annotate(task, places[k], fontsize=6, ha="center", va="bottom", xytext=(0, 6), textcoords="offset points")
    axes.legend(fontsize=7, loc="best")


def weights(tasks: Sequence[str], values: Matrix, file: Path, title: str) -> None:
    """Weights (T, K, num_layers): a panel per task, or, of many tasks, the one that takes most from others' modules."""
    few = len(tasks) <= MOST_PANELS
    chosen = list(range(len(tasks))) if few else [most_mixed(values)]
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    tall = min(8.0, 0.12 * values.shape[1] + 1.2)
    figure = new_figure(max(6.0, 3.2 * columns + 1), max(2.5, tall * rows))
    panels = np.atleast_1d(np.array(figure.subplots(rows, columns))).ravel()
    most = float(np.abs(values).max()) or 1.0
    for axes in panels[len(chosen) :]:
        axes.set_axis_off()
    for axes, t in zip(panels, chosen, strict=False):
        image = axes.imshow(values[t], cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        axes.set_title(tasks[t], fontsize=8)
        _modules(axes, tasks, values.shape[1])
    figure.colorbar(image, ax=list(panels), shrink=0.6, label="weight")
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=DPI)


def _modules(axes: Axes, tasks: Sequence[str], count: int) -> None:
    axes.set_xlabel("layer", fontsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=6)
    if count == len(tasks) and count <= 2 * MOST_NAMED:
        axes.set_yticks(range(count), tasks, fontsize=5)
    else:
        axes.set_ylabel("module", fontsize=7)


def most_mixed(values: Matrix) -> int:
    """The task whose weights lie most outside its strongest module."""
    mass = np.abs(values).sum(axis=2)
    return int((mass.sum(axis=1) - mass.max(axis=1)).argmax())
