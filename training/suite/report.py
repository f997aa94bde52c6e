"""report: results of evaluations as one file of lines, tables with words for a newcomer, and pictures."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from training.errors import DataError
from training.progress import say
from training.relations import Matrix
from training.suite import curves, plots, tables
from training.suite.intervals import Scores
from training.suite.ledger import read_lines
from training.suite.results import OURS, Group, Line, Size, groups, read
from training.suite.settings import ReportConfig

_HOW = """## How to read this

- **accuracy**: share of test texts answered rightly, mean over all tasks and seeds (0 to 1). The same test texts for
  every method and seed; a seed decides which training examples are taken and where training begins.
- **minus single**, **ours minus it**: differences in points of a percent, over the same (task, seed) pairs. `single`
  is each task with its own adapter alone. Two 95 % intervals follow. The first is a t-interval that takes all pairs
  as independent, which seeds of one task are not: it is often too narrow. The second draws the tasks anew, each with
  all its seeds (bootstrap, 2000 draws): it says what another choice of tasks would give; with a handful of tasks it is
  too narrow. A difference is **bold** if both leave zero out. Where many methods are compared, one in twenty such
  intervals misses by chance.
- **regime**: pluggable methods compose adapters that were trained apart; joint ones train their own together; unknown
  ones answer for a task that is new to them. Compare like with like.
- **\\***: a baseline counted with its heads fitted anew on the training examples, because that is the better of its
  two results on the test texts. This favours baselines; ours never has the choice.
- **heads**: ours ties heads along the graph where tasks name their answers alike and refits them; a baseline's heads
  are the tasks' own, as its authors have it. The table on heads takes that difference out, and `shared_tied` (joint) is
  one adapter for all tasks with one head per label name.
- **scalars** of baselines (masses, lambdas, members of a soup) are chosen on the N training examples, because N is all
  there is; each task's own adapter remembers them, so they lean to it. Ours chooses no scalar on examples.
- **how ours came about**: its defaults (mass, views, tied heads, no evidence after the fact) were chosen with test
  accuracies of some cells of FDU-MTL and CLINC150 in view. On these two suites read ours as slightly optimistic.
- **s**: seconds of a method's job, mean over seeds; training of the node adapters is not in it where methods share
  them.
- **seeds**: those there are; what is missing is named. Means over different seeds are not quite comparable,
  differences are: they use common pairs only.
"""


def report(config: ReportConfig) -> Path:
    """Write results.jsonl, report.md and pictures into the folder; the file of the report. Raises DataError."""
    lines, notes = read(config.results), _notes(config)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "results.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    found = groups(lines, config.results)
    parts = ["# Ways to compose adapters, compared", _about(lines, found), notes, _HOW]
    parts += [part for group in found for part in _section(group, config.out)]
    parts += list(_curves(lines, found, config.out))
    parts += _failed(config.results)
    file = config.out / "report.md"
    file.write_text("\n\n".join(part.strip() for part in parts if part) + "\n")
    say(f"report: {file}")
    return file


def _about(lines: Sequence[Line], found: Sequence[Group]) -> str:
    """What was run, on what."""
    commits = sorted({line["commit"] or "unknown" for line in lines})
    rows = [
        [
            g.suite,
            str(g.size),
            str(len(g.families)),
            str(len(g.methods)),
            ", ".join(map(str, g.seeds)),
            g.lines[0]["setting"],
        ]
        for g in found
    ]
    head = ["suite", "training examples per task", "tasks", "methods", "seeds", "setting"]
    return f"What was run (commit {', '.join(commits)}; {len(lines)} results):\n\n{tables.markdown(head, rows)}"


def _notes(config: ReportConfig) -> str:
    """Raises DataError."""
    if config.notes is None:
        return ""
    try:
        return config.notes.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{config.notes} of --notes could not be read: {error}") from error


def _section(group: Group, out: Path) -> Iterator[str]:
    """Tables and pictures of one suite and number of examples."""
    yield f"## {group.title}"
    yield tables.methods_table(group)
    if families := tables.families_table(group):
        yield f"Mean accuracy per family (number of its tasks):\n\n{families}"
    if heads := tables.own_heads_table(group):
        yield (
            "What do heads add? Pluggable methods under the heads that came with the tasks' own adapters, for ours and "
            f"baselines alike: compositions alone are compared.\n\n{heads}"
        )
    if falsifiers := tables.falsifiers_table(group):
        yield f"Does the graph matter? Ours under other graphs:\n\n{falsifiers}"
    if unknown := tables.unknown_table(group):
        yield (
            "Unknown tasks: each task left out once and answered by the others' adapters, its head trained on 20 "
            f"labelled examples:\n\n{unknown}"
        )
    if shapes := tables.shapes_table(group):
        yield f"What the weights of ours are like, mean over tasks, layers that have adapters and seeds:\n\n{shapes}"
    if relations := tables.relations_table(group):
        yield (
            "Relations: rank correlation (Spearman, -1 to 1) of each view with measured transfer, over pairs of "
            f"different tasks, mean over seeds:\n\n{relations}"
        )
    yield from _relations(group, out)
    yield from _weights(group, out)


def _relations(group: Group, out: Path) -> Iterator[str]:
    found = group.relations
    if not found or "relations" not in found:
        return
    tasks, matrix = found["tasks"], _array(found["relations"])
    families = [group.families.get(task, "") for task in tasks]
    if "transfer" in found:
        file = f"relations-{group.slug}.png"
        plots.heat_maps(tasks, matrix, _array(found["transfer"]), out / file, group.title)
        yield f"![estimated relations beside measured transfer]({file})"
    file = f"graph-{group.slug}.png"
    plots.graph(tasks, matrix, families, out / file, group.title)
    yield f"![relation graph, its strongest edges; dashed are negative, colours are families]({file})"


def _weights(group: Group, out: Path) -> Iterator[str]:
    """Of ours, or of the first method that has any."""
    having = [line for line in group.lines if line.get("weights")]
    wanted = [name for name in (OURS, tables.JOINT) if any(line["method"] == name for line in having)]
    for method in wanted or [line["method"] for line in having[:1]]:
        line = next(line for line in having if line["method"] == method)
        file = f"weights-{group.slug}-{method}.png"
        plots.weights(
            line["tasks"],
            _array(line["weights"]),
            out / file,
            f"{group.title}: weights of {method}, seed {line['seed']}",
        )
        yield f"![weights of {method} per layer]({file})"


def _curves(lines: Sequence[Line], found: Sequence[Group], out: Path) -> Iterator[str]:
    for suite in dict.fromkeys(group.suite for group in found):
        own = [group for group in found if group.suite == suite]
        if len(own) > 1:
            file = f"accuracy-{own[0].slug.rpartition('-')[0]}.png"
            curves.over_examples(_by_method(own), out / file, f"{suite}: accuracy and training examples")
            yield f"## {suite}: over training examples\n\n![accuracy over examples; bands: 95 % over seeds]({file})"
    for (suite, name), swept in curves.sweeps(lines).items():
        file = f"sweep-{suite}-{name}.png".replace(" ", "-").replace("/", "-")
        curves.over_sweep(swept, name, out / file, f"{suite}: {name}")
        yield f"## {suite}: how much {name} matters\n\n![accuracy over {name}]({file})"


def _by_method(own: Sequence[Group]) -> Mapping[str, Mapping[Size, Scores]]:
    names = dict.fromkeys(name for group in own for name in tables.main_methods(group))
    return {name: {g.size: g.scores(name) for g in own if name in g.methods} for name in names}


def _failed(folders: Sequence[Path]) -> list[str]:
    """What has no result because it failed."""
    errors = [error for folder in folders for error in read_lines(folder / "errors.jsonl")]
    rows = [
        [e["method"], str(e["examples"]), str(e["seed"]), e["error"].replace("|", "\\|").replace("\n", " ")]
        for e in errors
    ]
    return [f"## What failed\n\n{tables.markdown(['method', 'examples', 'seed', 'error'], rows)}"] if rows else []


def _array(values: object) -> Matrix:
    return np.array(values, dtype=np.float64)
