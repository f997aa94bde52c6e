"""The learning curve of a run: training loss by step, dev scores by epoch, a line per task and the mean."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Series = dict[str, list[tuple[float, float]]]  # task -> (x, y) points


def draw(metrics: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write the PNG of a run's metrics."""
    generating = [line for line in metrics if "dev_token_accuracy" in line]
    panels = [("step", "training loss", _series(metrics, "step", "loss"))]
    if generating:
        panels.append(("epoch", "dev loss per token", _series(generating, "epoch", "dev_loss")))
    if classifying := _series(metrics, "epoch", "dev_accuracy"):
        panels.append(("epoch", "dev accuracy", classifying))
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (x, y, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, series, x, y)
    figure.savefig(file, dpi=110)


def _series(metrics: Sequence[Mapping[str, Any]], x: str, y: str) -> Series:
    series: Series = defaultdict(list)
    for line in metrics:
        if y in line:
            series[line["task"]].append((line[x], line[y]))
    return series


def _panel(axes: Axes, series: Series, x: str, y: str) -> None:
    for task, points in series.items():
        axes.plot(*zip(*points, strict=True), linewidth=0.8, alpha=0.6, label=task)
    mean: dict[float, list[float]] = defaultdict(list)
    for points in series.values():
        for at, value in points:
            mean[at].append(value)
    axes.plot(
        list(mean), [sum(values) / len(values) for values in mean.values()], color="black", linewidth=2, label="mean"
    )
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if len(series) <= 20:
        axes.legend(fontsize=6, ncols=2)
