"""Bytes by their digest. They are checked whenever they are read, and what fails is put aside under its name."""

import contextlib

from adapters_store.errors import ConflictError, CorruptError, NotFoundError
from adapters_store.layout import QUARANTINE, blob_key
from adapters_store.manifest import digest_of
from adapters_store.objects import Objects

_MEND = "publish the same contents again to mend it"


class Blobs:
    """Content-addressed bytes in a store."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects

    def put(self, data: bytes) -> str:
        """Keep the bytes: on return they are there and intact, also where a corrupt copy was. Returns their digest."""
        digest = digest_of(data)
        while not self._is_intact(digest):
            with contextlib.suppress(ConflictError):  # somebody else keeps the same bytes just now
                self.objects.create(blob_key(digest), data)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes of this digest. Raises CorruptError if they are gone or others; others are quarantined."""
        try:
            data = self.objects.read(blob_key(digest))
        except NotFoundError:
            raise CorruptError(f"blob {digest} is missing{self._set_aside(digest)}; {_MEND}") from None
        if digest_of(data) != digest:
            raise CorruptError(f"blob {digest} was corrupt and is now {self._quarantine(digest, data)}; {_MEND}")
        return data

    def _is_intact(self, digest: str) -> bool:
        try:
            self.get(digest)
        except CorruptError:
            return False
        return True

    def _quarantine(self, digest: str, data: bytes) -> str:
        """Move bad bytes aside for a person to look at; returns where to."""
        key = f"{QUARANTINE}/{_hex(digest)}.{_hex(digest_of(data))[:12]}"
        with contextlib.suppress(ConflictError):
            self.objects.create(key, data)
        with contextlib.suppress(NotFoundError):
            if self.objects.read(blob_key(digest)) == data:  # or it was mended meanwhile
                self.objects.delete(blob_key(digest))
        return key

    def _set_aside(self, digest: str) -> str:
        found = [key for key in self.objects.list(QUARANTINE) if _hex(digest) in key]
        return f" (a corrupt copy is {', '.join(found)})" if found else ""


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")
