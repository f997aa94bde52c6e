"""score: published adapters on test splits, composed in the ways that the server composes.

none: the bare backbone (under the task's head, if it classifies); single: the task's own adapter; prior: as the
relation graph says, with the versions that it names, and single where it does not know the task. A task that classifies
gets accuracy and loss; one that generates gets loss and accuracy per token of the test completions, each token read
behind the right ones (teacher forced).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
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
class Lattice:
    """A version of the relation graph and its prior."""

    version: int
    graph: RelationGraph
    prior: Prior

    def reference(self, name: str) -> str | None:
        """The exact version that the graph names for a node; None if it names none."""
        node = self.graph.nodes.get(name)
        return node.adapter if node else None


@dataclass(frozen=True, eq=False)
class Resident:
    """A version that was loaded. slot: where its deltas lie; None if it has a head only."""

    manifest: Manifest
    adapter: Adapter
    slot: int | None


@dataclass(frozen=True, eq=False)
class Scored:
    """A task ready to be evaluated under one version's head."""

    task: Task
    resident: Resident
    objective: Objective
    texts: Texts


class Versions:
    """What each mode answers with, every version loaded once."""

    def __init__(
        self, store: AdapterStore, backbone: LoadedBackbone, alias: str | None, lattice: Lattice | None
    ) -> None:
        self.backbone, self.lattice = backbone, lattice
        self._store, self._alias = store, alias
        self._residents: dict[str, Resident] = {}

    def of(self, name: str, mode: Mode) -> Resident:
        """In mode prior the version that the graph names, else the alias', else the latest.

        Raises BackboneMismatchError and the store's errors.
        """
        named = self.lattice.reference(name) if mode == "prior" and self.lattice else None
        has_alias = self._alias is not None and self._alias in self._store.aliases(name)
        manifest = self._store.resolve(named or (f"{name}@{self._alias}" if has_alias else name))
        if manifest.digest not in self._residents:
            self._residents[manifest.digest] = self._loaded(manifest)
        return self._residents[manifest.digest]

    def _loaded(self, manifest: Manifest) -> Resident:
        if not manifest.backbone.is_same(self.backbone.fingerprint):
            raise BackboneMismatchError(
                f"{manifest.reference} was trained on another backbone than {self.backbone.folder}; give its --backbone"
            )
        adapter = self._store.load(manifest)
        if not adapter.entries:
            return Resident(manifest, adapter, None)
        slot = len(self._residents)
        self.backbone.encoder.sites.check(adapter.entries)
        self.backbone.encoder.sites.put(slot, adapter.entries)
        return Resident(manifest, adapter, slot)


def score(config: ScoreConfig) -> list[Outcome]:
    """Scores per task and mode; written as JSON lines and shown as a table."""
    if config.threads:
        torch.set_num_threads(config.threads)
    store = AdapterStore(config.store)
    tasks = _tasks(config, store)
    generates = any(task.generates for task in tasks)
    backbone = load(config.backbone, config.dtype, config.device, generates=generates)
    versions = Versions(store, backbone, config.alias, _lattice(store, config))
    scored = [(mode, one) for mode in config.modes for one in _scored(versions, tasks, mode)]
    outcomes = []
    with bar(sum(len(one.texts) for _, one in scored), "evaluating") as shown:
        for mode, one in scored:
            outcomes.append(_outcome(versions, one, mode, config.token_budget))
            first_score = outcomes[-1].scores[outcomes[-1].headline]
            shown.advance(len(one.texts), f"{mode} {one.task.name} {first_score:.3f}")
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


def _scored(versions: Versions, tasks: Sequence[Task], mode: Mode) -> list[Scored]:
    """The tasks under the heads of the versions that answer in this mode."""
    found = []
    for task in tasks:
        resident = versions.of(task.name, mode)
        objective = objectives.trained(task, resident.adapter, versions.backbone)
        found.append(Scored(task, resident, objective, objective.texts(task.test)))
    return found


def _lattice(store: AdapterStore, config: ScoreConfig) -> Lattice | None:
    if "prior" not in config.modes:
        return None
    version, document = store.graph(config.graph)
    graph = RelationGraph.from_json(document)
    return Lattice(version, graph, Prior(graph))


def _weights(mode: Mode, task: str, lattice: Lattice | None, num_layers: int) -> Weights:
    """The composition of a task in a mode, by name."""
    if mode == "none":
        return {}
    if mode == "single" or lattice is None or task not in lattice.graph.nodes:
        return composition.single(task, num_layers)
    attributes = lattice.graph.attributes
    evidence, mass = attributes.evidence.get(task, {}), attributes.mass.get(task, ())
    return composition.from_prior(
        lattice.prior.row(task), evidence, lattice.graph.knobs, num_layers, mass, lattice.prior.row
    )


def _mix(versions: Versions, weights: Weights, mode: Mode) -> Mix | None:
    """Weights by name as a mix of slots; what has a head only adds nothing."""
    slots = {name: versions.of(name, mode).slot for name in weights}
    kept = {slot: weights[name] for name, slot in slots.items() if slot is not None}
    return Mix(tuple(kept), np.stack(list(kept.values()))) if kept else None


def _outcome(versions: Versions, one: Scored, mode: Mode, token_budget: int) -> Outcome:
    lattice, encoder = versions.lattice, versions.backbone.encoder
    weights = _weights(mode, one.task.name, lattice, encoder.num_layers)
    asked = Asked(one.objective, one.texts, _mix(versions, weights, mode))
    [answers] = step.ask(encoder, [asked], token_budget)
    scores = one.objective.metrics(step.score_of(asked, answers))
    used = lattice.version if lattice and mode == "prior" and one.task.name in lattice.graph.nodes else None
    return Outcome(
        one.task.name, mode, scores, one.objective.headline, len(one.texts), one.resident.manifest.reference, used,
        len(weights),
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
