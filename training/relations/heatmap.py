"""The relation matrix as a picture: related tasks side by side, helpful red, harmful blue."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from training.relations import Matrix


def draw(tasks: Sequence[str], relations: Matrix, file: Path, title: str = "") -> None:
    """Write the PNG. relations: (K, K), rows are the tasks that are helped, columns the adapters that help."""
    order = cluster(relations)
    size = len(tasks)
    side = max(4.0, 0.45 * size + 2)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = axes.imshow(relations[np.ix_(order, order)], cmap="RdBu_r", vmin=-1, vmax=1)
    names = [tasks[k] for k in order]
    axes.set_xticks(range(size), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(size), names, fontsize=8)
    axes.set_xlabel("adapter of task")
    axes.set_ylabel("helps task")
    axes.set_title(title, fontsize=9)
    if size <= 20:
        for r, i in enumerate(order):
            for c, j in enumerate(order):
                value = relations[i, j]
                axes.text(
                    c,
                    r,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if abs(value) > 0.6 else "black",
                )
    figure.colorbar(shown, ax=axes, shrink=0.8)
    figure.savefig(file, dpi=110)


def cluster(relations: Matrix) -> list[int]:
    """Order of the tasks in which related ones stand together: leaves of average linkage on 1 - (R + R^T) / 2."""
    if len(relations) < 3:
        return list(range(len(relations)))
    distance = np.clip(1 - (relations + relations.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    order: list[int] = leaves_list(
        linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    ).tolist()
    return order
