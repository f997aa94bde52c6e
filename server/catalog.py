"""What the store holds, as one immutable snapshot: a request that was admitted keeps the snapshot it was admitted with.

A new snapshot is built beside the old one and swapped in whole, after the server's own changes at once and after those
of other programs at the next look (settings.poll_s).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from adapters_store.errors import AdapterNotFoundError, InvalidNameError, TaskNotFoundError
from adapters_store.graph import RelationGraph
from adapters_store.manifest import Manifest
from adapters_store.prior import Prior
from adapters_store.references import Reference, parse_reference
from adapters_store.store import AdapterStore

DEFAULT_ALIAS = "prod"  # what a task resolves to, where its adapter has it


@dataclass(frozen=True, eq=False)
class Catalog:
    """Adapters by name and version, their aliases, and the relation graph with its prior."""

    manifests: Mapping[str, Mapping[int, Manifest]] = field(default_factory=dict)
    aliases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    graph_version: int = 0
    graph: RelationGraph | None = None
    prior: Prior | None = None
    adapter_of_task: Mapping[str, str] = field(default_factory=dict)

    def resolve(self, reference: str | Reference) -> Manifest:
        """The version that a reference means now. Raises AdapterNotFoundError or InvalidNameError."""
        parsed = reference if isinstance(reference, Reference) else parse_reference(reference)
        versions = self.manifests.get(parsed.name)
        if not versions:
            raise AdapterNotFoundError(f"no adapter {parsed.name!r}; the store has: {_some(self.manifests)}")
        number = self._number(parsed, versions)
        if number not in versions:
            have = [*map(str, sorted(versions)), *sorted(self.aliases.get(parsed.name, ()))]
            raise AdapterNotFoundError(f"no {parsed}; {parsed.name} has: {_some(have)}")
        return versions[number]

    def _number(self, reference: Reference, versions: Mapping[int, Manifest]) -> int | None:
        if reference.version is not None:
            return reference.version
        if reference.alias is not None:
            return self.aliases.get(reference.name, {}).get(reference.alias)
        if reference.digest is not None:
            return next((n for n in sorted(versions) if versions[n].digest.startswith(reference.digest)), None)
        return max(versions)

    def reference_of_task(self, task: str) -> str:
        """Reference of the adapter that is the task's own module. Raises TaskNotFoundError."""
        node = self.graph.nodes.get(task) if self.graph else None
        if node is not None and node.adapter is not None:
            return node.adapter
        if task not in self.adapter_of_task:
            raise TaskNotFoundError(f"no adapter answers task {task!r}; tasks are: {_some(self.tasks)}")
        name = self.adapter_of_task[task]
        return f"{name}@{DEFAULT_ALIAS}" if DEFAULT_ALIAS in self.aliases.get(name, {}) else name

    def manifest_of_task(self, task: str) -> Manifest:
        """The version that is the task's own module now. Raises TaskNotFoundError or AdapterNotFoundError."""
        return self.resolve(self.reference_of_task(task))

    def has_module(self, task: str) -> bool:
        """True if the task has an adapter that can be composed."""
        try:
            self.manifest_of_task(task)
        except (TaskNotFoundError, AdapterNotFoundError, InvalidNameError):
            return False
        return True

    @property
    def tasks(self) -> list[str]:
        """Tasks that can be asked for."""
        nodes = [task for task in (self.graph.nodes if self.graph else ()) if self.has_module(task)]
        return sorted({*self.adapter_of_task, *nodes})

    def served(self) -> list[Manifest]:
        """The versions that tasks resolve to now, without repeats."""
        found = {m.digest: m for task in self.tasks if self.has_module(task) for m in (self.manifest_of_task(task),)}
        return list(found.values())


def read(store: AdapterStore, previous: Catalog) -> Catalog:
    """The store's present state. Parsed manifests and an unchanged graph are taken over from before."""
    manifests = {name: _versions(store, name, previous.manifests.get(name, {})) for name in store.names()}
    manifests = {name: versions for name, versions in manifests.items() if versions}
    graph_versions = store.graph_versions()
    version, graph, prior = previous.graph_version, previous.graph, previous.prior
    latest = max(graph_versions, default=0)
    if latest != version:
        version, graph = latest, RelationGraph.from_json(store.graph(latest)[1]) if latest else None
        prior = Prior(graph) if graph else None
    aliases = {name: store.aliases(name) for name in manifests}
    return Catalog(manifests, aliases, version, graph, prior, _adapter_of_task(manifests))


def _versions(store: AdapterStore, name: str, known: Mapping[int, Manifest]) -> dict[int, Manifest]:
    return {n: known.get(n) or store.resolve(f"{name}@{n}") for n in store.versions(name)}


def _adapter_of_task(manifests: Mapping[str, Mapping[int, Manifest]]) -> dict[str, str]:
    """Task -> adapter name: the adapter of the task's name if there is one, else the one published last."""
    latest = [versions[max(versions)] for versions in manifests.values()]
    by_age = sorted(latest, key=lambda m: m.created_at)
    chosen = {manifest.task: manifest.name for manifest in by_age}
    return chosen | {manifest.task: manifest.name for manifest in by_age if manifest.name == manifest.task}


def _some(names: Iterable[str], limit: int = 20) -> str:
    listed = sorted(names)
    shown = ", ".join(listed[:limit]) or "nothing"
    return shown if len(listed) <= limit else f"{shown}, … ({len(listed)} in all)"


def differs(new: Catalog, old: Catalog) -> bool:
    """True if a question could have another answer; otherwise the old snapshot and all that is kept for it stay."""
    mine = {name: set(versions) for name, versions in new.manifests.items()}
    theirs = {name: set(versions) for name, versions in old.manifests.items()}
    return mine != theirs or new.aliases != old.aliases or new.graph_version != old.graph_version
