"""Adapters on the device: slots, who holds them, who may be evicted.

A lease holds the versions of one call from admission to answer; what is leased is never evicted. A lease is had all or
nothing, in order of asking, so calls cannot block each other half-way. Versions are known by their content's digest and
their golden examples: two names for one content share a slot, a new version never meets an old one's, and one that
promised the wrong thing takes none along that promises the right one of the same content. A version is proved when it
first comes to the device; what was refused for what it is stays refused until it is unloaded. A version that has only a
head takes no slot; idle ones are evicted, oldest first, while more than twice as many versions as there are slots are
on the device. All methods run on the event loop's thread.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from adapters_store.adapter import Adapter
from adapters_store.errors import EspalierError, RefusedError
from adapters_store.manifest import Manifest
from adapters_store.primitives.head import Head
from adapters_store.sites import Sites
from server import logs
from server.engine import Engine
from server.errors import DrainingError, TooManyAdaptersError
from server.host_cache import HostCache
from server.leases import Failure, Identity, Lease, Resident
from server.metrics import Metrics

log = logging.getLogger("espalier")
Load = Callable[[Manifest], Adapter]
Prove = Callable[[Manifest, int | None, Head | None], Awaitable[None]]


class Residency:
    """The slots of one engine."""

    def __init__(
        self, engine: Engine, load: Load, prove: Prove, metrics: Metrics, *, num_slots: int, cache_bytes: int
    ) -> None:
        """load: reads and checks an adapter, off the event loop and off the engine's thread.

        prove: runs a version that is on the device but not yet used by anybody; raises GoldenError.
        """
        self._engine = engine
        self._sites: Sites = engine.encoder.sites
        self._load = load
        self._prove = prove
        self._metrics = metrics
        self.num_slots = num_slots
        self.failures: dict[Identity, Failure] = {}  # the last attempt to load it failed
        self.waiting: Counter[str] = Counter()  # names of adapters that calls wait for slots for
        self._proved: set[Identity] = set()  # a version that comes back is what it was
        self._free = list(range(num_slots - 1, -1, -1))
        self._residents: OrderedDict[Identity, Resident] = OrderedDict()  # least recently used first
        self._order = asyncio.Lock()  # held by the lease that waits for slots; later ones queue behind it
        self._released = asyncio.Event()
        self._loader = ThreadPoolExecutor(2, thread_name_prefix="loader")
        self._loading: set[asyncio.Task[None]] = set()
        self._cache = HostCache(cache_bytes)

    async def lease(self, manifests: Sequence[Manifest]) -> Lease:
        """Hold these versions, loading those that are not resident.

        Raises TooManyAdaptersError if they can never fit, or what loading raises; nothing stays held then.
        """
        self._refuse_failed(manifests)
        if not self._order.locked() and all(Identity.of(m) in self._residents for m in manifests):
            held = [self._hold(m) for m in manifests]
        else:
            held = await self._hold_all(manifests)
        try:
            for resident in held:
                if not resident.ready.done():
                    await asyncio.shield(resident.ready)
                resident.ready.result()
        except BaseException:
            self._release(held)
            raise
        return Lease({resident.manifest.digest: resident for resident in held})

    def release(self, lease: Lease) -> None:
        """Let go of a lease."""
        self._release(lease.residents.values())

    def note_proved(self, manifest: Manifest) -> None:
        """A version gave its examples before it was published: they need not run again, nor what failed be believed."""
        self._proved.add(Identity.of(manifest))
        self.failures.pop(Identity.of(manifest), None)

    def _refuse_failed(self, manifests: Sequence[Manifest]) -> None:
        """Raise again what is certain: a version refused for what it is. Other failures may pass; those are tried."""
        for manifest in manifests:
            failure = self.failures.get(Identity.of(manifest))
            if failure and issubclass(failure.kind, RefusedError):
                raise failure.kind(failure.message)

    async def _hold_all(self, manifests: Sequence[Manifest]) -> list[Resident]:
        needed = sum(1 for m in manifests if m.sites)
        if needed > self.num_slots:
            raise TooManyAdaptersError(
                f"one call needs {needed} adapters at once, the device has {self.num_slots} slots (--slots)"
            )
        names = {m.name for m in manifests if Identity.of(m) not in self._residents}
        self.waiting.update(names)
        try:
            async with self._order:
                while not self._make_room(manifests):
                    self._released.clear()
                    await self._released.wait()
                self._refuse_failed(manifests)  # while this call waited
                return [self._hold(m) for m in manifests]
        finally:
            self.waiting -= Counter(names)

    def _make_room(self, manifests: Sequence[Manifest]) -> bool:
        """True once there are free slots for all that are missing; evicts what nobody holds, oldest first."""
        wanted = {Identity.of(m) for m in manifests}
        missing = sum(1 for m in manifests if m.sites and Identity.of(m) not in self._residents)
        surplus = missing - len(self._free)
        if surplus <= 0:
            return True
        with_slot = [(identity, r) for identity, r in self._residents.items() if r.slot is not None]
        idle = [r for identity, r in with_slot if r.is_idle and identity not in wanted]
        if len(idle) < surplus:
            return False
        self._evict(idle[:surplus])
        return True

    def _bound_heads(self) -> None:
        """Evict idle versions that have only a head, oldest first, as far as there are too many residents."""
        surplus = len(self._residents) - 2 * self.num_slots
        if surplus > 0:
            self._evict([r for r in self._residents.values() if r.is_idle and r.slot is None][:surplus])

    def _evict(self, residents: Sequence[Resident]) -> None:
        for resident in residents:
            self._metrics.evictions.inc()
            self._retire(resident)

    def _hold(self, manifest: Manifest) -> Resident:
        """One more holder of a version; starts loading it if it is not resident."""
        identity = Identity.of(manifest)
        resident = self._residents.get(identity)
        if resident is None:
            slot = self._free.pop() if manifest.sites else None
            resident = Resident(manifest, slot, asyncio.get_running_loop().create_future())
            self._residents[identity] = resident
            task = asyncio.create_task(self._bring(resident))
            self._loading.add(task)
            task.add_done_callback(self._loading.discard)
        self._residents.move_to_end(identity)
        resident.holders += 1
        return resident

    async def _bring(self, resident: Resident) -> None:
        """Disk or RAM to device; the outcome is told through `ready`."""
        start = time.perf_counter()
        try:
            await self._place(resident)
        except asyncio.CancelledError:
            self._fail(resident, DrainingError("the server stopped while the adapter was loading"))
            return
        except Exception as error:  # noqa: BLE001  # whatever it was, those who wait must hear it
            self._fail(resident, error)
            return
        self.failures.pop(resident.identity, None)
        self._metrics.loads.inc()
        self._metrics.load_seconds.observe(time.perf_counter() - start)
        resident.ready.set_result(None)
        if resident.retired and resident.holders == 0:
            self._empty(resident)
        self._released.set()  # nobody may hold it any more: then its slot can be had
        self._count()

    async def _place(self, resident: Resident) -> None:
        manifest, slot = resident.manifest, resident.slot
        adapter = await self._fetch(manifest)
        resident.head = adapter.head.to(self._sites.device) if adapter.head else None
        if slot is not None:
            await self._engine.run(lambda: self._sites.put(slot, adapter.entries))
        if resident.identity not in self._proved:
            await self._prove(manifest, slot, resident.head)
            self._proved.add(resident.identity)

    def _fail(self, resident: Resident, error: Exception) -> None:
        manifest = resident.manifest
        known = isinstance(error, EspalierError)
        code = error.code if isinstance(error, EspalierError) else "internal"
        logs.note(
            log, "adapter_refused", logging.ERROR, adapter=manifest.reference, code=code,
            detail=str(error) if known else logs.trace_of(error),
        )  # fmt: skip
        self.failures[resident.identity] = Failure(manifest, type(error), str(error), code)
        self._cache.drop(manifest.digest)
        self._metrics.load_failures.labels(code).inc()
        error.__cause__ = error.__context__ = None  # their frames hold the tensors, and this one's hold `ready`
        resident.ready.set_exception(error.with_traceback(None))
        resident.ready.exception()  # seen, even if nobody waits any more
        self._retire(resident)

    async def _fetch(self, manifest: Manifest) -> Adapter:
        cached = self._cache.get(manifest.digest)
        if cached is not None:
            return cached
        adapter = await asyncio.get_running_loop().run_in_executor(self._loader, self._load, manifest)
        self._cache.put(manifest.digest, adapter, manifest.size_bytes)
        return adapter

    def _release(self, residents: Iterable[Resident]) -> None:
        for resident in residents:
            resident.holders -= 1
            if resident.retired and resident.holders == 0:
                self._empty(resident)
        self._bound_heads()
        self._released.set()

    def _retire(self, resident: Resident) -> None:
        """Nobody new gets it; its slot is freed once the last holder lets go."""
        if self._residents.get(resident.identity) is resident:
            del self._residents[resident.identity]
        resident.retired = True
        if resident.holders == 0:
            self._empty(resident)

    def _empty(self, resident: Resident) -> None:
        """Free the slot; while the adapter is still being brought, that is left to `_bring`."""
        if resident.gone.is_set() or not resident.ready.done():
            return
        slot = resident.slot
        if slot is not None:
            self._engine.post(lambda: self._sites.drop(slot))  # runs before any later put into the slot
            self._free.append(slot)
        resident.gone.set()
        self._released.set()
        self._count()

    async def unload(self, manifests: Sequence[Manifest], timeout_s: float) -> list[Manifest]:
        """Take versions off the device once their holders are done. Returns those that were there and now are not."""
        found = [(m, r) for m in manifests if (r := self._residents.get(Identity.of(m))) is not None]
        for manifest in manifests:
            self._cache.drop(manifest.digest)
            self.failures.pop(Identity.of(manifest), None)
        for _, resident in found:
            self._retire(resident)
        waits = [asyncio.create_task(resident.gone.wait()) for _, resident in found]
        if waits:
            await asyncio.wait(waits, timeout=timeout_s)
        for wait in waits:
            wait.cancel()
        self._count()
        return [manifest for manifest, resident in found if resident.gone.is_set()]

    def state(self, manifest: Manifest) -> str:
        """`device`, `loading`, `host` or `store`: where a version is now."""
        resident = self._residents.get(Identity.of(manifest))
        if resident is not None:
            return "device" if resident.ready.done() else "loading"
        return "host" if manifest.digest in self._cache else "store"

    @property
    def running(self) -> set[str]:
        """Names of adapters that some call holds."""
        return {r.manifest.name for r in self._residents.values() if r.holders}

    @property
    def num_held(self) -> int:
        """Holders of all residents: 0 when nothing is in flight."""
        return sum(r.holders for r in self._residents.values())

    def _count(self) -> None:
        self._metrics.resident.labels("device").set(len(self._residents))
        self._metrics.resident.labels("host").set(len(self._cache))

    def close(self) -> None:
        """Stop the loader threads."""
        self._loader.shutdown(wait=False, cancel_futures=True)
