"""What stands on the device, who holds it, and why something could not come there: the nouns of residency.py."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from adapters_store.manifest import GoldenExample, Manifest
from adapters_store.mixing import Mix
from adapters_store.primitives.head import Head


class Identity(NamedTuple):
    """What makes two versions one: the content that answers, and the examples that it must give to be let answer."""

    digest: str
    golden: tuple[GoldenExample, ...]

    @classmethod
    def of(cls, manifest: Manifest) -> "Identity":
        """Of a version."""
        return cls(manifest.digest, manifest.golden)

    def __hash__(self) -> int:
        """Looked up for every request, so without the examples' many numbers: equal digests are rare enough."""
        return hash(self.digest)


@dataclass(eq=False)
class Resident:
    """One adapter version on the device. slot None: it has no sites, only a head."""

    manifest: Manifest
    slot: int | None
    ready: "asyncio.Future[None]"
    head: Head | None = None
    holders: int = 0
    retired: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_idle(self) -> bool:
        """True if it may be evicted."""
        return self.holders == 0 and self.ready.done()

    @property
    def identity(self) -> Identity:
        """Of its version."""
        return Identity.of(self.manifest)


class Failure(NamedTuple):
    """Why a version could not be made resident. Not the error itself: its frames hold the adapter's tensors."""

    manifest: Manifest
    kind: type[Exception]
    message: str
    code: str


@dataclass(frozen=True, eq=False)
class Lease:
    """Versions that stay on the device until released."""

    residents: dict[str, Resident]

    def slot(self, manifest: Manifest) -> int | None:
        """Slot of a leased version."""
        return self.residents[manifest.digest].slot

    def mix(self, parts: Sequence[tuple[Manifest, npt.NDArray[np.float32]]]) -> Mix | None:
        """Leased versions with their weights (num_layers,) as slots and weights; None if none of them has a site."""
        pairs = [(slot, weights) for manifest, weights in parts if (slot := self.slot(manifest)) is not None]
        if not pairs:
            return None
        return Mix(tuple(slot for slot, _ in pairs), np.stack([weights for _, weights in pairs]))

    def head(self, manifest: Manifest | None) -> Head | None:
        """Head of a leased version."""
        return self.residents[manifest.digest].head if manifest else None
