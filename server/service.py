"""The server without HTTP: backbone, store, catalog, residency, engine and queue, started and stopped together."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from adapters_store import adapter as adapters
from adapters_store.adapter import Adapter
from adapters_store.errors import BackboneMismatchError, UnknownSiteError, UnsupportedError
from adapters_store.manifest import Manifest
from adapters_store.places import blocks
from adapters_store.primitives import calibration, native
from adapters_store.primitives.head import Head
from adapters_store.store import AdapterStore
from server import backbone, catalog, golden, logs
from server.backbone import Served
from server.catalog import Catalog
from server.compose import Composer
from server.config import Settings
from server.engine import Engine
from server.generation.batcher import Batcher
from server.generation.decoder import Decoder
from server.generation.generator import Generator
from server.leases import Identity, Lease
from server.metrics import GenerationState, LoraInfo, Metrics
from server.residency import Residency
from server.scheduler import Scheduler

log = logging.getLogger("espalier")
Result = TypeVar("Result")
_calibrate = functools.cache(calibration.calibrate_lowrank)  # of the machine, so once for all services of a process


class Service:
    """Owns every resource of the server. Create it, `await start()`, serve, `await stop()`."""

    def __init__(self, settings: Settings, served: Served | None = None) -> None:
        """served: an already loaded backbone, for tests and benchmarks that make their own."""
        self.settings = settings
        self.metrics = Metrics()
        self.store = AdapterStore(settings.store)
        self.backbone = served or backbone.load(
            settings.backbone, settings.dtype, settings.device, generate=settings.generate
        )
        self.catalog = Catalog()
        self.engine = Engine(self.backbone.encoder, settings.threads)
        self.generator = self._make_generator()
        generates = self.generator is not None
        self.composer = Composer(self.backbone.encoder.num_layers, settings.max_adapters, generates=generates)
        self.unready: str | None = "starting"
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="worker")
        self._changing = asyncio.Lock()
        self._polling: asyncio.Task[None] | None = None

    def _make_generator(self) -> Generator | None:
        """None for a backbone that does not generate."""
        settings, language = self.settings, self.backbone.language
        if language is None:
            return None
        decoder = Decoder(language, kv_bytes=settings.kv_mb * 2**20, max_length=settings.max_length)
        if settings.cuda_graphs and decoder.is_packed and decoder.encoder.device.type == "cuda":
            decoder.use_graphs(captures=True)
        batcher = Batcher(decoder, step_tokens=settings.step_tokens, max_sequences=settings.max_sequences)
        self.metrics.registry.register(GenerationState(batcher))
        end_ids = self.backbone.end_ids
        return Generator(self.engine, batcher, self.metrics, end_ids=end_ids, queue_tokens=settings.queue_tokens)

    async def start(self) -> None:
        """Read the store, warm up, load what is served and check its golden examples."""
        settings = self.settings
        self.residency = Residency(
            self.engine, self.load, self._prove, self.metrics,
            num_slots=settings.slots, cache_bytes=settings.host_cache_mb * 2**20,
        )  # fmt: skip
        self.scheduler = Scheduler(
            self.engine, self.metrics, batch_tokens=settings.batch_tokens, queue_tokens=settings.queue_tokens
        )
        self.metrics.registry.register(LoraInfo(settings.slots, self._lora))
        self.scheduler.start()
        await self.engine.run(self._warm_up)
        await self.refresh()
        if settings.preload:
            await self._preload()
        self._polling = asyncio.create_task(self._poll())
        self.unready = None
        logs.note(
            log, "ready", backbone=self.backbone.name, adapters=len(self.catalog.manifests),
            tasks=len(self.catalog.tasks), refused=len(self.problems), path=self.operator_path,
        )  # fmt: skip

    def _lora(self) -> tuple[set[str], set[str]]:
        return self.residency.running, set(self.residency.waiting)

    def _warm_up(self) -> None:
        encoder = self.backbone.encoder
        if encoder.device.type == "cpu":
            _calibrate(encoder.dtype, encoder.device)
        for name in blocks(encoder.sites.backbone):  # now: later, a loader would attach them while a forward runs
            with contextlib.suppress(UnknownSiteError):
                encoder.sites.add(name)
        encoder.pool([[1, 2, 3]], [None], [self.backbone.default_pooling])

    @property
    def problems(self) -> dict[str, str]:
        """What the store holds but this server does not serve, and why."""
        live = {Identity.of(m) for versions in self.catalog.manifests.values() for m in versions.values()}
        failed = [failure for identity, failure in self.residency.failures.items() if identity in live]
        return {f.manifest.reference: f"{f.code}: {f.message}" for f in failed} | dict(self.catalog.broken)

    @property
    def operator_path(self) -> str:
        """Which form of the low-rank operator serves, for people."""
        if self.backbone.encoder.device.type != "cpu":
            return f"torch on {self.backbone.encoder.device}"
        return native.status().detail

    def load(self, manifest: Manifest) -> Adapter:
        """A version read from the store, digests verified, checked against this backbone. Runs on a loader thread."""
        self.check_backbone(manifest)
        loaded = self.store.load(manifest)
        self.check(loaded)
        return loaded

    def check(self, loaded: Adapter) -> None:
        """Refuse an adapter that this server cannot run as promised. Raises RefusedError."""
        sites = self.backbone.encoder.sites
        adapters.check(loaded, sites, max_rank=self.settings.max_rank, allow_zero=self.settings.allow_zero)
        if loaded.head and loaded.head.spec.pooling == "pooler" and self.backbone.encoder.pooler is None:
            raise UnsupportedError("the head pools with 'pooler', which this backbone lacks; it has mean, cls, last")
        if loaded.head:
            self.backbone.check_head(loaded.head.spec)

    def check_backbone(self, manifest: Manifest) -> None:
        """Refuse a version trained on another backbone. Raises BackboneMismatchError."""
        mine, theirs = self.backbone.fingerprint, manifest.backbone
        if not mine.is_same(theirs):
            raise BackboneMismatchError(
                f"{manifest.reference} was trained on {theirs.architecture} {theirs.weights_digest[:19]}…, "
                f"this server runs {mine.architecture} {mine.weights_digest[:19]}…"
            )

    async def refresh(self) -> None:
        """Look at the store again and swap in what is there now."""
        async with self._changing:
            found = await self.work(lambda: catalog.read(self.store, self.catalog, self.backbone.encoder.num_layers))
            if catalog.differs(found, self.catalog):
                for what in found.broken.keys() - self.catalog.broken.keys():
                    logs.note(log, "unreadable", logging.ERROR, what=what, detail=found.broken[what])
                self.catalog = found
                self.metrics.graph_version.set(found.graph_version)

    async def _prove(self, manifest: Manifest, slot: int | None, head: Head | None) -> None:
        await golden.check(self, manifest, slot, head)

    async def _preload(self) -> None:
        """Bring what is served to the device; what is refused must not keep the others from being served."""
        served = self.catalog.served()[: self.settings.slots]
        leases = await asyncio.gather(*(self.residency.lease([m]) for m in served), return_exceptions=True)
        for lease in leases:
            if isinstance(lease, Lease):
                self.residency.release(lease)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self.settings.poll_s)
            try:
                await self.refresh()
            except Exception as error:  # noqa: BLE001  # the next look may find a better store
                logs.note(log, "store_unreadable", logging.ERROR, trace=logs.trace_of(error))

    async def work(self, call: Callable[[], Result]) -> Result:
        """What call gives, run on a worker thread: disk, parsing, tokenizing."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, call)

    async def stop(self) -> None:
        """Finish what was admitted, within the drain time, then let go of everything."""
        self.unready = "draining"
        start = time.monotonic()
        drains = [self.scheduler.drain(self.settings.drain_s)]
        drains += [self.generator.drain(self.settings.drain_s)] if self.generator else []
        finished = all(await asyncio.gather(*drains))
        logs.note(log, "drained", finished=finished, seconds=time.monotonic() - start)
        if self._polling:
            self._polling.cancel()
        self.scheduler.stop()
        if self.generator:
            self.generator.stop()
        await asyncio.get_running_loop().run_in_executor(None, self.engine.close)
        self.residency.close()
        self._workers.shutdown(wait=False, cancel_futures=True)
