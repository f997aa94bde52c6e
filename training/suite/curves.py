"""Curves of accuracy: over the number of examples, and over a setting that was swept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from training.suite.intervals import Bounds, Scores, mean_interval
from training.suite.plots import DPI, new_figure
from training.suite.results import Line, Size, accuracies, is_ours, order, suite_names, told_size

Point = tuple[float, float, Bounds | None]  # place, mean, interval


def over_examples(curves: Mapping[str, Mapping[Size, Scores]], file: Path, title: str) -> None:
    """Per method a line over the number of examples; bands: 95 % over seeds. Places are even, not to scale."""
    sizes = sorted({size for own in curves.values() for size in own}, key=order)
    figure = new_figure(9, 5.5)
    axes = figure.subplots()
    colours = colormaps["tab20"]
    for n, (method, own) in enumerate(curves.items()):
        points = [
            (sizes.index(size), *mean_interval(scores))
            for size, scores in sorted(own.items(), key=lambda i: order(i[0]))
        ]
        _curve(axes, points, method, colours(n % 20), thick=is_ours(method))
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("training examples per task")
    axes.set_ylabel("mean test accuracy")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=DPI)


def _curve(axes: Axes, points: Sequence[Point], label: str, colour: Any, *, thick: bool) -> None:
    places, means = [p for p, _, _ in points], [m for _, m, _ in points]
    axes.plot(places, means, "o-", color=colour, label=label, linewidth=2.5 if thick else 1, markersize=4)
    known = [(p, *bounds) for p, _, bounds in points if bounds]
    if known:
        at, low, high = np.array(known).T
        axes.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)


def sweeps(lines: Sequence[Line]) -> dict[tuple[str, str], dict[tuple[str, Size], dict[float, Scores]]]:
    """(suite, sweep) -> (method, examples) -> value -> scores, of the lines that have a sweep."""
    found: dict[tuple[str, str], dict[tuple[str, Size], dict[float, dict[tuple[str, int], float]]]] = {}
    names = suite_names(lines)
    for line in lines:
        if "sweep" in line:
            name, value = line["sweep"]["name"], float(line["sweep"]["value"])
            own = found.setdefault((names[line["suite"], line["setting"]], name), {})
            scores = own.setdefault((_stem(line["method"]), line["examples"]), {}).setdefault(value, {})
            scores |= {(t, line["seed"]): v for t, v in zip(line["tasks"], accuracies(line), strict=True)}
    return found  # type: ignore[return-value]  # read only from here on


def _stem(method: str) -> str:
    """The method that is swept: each value is a method of its own, ours-c0.5 or ours@c=0.5."""
    return method.partition("@")[0] if "@" in method else method.partition("-")[0]


def over_sweep(curves: Mapping[tuple[str, Size], Mapping[float, Scores]], name: str, file: Path, title: str) -> None:
    """Accuracy over the values of a setting, a line for each number of examples."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    colours = colormaps["tab10"]
    methods = {method for method, _ in curves}
    for n, ((method, size), values) in enumerate(sorted(curves.items(), key=lambda i: (i[0][0], order(i[0][1])))):
        points = [(value, *mean_interval(scores)) for value, scores in sorted(values.items())]
        label = told_size(size) if len(methods) == 1 else f"{method}, {told_size(size)}"
        _curve(axes, points, label, colours(n % 10), thick=False)
    axes.set_xlabel(name)
    axes.set_ylabel("mean test accuracy")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=DPI)
