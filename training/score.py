"""score: published adapters on test splits, composed in the ways that the server composes.

none: the bare backbone (under the task's head, if it classifies); single: the task's own adapter; prior: as the
relation graph says. A task that classifies gets accuracy and loss; one that generates gets loss and accuracy per token
of the test completions, each token read behind the right ones (teacher forced).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from adapters_store import composition
from adapters_store.adapter import Adapter
from adapters_store.composition import Weights
from adapters_store.errors import AdapterNotFoundError, BackboneMismatchError
from adapters_store.graph import RelationGraph
from adapters_store.manifest import Manifest
from adapters_store.mixing import Mix
from adapters_store.prior import Prior
from adapters_store.store import AdapterStore
from training import objectives, step
from training.backbone import LoadedBackbone, load
from training.config import Mode, ScoreConfig
from training.errors import DataError
from training.objectives import Asked, Objective, Texts
from training.progress import bar, console, result
from training.tasks import Task, first, read_tasks


@dataclass(frozen=True)
class Outcome:
    """One task in one mode. scores: by their names, the one to look at first; width: adapters that have any weight."""

    task: str
    mode: Mode
    scores: dict[str, float]
    headline: str
    examples: int
    adapter: str
    graph_version: int | None
    width: int

    def line(self) -> dict[str, Any]:
        """The outcome as a line of results."""
        facts = asdict(self)
        del facts["headline"], facts["scores"]
        return {"task": facts.pop("task"), "mode": facts.pop("mode")} | self.scores | facts


@dataclass(frozen=True, eq=False)
class Resident:
    """A task ready to be evaluated: its manifest, adapter, slot, objective and test texts."""

    task: Task
    manifest: Manifest
    adapter: Adapter
    slot: int
    objective: Objective
    texts: Texts


@dataclass(frozen=True, eq=False)
class Lattice:
    """A version of the relation graph and its prior."""

    version: int
    graph: RelationGraph
    prior: Prior


def score(config: ScoreConfig) -> list[Outcome]:
    """Scores per task and mode; written as JSON lines and shown as a table."""
    if config.threads:
        torch.set_num_threads(config.threads)
    store = AdapterStore(config.store)
    tasks = _tasks(config, store)
    generates = any(task.generates for task in tasks)
    backbone = load(config.backbone, config.dtype, config.device, generates=generates)
    residents = [_resident(store, backbone, task, slot, config) for slot, task in enumerate(tasks)]
    lattice = _lattice(store, config)
    slots = {resident.task.name: resident.slot for resident in residents if resident.adapter.entries}
    if lattice:
        slots |= _others(store, backbone, lattice, residents, config)
    outcomes = []
    with bar(len(config.modes) * sum(len(r.texts) for r in residents), "evaluating") as shown:
        for mode in config.modes:
            for resident in residents:
                mix, width = _mix(mode, resident, slots, lattice, backbone.encoder.num_layers)
                outcomes.append(_outcome(backbone, resident, mode, lattice, (mix, width), config.token_budget))
                first_score = outcomes[-1].scores[outcomes[-1].headline]
                shown.advance(len(resident.texts), f"{mode} {resident.task.name} {first_score:.3f}")
    _report(outcomes, config)
    return outcomes


def _tasks(config: ScoreConfig, store: AdapterStore) -> list[Task]:
    known = set(store.names())
    tasks = [first(task, config.examples) for task in read_tasks(config.data, names=config.tasks)]
    missing = [task.name for task in tasks if task.name not in known]
    if config.tasks and missing:
        raise AdapterNotFoundError(
            f"{config.store} has no adapter {missing[0]!r}; it has: {', '.join(sorted(known)) or 'none'}"
        )
    chosen = [task for task in tasks if task.name in known]
    if not chosen:
        raise DataError(
            f"no task of {config.data} has an adapter in {config.store}; espalier-train publish puts them there"
        )
    untested = [task.name for task in chosen if not task.test]
    if untested:
        raise DataError(f"{config.data / untested[0]}: expected a test.jsonl to score on")
    return chosen


def _resident(store: AdapterStore, backbone: LoadedBackbone, task: Task, slot: int, config: ScoreConfig) -> Resident:
    manifest, adapter = _put(store, backbone, _reference(store, task.name, config), slot)
    objective = objectives.trained(task, adapter, backbone)
    return Resident(task, manifest, adapter, slot, objective, objective.texts(task.test))


def _reference(store: AdapterStore, name: str, config: ScoreConfig) -> str:
    has_alias = config.alias is not None and config.alias in store.aliases(name)
    return f"{name}@{config.alias}" if has_alias else name


def _put(store: AdapterStore, backbone: LoadedBackbone, reference: str, slot: int) -> tuple[Manifest, Adapter]:
    """Load an adapter and make it resident. Raises BackboneMismatchError and the store's errors."""
    manifest = store.resolve(reference)
    if not manifest.backbone.is_same(backbone.fingerprint):
        raise BackboneMismatchError(
            f"{manifest.reference} was trained on another backbone than {backbone.folder}; give its --backbone"
        )
    adapter = store.load(manifest)
    if adapter.entries:
        backbone.encoder.sites.check(adapter.entries)
        backbone.encoder.sites.put(slot, adapter.entries)
    return manifest, adapter


def _lattice(store: AdapterStore, config: ScoreConfig) -> Lattice | None:
    if "prior" not in config.modes:
        return None
    version, document = store.graph(config.graph)
    graph = RelationGraph.from_json(document)
    return Lattice(version, graph, Prior(graph))


def _others(
    store: AdapterStore, backbone: LoadedBackbone, lattice: Lattice, residents: Sequence[Resident], config: ScoreConfig
) -> dict[str, int]:
    """Make resident what the graph composes the tasks with beside themselves (modules, tasks not asked for); slots."""
    scored = [resident.task.name for resident in residents]
    met = {name for task in scored for name in _weights("prior", task, lattice, backbone.encoder.num_layers)}
    found = {}
    for slot, name in enumerate(sorted(met - set(scored)), len(scored)):
        reference = lattice.graph.node(name).adapter or _reference(store, name, config)
        if _put(store, backbone, reference, slot)[1].entries:
            found[name] = slot
    return found


def _mix(
    mode: Mode, resident: Resident, slots: Mapping[str, int], lattice: Lattice | None, num_layers: int
) -> tuple[Mix | None, int]:
    """The composition of a task in a mode, and how many adapters it has."""
    weights = _weights(mode, resident.task.name, lattice, num_layers)
    return to_mix(weights, slots), len(weights)


def _weights(mode: Mode, task: str, lattice: Lattice | None, num_layers: int) -> Weights:
    if mode == "none":
        return {}
    if mode == "single":
        return composition.single(task, num_layers)
    if lattice is None:
        raise AssertionError("our bug: prior without a graph")
    lattice.graph.node(task)
    attributes = lattice.graph.attributes
    evidence, mass = attributes.evidence.get(task, {}), attributes.mass.get(task, ())
    return composition.from_prior(
        lattice.prior.row(task), evidence, lattice.graph.knobs, num_layers, mass, lattice.prior.row
    )


def to_mix(weights: Weights, slots: Mapping[str, int]) -> Mix | None:
    """Weights by task as a mix of slots; tasks without a slot (heads only) add nothing."""
    kept = {task: values for task, values in weights.items() if task in slots}
    if not kept:
        return None
    return Mix(tuple(slots[task] for task in kept), torch.stack([torch.from_numpy(v) for v in kept.values()]).numpy())


def _outcome(
    backbone: LoadedBackbone,
    resident: Resident,
    mode: Mode,
    lattice: Lattice | None,
    composed: tuple[Mix | None, int],
    token_budget: int,
) -> Outcome:
    mix, width = composed
    asked = Asked(resident.objective, resident.texts, mix)
    [answers] = step.ask(backbone.encoder, [asked], token_budget)
    scores = resident.objective.metrics(step.score_of(asked, answers))
    used = lattice.version if lattice and mode == "prior" else None
    return Outcome(
        resident.task.name, mode, scores, resident.objective.headline, len(resident.texts),
        resident.manifest.reference, used, width,
    )  # fmt: skip


def _report(outcomes: Sequence[Outcome], config: ScoreConfig) -> None:
    lines = [json.dumps(outcome.line()) for outcome in outcomes]
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text("\n".join(lines) + "\n")
    result("\n".join(lines))
    for headline in dict.fromkeys(outcome.headline for outcome in outcomes):
        console.print(_table([outcome for outcome in outcomes if outcome.headline == headline], config))


def _table(outcomes: Sequence[Outcome], config: ScoreConfig) -> Table:
    """The first metric of tasks with one objective."""
    what = {"accuracy": "test accuracy", "loss": "test loss per token"}[outcomes[0].headline]
    table = Table("task", *config.modes, title=f"{what}, {config.store}")
    by_task: dict[str, list[float]] = {}
    for outcome in outcomes:
        by_task.setdefault(outcome.task, []).append(outcome.scores[outcome.headline])
    for task, scores in by_task.items():
        table.add_row(task, *(f"{value:.3f}" for value in scores))
    means = [sum(scores) / len(by_task) for scores in zip(*by_task.values(), strict=True)]
    table.add_row("mean", *(f"{score:.3f}" for score in means), style="bold")
    return table
