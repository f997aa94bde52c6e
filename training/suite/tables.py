"""The report's tables in Markdown: methods, families, falsifiers, relations."""

from collections.abc import Sequence
from statistics import mean

from training.suite.intervals import Bounds, Difference, Scores, difference
from training.suite.results import OURS, Group, Line, is_refitted, with_our_head, with_own_heads

JOINT = f"{OURS}-joint"
UNKNOWN = "unknown-ours"
FALSIFIERS = {
    "identity": "no edges: what relations add at all",
    "uniform": "all tasks related alike: whether it matters how strongly",
    "random": "the same graph with its nodes renamed at random: whether it matters which tasks",
    "oracle": "relations are the transfer that the node adapters were measured to have on training texts",
}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def falsifier(method: str) -> str | None:
    """What a variant of ours tests; None for methods of the main table."""
    base, _, which = method.rpartition("-")
    return FALSIFIERS.get(which) if base in (OURS, JOINT) else None


def main_methods(group: Group) -> list[str]:
    """All but falsifiers and those for unknown tasks, best first."""
    return _best_first(group, [m for m in group.methods if falsifier(m) is None and not is_unknown(group, m)])


def is_unknown(group: Group, method: str) -> bool:
    """True for methods that answer for tasks that are new to them."""
    return bool(group.of(method)[0]["regime"] == "unknown")


def _best_first(group: Group, methods: Sequence[str]) -> list[str]:
    return sorted(methods, key=lambda method: -accuracy(group, method))


def accuracy(group: Group, method: str) -> float:
    """Mean over tasks and seeds."""
    return mean(group.scores(method).values())


def methods_table(group: Group) -> str:
    """Every method of a suite with its differences to single and of ours."""
    ours = [name for name in (OURS, JOINT) if name in group.methods]
    head = [
        "rank",
        "method",
        "regime",
        "accuracy",
        "minus single",
        *(f"{name} minus it" for name in ours),
        "s",
        "seeds",
    ]
    rows = [_row(group, place, method, ours) for place, method in enumerate(main_methods(group), 1)]
    return markdown(head, rows)


def _row(group: Group, place: int, method: str, ours: Sequence[str]) -> list[str]:
    lines = group.of(method)
    star = "\\*" if any(map(is_refitted, lines)) else ""
    bold = "**" if method in ours else ""
    seconds = mean(line["seconds"] for line in lines)
    return [
        str(place), f"{bold}{method}{bold}", lines[0]["regime"], f"{accuracy(group, method):.4f}{star}",
        compared(group, method, "single"), *(compared(group, name, method) for name in ours),
        f"{seconds:.1f}", seeds(group, method),
    ]  # fmt: skip


def compared(group: Group, a: str, b: str) -> str:
    """The difference a - b with both intervals; empty if there is nothing to compare."""
    if a == b or not {a, b} <= set(group.methods):
        return ""
    found = difference(group.scores(a), group.scores(b))
    return shown(found) if found else "no common pair"


def shown(found: Difference) -> str:
    """A difference in points of a percent with its intervals; bold if both leave zero out."""
    value = _points(found.mean)
    return f"{f'**{value}**' if found.is_sure else value} {_bounds(found.t)} {_bounds(found.tasks)}".strip()


def _bounds(bounds: Bounds | None) -> str:
    return f"[{_points(bounds[0])}, {_points(bounds[1])}]" if bounds else "[no interval]"


def _points(value: float) -> str:
    return f"{round(100 * value, 2) + 0.0:+.2f}"  # + 0.0: no -0.00


def seeds(group: Group, method: str) -> str:
    """The seeds that are there, and those that other methods have."""
    there = sorted({line["seed"] for line in group.of(method)})
    missing = [str(seed) for seed in group.seeds if seed not in there]
    return ", ".join(map(str, there)) + (f" (missing: {', '.join(missing)})" if missing else "")


def unknown_table(group: Group) -> str:
    """Methods for unknown tasks, and what ours is better by; nothing if none was run."""
    methods = _best_first(group, [method for method in group.methods if is_unknown(group, method)])
    ours = [method for method in methods if method.startswith(UNKNOWN)]
    head = ["method", "accuracy", "with our head", *(f"{name} minus it" for name in ours), "with our head", "seeds"]
    rows = [
        [
            m,
            f"{accuracy(group, m):.4f}",
            _mean_of(group.scores(m, with_our_head)),
            *(compared(group, name, m) for name in ours),
            _less(group.scores(UNKNOWN), group.scores(m, with_our_head)),
            seeds(group, m),
        ]
        for m in methods
    ]
    return markdown(head, rows) if rows else ""


def own_heads_table(group: Group) -> str:
    """Pluggable methods under the heads that the tasks' own adapters came with; nothing without ours or others."""
    ours = group.scores(OURS, with_own_heads) if OURS in group.methods else {}
    found = {m: group.scores(m, with_own_heads) for m in main_methods(group) if m not in (OURS, "head_only")}
    told = [method for method in found if found[method]]
    if not ours or not told:
        return ""
    rows = [
        [method, _mean_of(found[method]), _less(ours, found[method]), compared(group, OURS, method)]
        for method in sorted(told, key=lambda method: -mean(found[method].values()))
    ]
    return markdown(
        ["method", "accuracy", "ours minus it", "as in the table above"], [[OURS, _mean_of(ours), "", ""], *rows]
    )


def _mean_of(scores: Scores) -> str:
    return f"{mean(scores.values()):.4f}" if scores else ""


def _less(a: Scores, b: Scores) -> str:
    """The difference a - b with both intervals; empty if there is nothing to compare."""
    found = difference(a, b)
    return shown(found) if found else ""


def families_table(group: Group) -> str:
    """Mean accuracy per family of tasks; nothing if there is one family."""
    families = sorted(set(group.families.values()))
    if len(families) < 2:
        return ""
    rows = [[method, *(_family(group, method, family) for family in families)] for method in main_methods(group)]
    counts = [f"{family} ({sum(f == family for f in group.families.values())})" for family in families]
    return markdown(["method", *counts], rows)


def _family(group: Group, method: str, family: str) -> str:
    values = [value for (task, _), value in group.scores(method).items() if group.families[task] == family]
    return f"{mean(values):.4f}" if values else ""


def falsifiers_table(group: Group) -> str:
    """Ours beside itself under graphs that should do worse (or, the oracle, better); nothing if none was run."""
    rows = []
    for method in group.methods:
        what, base = falsifier(method), method.rpartition("-")[0]
        if what is not None:
            rows.append(
                [
                    method,
                    what,
                    f"{accuracy(group, method):.4f}",
                    compared(group, base, method),
                    base,
                    seeds(group, method),
                ]
            )
    own = [
        [m, "the graph as measured", f"{accuracy(group, m):.4f}", "", "", seeds(group, m)]
        for m in (OURS, JOINT)
        if m in group.methods
    ]
    head = ["method", "what is changed, and what that tests", "accuracy", "base minus it", "base", "seeds"]
    return markdown(head, own + rows) if rows else ""


SHAPES = {
    "own_weight": "share of the own module",
    "effective_modules": "modules in effect, exp(H)",
    "active_slots": "rank slots per token",
    "overlap": "redundancy, sum g g cos^2",
    "path_flips": "path flips",
    "useful_share": "weight on modules that help",
    "precision_at_5": "precision at 5",
    "gain_agreement": "Spearman of weights and gains",
    "loss_spikes": "loss spikes",
    "norm_variation": "variation of gradient norms",
}


def shapes_table(group: Group) -> str:
    """Metrics of weights and training of the variants of ours that tell them; nothing if none does."""
    told = [m for m in group.methods if any(set(SHAPES) & set(line["facts"]) for line in group.of(m))]
    rows = [[method, *(_shape(group, method, fact) for fact in SHAPES)] for method in told]
    return markdown(["method", *SHAPES.values()], rows) if rows else ""


def _shape(group: Group, method: str, fact: str) -> str:
    values = [line["facts"][fact] for line in group.of(method) if fact in line["facts"]]
    return f"{mean(values):.3g}" if values else ""


def relations_table(group: Group) -> str:
    """How well each view foretells measured transfer, mean over seeds; nothing if it was not measured."""
    found = [relations for relations in group.all_relations if relations.get("spearman")]
    if not found:
        return ""
    views = list(dict.fromkeys(view for relations in found for view in relations["spearman"]))
    rows = [_view(view, found) for view in views]
    return markdown(["view", "Spearman", "over seeds", "s"], rows)


def _view(view: str, found: Sequence[Line]) -> list[str]:
    values = [one["spearman"][view] for one in found if one["spearman"].get(view) is not None]
    cost = [one["seconds"][view] for one in found if view in one.get("seconds", {})]
    told = [f"{mean(values):+.3f}", f"{min(values):+.3f} to {max(values):+.3f}"] if values else ["", ""]
    return [view, *told, f"{mean(cost):.1f}" if cost else ""]
