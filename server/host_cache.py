"""Adapters in RAM, behind those on the device."""

from collections import OrderedDict

from adapters_store.adapter import Adapter


class HostCache:
    """Adapters by digest, least recently used out first, bounded in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, tuple[Adapter, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, digest: str) -> bool:
        return digest in self._kept

    def get(self, digest: str) -> Adapter | None:
        """The adapter, if it is here."""
        if digest not in self._kept:
            return None
        self._kept.move_to_end(digest)
        return self._kept[digest][0]

    def put(self, digest: str, adapter: Adapter, size_bytes: int) -> None:
        """Keep an adapter, and let go of the oldest ones beyond the bound."""
        self.drop(digest)
        self._kept[digest] = (adapter, size_bytes)
        self._bytes += size_bytes
        while self._bytes > self._max_bytes and self._kept:
            self.drop(next(iter(self._kept)))

    def drop(self, digest: str) -> None:
        """Let go of an adapter."""
        if digest in self._kept:
            self._bytes -= self._kept.pop(digest)[1]
