"""What the store holds, as one immutable snapshot: a request that was admitted keeps the snapshot it was admitted with.

A new snapshot is built beside the old one and swapped in whole, after the server's own changes at once and after those
of other programs at the next look (settings.poll_s).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from adapters_store.errors import (
    AdapterNotFoundError,
    CorruptError,
    EspalierError,
    InvalidGraphError,
    InvalidNameError,
    NotFoundError,
    TaskNotFoundError,
)
from adapters_store.graph import RelationGraph
from adapters_store.manifest import Manifest
from adapters_store.prior import Prior
from adapters_store.references import Reference, parse_reference
from adapters_store.store import AdapterStore

Found = TypeVar("Found")
Other = TypeVar("Other")
MAX_EVIDENCE = 1e6  # a softmax of more is no choice any more, and its quotient with a small temperature is infinite
DEFAULT_ALIAS = "prod"  # what a task resolves to, where its adapter has it
UNREADABLE = 0  # where an alias points that cannot be read; versions count from 1


@dataclass(frozen=True, eq=False)
class Catalog:
    """Adapters by name and version, their aliases, and the relation graph with its prior.

    broken: what the store holds but nobody can read or serve, by reference, and why. An alias in it is where the
    snapshot before had it, or in no snapshot yet and then resolves to nothing: never to the latest version.
    graph_seen: the store's latest graph, which is graph_version unless that one is broken.
    """

    manifests: Mapping[str, Mapping[int, Manifest]] = field(default_factory=dict)
    aliases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    graph_version: int = 0
    graph: RelationGraph | None = None
    prior: Prior | None = None
    adapter_of_task: Mapping[str, str] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    graph_seen: int = 0

    def resolve(self, reference: str | Reference) -> Manifest:
        """The version that a reference means now. Raises AdapterNotFoundError or InvalidNameError."""
        parsed = reference if isinstance(reference, Reference) else parse_reference(reference)
        versions = self.manifests.get(parsed.name)
        if not versions:
            raise AdapterNotFoundError(f"no adapter {parsed.name!r}; the store has: {_some(self.manifests)}")
        number = self._number(parsed, versions)
        if number not in versions:
            have = [*map(str, sorted(versions)), *sorted(self.aliases.get(parsed.name, ()))]
            readable = " that can be read" if str(parsed) in self.broken else ""
            raise AdapterNotFoundError(f"no {parsed}{readable}; {parsed.name} has: {_some(have)}")
        return versions[number]

    def _number(self, reference: Reference, versions: Mapping[int, Manifest]) -> int:
        """Number of the version meant; 0 if there is none."""
        if reference.version is not None:
            return reference.version
        if reference.alias is not None:
            return self.aliases.get(reference.name, {}).get(reference.alias, 0)
        if reference.digest is not None:
            return _newest_of_digest(reference.digest, versions)
        return max(versions)

    def reference_of_task(self, task: str) -> str:
        """Reference of the adapter that is the task's own module. Raises TaskNotFoundError."""
        found = self._reference(task)
        if found is None:
            raise TaskNotFoundError(f"no adapter answers task {task!r}; tasks are: {_some(self.task_set)}")
        return found

    def _reference(self, task: str) -> str | None:
        node = self.graph.nodes.get(task) if self.graph else None
        if node is not None and node.adapter is not None:
            return node.adapter
        name = self.adapter_of_task.get(task)
        return f"{name}@{DEFAULT_ALIAS}" if name and _is_promoted(name, self.aliases, self.broken) else name

    def manifest_of_task(self, task: str) -> Manifest:
        """The version that is the task's own module now. Raises TaskNotFoundError or AdapterNotFoundError."""
        return self.resolve(self.reference_of_task(task))

    def require_task(self, task: str) -> None:
        """Refuse what no task is: an unknown name, or a module that tasks share, unless it has a head of its own.

        Raises TaskNotFoundError or AdapterNotFoundError.
        """
        manifest = self.manifest_of_task(task)
        if task in self._shared and manifest.head is None:
            raise TaskNotFoundError(
                f"{task!r} is a module that tasks share, not a task; tasks are: {_some(self.task_set)}"
            )

    def has_module(self, task: str) -> bool:
        """True if the node has an adapter that can be composed: a task's, or a module's that tasks share."""
        return task in self.task_set or (task in self._shared and self._is_answered(task))

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks that can be asked for."""
        return sorted(self.task_set)

    @cached_property
    def task_set(self) -> frozenset[str]:
        """The same, to look one up."""
        asked = {*self.adapter_of_task, *(self.graph.nodes if self.graph else ())} - self._shared
        return frozenset(task for task in asked if self._is_answered(task))

    @cached_property
    def _shared(self) -> frozenset[str]:
        """Nodes that are modules and no tasks."""
        nodes = self.graph.nodes if self.graph else {}
        return frozenset(name for name, node in nodes.items() if node.role == "module")

    def _is_answered(self, task: str) -> bool:
        reference = self._reference(task)
        if reference is None:
            return False
        try:
            self.resolve(reference)
        except (AdapterNotFoundError, InvalidNameError):
            return False
        return True

    def served(self) -> list[Manifest]:
        """The versions that tasks, and modules that they share, resolve to now, without repeats."""
        shared = sorted(module for module in self._shared if self._is_answered(module))
        found = [self.manifest_of_task(name) for name in (*self.tasks, *shared)]
        return list({manifest.digest: manifest for manifest in found}.values())


def read(store: AdapterStore, previous: Catalog, num_layers: int) -> Catalog:
    """The store's present state. Parsed manifests and an unchanged graph are taken over from before.

    What cannot be read is left out and noted in `broken`; a graph that cannot be served leaves the one before.
    """
    broken: dict[str, str] = {}
    found = {name: _adapter(store, name, previous, broken) for name in store.names()}
    manifests = {name: versions for name, (versions, _) in found.items() if versions}
    aliases = {name: found[name][1] for name in manifests}
    seen = max(store.graph_versions(), default=0)
    version, graph, prior = previous.graph_version, previous.graph, previous.prior
    if seen != previous.graph_seen:
        try:
            graph = RelationGraph.from_json(store.graph(seen)[1]) if seen else None
            check_graph(graph, num_layers)
            version, prior = seen, Prior(graph) if graph else None
        except EspalierError as error:
            graph = previous.graph
            broken[f"graph@{seen}"] = f"{error.code}: {error}"
    broken |= {key: why for key, why in previous.broken.items() if key == f"graph@{seen}" and version != seen}
    chosen = _adapter_of_task(manifests, aliases, broken)
    return Catalog(manifests, aliases, version, graph, prior, chosen, broken, seen)


def check_graph(graph: RelationGraph | None, num_layers: int) -> None:
    """Refuse a graph whose evidence or mass does not fit the backbone. Raises InvalidGraphError."""
    for task, masses in graph.attributes.mass.items() if graph else ():
        if len(masses) != num_layers:
            raise InvalidGraphError(f"mass for {task} has {len(masses)} layers, the backbone has {num_layers}")
    for task, row in graph.attributes.evidence.items() if graph else ():
        for module, values in row.items():
            if len(values) != num_layers:
                raise InvalidGraphError(
                    f"evidence for {task} -> {module} has {len(values)} layers, the backbone has {num_layers}"
                )
            if max(map(abs, values)) > MAX_EVIDENCE:
                raise InvalidGraphError(f"evidence for {task} -> {module} exceeds {MAX_EVIDENCE:g}")


def _adapter(
    store: AdapterStore, name: str, previous: Catalog, broken: dict[str, str]
) -> tuple[dict[int, Manifest], dict[str, int]]:
    """Versions and aliases of a name as they were at one moment: every alias points at a version that is there.

    Aliases are read first, so what they point at is published by then; a deletion in between means another look.
    """
    known, before = previous.manifests.get(name, {}), previous.aliases.get(name, {})
    for _ in range(3):
        aliases = _aliases(store, name, broken)
        versions = {n: known.get(n) or _manifest(store, f"{name}@{n}", broken) for n in store.versions(name)}
        readable = {n: manifest for n, manifest in versions.items() if manifest}
        if set(aliases.values()) <= {UNREADABLE, *readable}:
            break
    for alias in [alias for alias, n in aliases.items() if n not in readable]:
        broken.setdefault(f"{name}@{alias}", f"corrupt: {name}@{aliases[alias]}, where it points, cannot be read")
        aliases[alias] = before.get(alias, UNREADABLE)
    return readable, {alias: n for alias, n in aliases.items() if n in readable}


def _aliases(store: AdapterStore, name: str, broken: dict[str, str]) -> dict[str, int]:
    """Where each alias of a name points. One that cannot be read is noted, and keeps nobody from reading the others."""
    found = {alias: _alias(store, name, alias, broken) for alias in store.alias_names(name)}
    return {alias: number for alias, number in found.items() if number is not None}


def _alias(store: AdapterStore, name: str, alias: str, broken: dict[str, str]) -> int | None:
    return _noted(broken, f"{name}@{alias}", UNREADABLE, lambda: store.alias(name, alias))


def _is_promoted(name: str, aliases: Mapping[str, Mapping[str, int]], broken: Mapping[str, str]) -> bool:
    """True if the name has DEFAULT_ALIAS, be it one that nobody can read."""
    return DEFAULT_ALIAS in aliases.get(name, {}) or f"{name}@{DEFAULT_ALIAS}" in broken


def _manifest(store: AdapterStore, reference: str, broken: dict[str, str]) -> Manifest | None:
    return _noted(broken, reference, None, lambda: store.resolve(reference))


def _noted(broken: dict[str, str], what: str, otherwise: Other, read: Callable[[], Found]) -> Found | Other:
    """What read gives; what is corrupt or misnamed is noted instead, and what is deleted meanwhile is not there."""
    try:
        return read()
    except NotFoundError:
        return otherwise
    except (CorruptError, InvalidNameError) as error:
        broken[what] = f"{error.code}: {error}"
        return otherwise


def _newest_of_digest(digest: str, versions: Mapping[int, Manifest]) -> int:
    """The newest version with a digest that begins so, if all those are one content; else 0."""
    found = {n: m.digest for n, m in versions.items() if m.digest.startswith(digest)}
    return max(found) if len(set(found.values())) == 1 else 0


def _adapter_of_task(
    manifests: Mapping[str, Mapping[int, Manifest]],
    aliases: Mapping[str, Mapping[str, int]],
    broken: Mapping[str, str],
) -> dict[str, str]:
    """Task -> adapter name. Of several, one with DEFAULT_ALIAS; of those the one of the task's name, else the newest.

    Task and age of a name are those of the version that it serves, so what is uploaded and not promoted takes no task
    from what is.
    """
    served = [versions[aliases[name].get(DEFAULT_ALIAS, max(versions))] for name, versions in manifests.items()]
    ranked = sorted(served, key=lambda m: (_is_promoted(m.name, aliases, broken), m.name == m.task, m.created_at))
    return {manifest.task: manifest.name for manifest in ranked}


def _some(names: Iterable[str], limit: int = 20) -> str:
    listed = sorted(names)
    shown = ", ".join(listed[:limit]) or "nothing"
    return shown if len(listed) <= limit else f"{shown}, … ({len(listed)} in all)"


def differs(new: Catalog, old: Catalog) -> bool:
    """True if a question could have another answer; otherwise the old snapshot and all that is kept for it stay."""
    mine = {name: set(versions) for name, versions in new.manifests.items()}
    theirs = {name: set(versions) for name, versions in old.manifests.items()}
    others = (new.aliases, new.graph_version, new.graph_seen, new.broken)
    return mine != theirs or others != (old.aliases, old.graph_version, old.graph_seen, old.broken)
