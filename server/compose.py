"""From what a caller asks to adapter versions with weights per layer, resolved once and pinned.

The same question against the same catalog has the same answer, so answers are kept per catalog.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from adapters_store import composition
from adapters_store.composition import Overrides, Weights
from adapters_store.errors import InvalidCompositionError
from adapters_store.graph import Knobs
from adapters_store.manifest import Manifest
from server.catalog import Catalog
from server.errors import NoHeadError, TooManyAdaptersError

Mode = Literal["prior", "single", "explicit", "none"]
Part = tuple[Manifest, npt.NDArray[np.float32]]  # a version and its weights (num_layers,)


@dataclass(frozen=True)
class Ask:
    """One question, hashable. Exactly one of task, mix and adapters; weights are a number or one per layer."""

    mode: Mode = "prior"
    task: str | None = None
    mix: tuple[tuple[str, float], ...] = ()
    adapters: tuple[tuple[str, float | tuple[float, ...]], ...] | None = None
    head: str | None = None
    needs_head: bool = True
    overrides: Overrides = field(default_factory=Overrides)


@dataclass(frozen=True, eq=False)
class Composed:
    """The answer: adapter versions with their weights (num_layers,), and the version whose head answers.

    task: the one that is answered; None for a mixture or explicit weights without a head. own: the version that is the
    task's own module, or whose head answers.
    """

    mode: Mode
    task: str | None
    graph_version: int
    parts: tuple[Part, ...]
    head: Manifest | None
    own: Manifest | None = None

    @cached_property
    def manifests(self) -> tuple[Manifest, ...]:
        """All versions that must be resident: those with weight, then the head's."""
        found = {manifest.digest: manifest for manifest, _ in self.parts}
        if self.head:
            found.setdefault(self.head.digest, self.head)
        return tuple(found.values())

    @cached_property
    def composing(self) -> tuple[Manifest, ...]:
        """The versions with weight: what generating text needs."""
        return tuple(manifest for manifest, _ in self.parts)

    @cached_property
    def brief(self) -> dict[str, Any]:
        """What the answer says of it: versions, digests, mean weights."""
        return self._describe(explain=False)

    @cached_property
    def explained(self) -> dict[str, Any]:
        """The same with the weight of each layer."""
        return self._describe(explain=True)

    def _describe(self, explain: bool) -> dict[str, Any]:
        adapters = []
        for manifest, weights in self.parts:
            described = {
                "name": manifest.name, "version": manifest.version, "digest": manifest.digest,
                "weight": round(float(weights.mean()), 6),
            }  # fmt: skip
            if explain:
                described["weights_by_layer"] = [round(w, 6) for w in weights.tolist()]
            adapters.append(described)
        return {"mode": self.mode, "graph_version": self.graph_version, "adapters": adapters}


class Composer:
    """Answers questions for one backbone."""

    def __init__(self, num_layers: int, max_adapters: int, *, generates: bool = False) -> None:
        """generates: what has no head answers with text; otherwise it cannot answer."""
        self.num_layers = num_layers
        self.max_adapters = max_adapters
        self.generates = generates
        self._catalog: Catalog | None = None
        self._known: dict[Ask, Composed] = {}

    def compose(self, ask: Ask, catalog: Catalog) -> Composed:
        """Raises NotFoundError, InvalidError, NoHeadError or TooManyAdaptersError."""
        if catalog is not self._catalog or len(self._known) > 16384:
            self._catalog, self._known = catalog, {}
        if ask.adapters is not None:
            return self._compose(ask, catalog)  # clients make these up: keeping them would cost more than it saves
        if ask not in self._known:
            self._known[ask] = self._compose(ask, catalog)
        return self._known[ask]

    def _compose(self, ask: Ask, catalog: Catalog) -> Composed:
        mode: Mode = "explicit" if ask.adapters is not None and ask.mode != "none" else ask.mode
        if ask.task:
            catalog.require_task(ask.task)
        head = self._head(ask, catalog)
        parts = _merged(self._versions(ask, mode, catalog))
        if len(parts) > self.max_adapters:
            raise TooManyAdaptersError(
                f"{len(parts)} adapters for one row; at most {self.max_adapters} (--max-adapters)"
            )
        own = head or (catalog.manifest_of_task(ask.task) if ask.task else None)
        return Composed(mode, _task_of(ask, head, catalog), catalog.graph_version, parts, head, own)

    def _versions(self, ask: Ask, mode: Mode, catalog: Catalog) -> list[Part]:
        """Versions with their weights; one version may come twice, by two references."""
        if mode == "none":
            return []
        if mode == "explicit" and ask.adapters is None:
            raise InvalidCompositionError(
                "mode 'explicit' needs 'adapters', for example {'books@3': 0.8, 'music': 0.2}"
            )
        if ask.adapters is not None:
            given = composition.explicit(dict(ask.adapters), self.num_layers)
            return [(catalog.resolve(ref), weights) for ref, weights in given.items()]
        if ask.task is not None:
            weights = self._of_task(ask.task, mode, ask.overrides, catalog)
        else:
            weights = composition.mixture([(w, self._of_task(t, mode, ask.overrides, catalog)) for t, w in ask.mix])
        return [(catalog.manifest_of_task(task), w) for task, w in composition.prune(weights).items()]

    def _of_task(self, task: str, mode: Mode, overrides: Overrides, catalog: Catalog) -> Weights:
        """Weights by module (a task) of one task."""
        catalog.require_task(task)  # an unknown task is an error in every mode
        if mode == "single" or catalog.prior is None or catalog.graph is None or task not in catalog.graph.nodes:
            return composition.single(task, self.num_layers)
        row = {module: w for module, w in catalog.prior.row(task).items() if catalog.has_module(module)}
        attributes = catalog.graph.attributes
        evidence: Mapping[str, list[float]] = attributes.evidence.get(task, {})
        knobs: Knobs = overrides.over(catalog.graph.knobs)
        mass = attributes.mass.get(task, ())
        return composition.from_prior(row or {task: 1.0}, evidence, knobs, self.num_layers, mass, catalog.prior.row)

    def _head(self, ask: Ask, catalog: Catalog) -> Manifest | None:
        if not ask.needs_head:
            return None
        asked = ask.head or ask.task
        if asked is None and self.generates:
            return None
        if asked is None:
            raise NoHeadError('say whose head answers: "head": "books" (a task, or an adapter reference)')
        is_task = asked in catalog.task_set or asked == ask.task
        manifest = catalog.manifest_of_task(asked) if is_task else catalog.resolve(asked)
        if manifest.head is None and self.generates and ask.head is None:
            return None
        if manifest.head is None:
            raise NoHeadError(f'{manifest.reference} has no head, so it cannot classify; name another in "head"')
        return manifest


def _task_of(ask: Ask, head: Manifest | None, catalog: Catalog) -> str | None:
    """The task that is answered: the one whose head answers, by the name it was asked for."""
    if ask.head is None or head is None:
        return ask.task
    return ask.head if ask.head in catalog.task_set else head.task


def _merged(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Versions of equal content as one; those without weight left out, because they add nothing."""
    merged: dict[str, Part] = {}
    for manifest, weights in parts:
        before = merged[manifest.digest][1] if manifest.digest in merged else np.float32(0)
        merged[manifest.digest] = (manifest, before + weights)
    return tuple((manifest, weights) for manifest, weights in merged.values() if weights.any())
