"""Every metric the server exports, with unit and meaning. Names are base units with the prefix espalier_."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from server.generation.batcher import Batcher

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
MAX_LABELS = 200  # adapters with a label of their own; the rest count as "other"


class Metrics:
    """One registry per app, so that two apps in one process do not share counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter("espalier_requests", "HTTP requests", ["endpoint", "status"], registry=r)
        self.latency = Histogram("espalier_request_seconds", "HTTP latency", ["endpoint"], registry=r, buckets=_LATENCY)
        self.rows = Counter("espalier_rows", "rows answered", registry=r)
        self.rows_skipped = Counter("espalier_rows_skipped", "rows skipped because the client had left", registry=r)
        self.rejected = Counter("espalier_rejected", "calls refused because the queue was full", registry=r)
        self.forwards = Counter("espalier_forwards", "forward passes of the backbone", registry=r)
        self.forward_failures = Counter("espalier_forward_failures", "forward passes that failed", registry=r)
        self.forward_seconds = Histogram(
            "espalier_forward_seconds", "time of one forward", registry=r, buckets=_LATENCY
        )
        self.batch_rows = Histogram("espalier_batch_rows", "rows per forward", registry=r, buckets=_powers(10))
        self.batch_tokens = Histogram("espalier_batch_tokens", "tokens per forward", registry=r, buckets=_powers(15))
        self.batch_mixes = Histogram(
            "espalier_batch_compositions", "different compositions per forward", registry=r, buckets=_powers(10)
        )
        self.width = Histogram(
            "espalier_composition_adapters",
            "adapters composed for a row",
            registry=r,
            buckets=(0, 1, 2, 3, 4, 6, 8, 16, 32, 64),
        )
        self.queue_tokens = Gauge("espalier_queue_tokens", "tokens waiting", registry=r)
        self.queue_rows = Gauge("espalier_queue_rows", "rows waiting", registry=r)
        self.adapter_rows = Counter("espalier_adapter_rows", "rows that used an adapter", ["adapter"], registry=r)
        self.resident = Gauge("espalier_resident_adapters", "adapters by tier", ["tier"], registry=r)
        self.load_seconds = Histogram(
            "espalier_load_seconds", "time to make an adapter resident", registry=r, buckets=_LATENCY
        )
        self.loads = Counter("espalier_loads", "adapters made resident", registry=r)
        self.load_failures = Counter("espalier_load_failures", "adapters refused at load", ["code"], registry=r)
        self.evictions = Counter("espalier_evictions", "adapters evicted from the device", registry=r)
        self.generated_tokens = Counter("espalier_generated_tokens", "tokens generated", registry=r)
        self.first_token_seconds = Histogram(
            "espalier_first_token_seconds", "time from admission to a text's first token", registry=r, buckets=_LATENCY
        )
        self.graph_version = Gauge("espalier_graph_version", "relation graph that serves; 0 for none", registry=r)
        self._labels: set[str] = set()

    def note_composition(self, names: Sequence[str]) -> None:
        """The adapters that a row, or several rows of one composition, used."""
        self.width.observe(len(names))
        for name in names:
            self.adapter_rows.labels(self.adapter_label(name)).inc()

    def adapter_label(self, name: str) -> str:
        """The adapter's name while there are few of them, else `other`: a bounded label set."""
        if name in self._labels or len(self._labels) < MAX_LABELS:
            self._labels.add(name)
            return name
        return "other"


class LoraInfo(Collector):
    """The gauge by which Kubernetes' inference gateways route: running and waiting adapters as labels."""

    def __init__(self, slots: int, names: Callable[[], tuple[set[str], set[str]]]) -> None:
        self._slots = slots
        self._names = names

    def collect(self) -> Iterable[Metric]:
        """The gauge with the current label values; its value is 1."""
        running, waiting = self._names()
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        gauge = GaugeMetricFamily("espalier_lora_requests_info", "adapters in use and waited for", labels=labels)
        gauge.add_metric(
            [str(self._slots), ",".join(sorted(running)[:MAX_LABELS]), ",".join(sorted(waiting)[:MAX_LABELS])], 1
        )
        yield gauge


class GenerationState(Collector):
    """What the batcher does, read when somebody looks."""

    def __init__(self, batcher: "Batcher") -> None:
        self._batcher = batcher

    def collect(self) -> Iterable[Metric]:
        """Gauges of what runs, waits and is held; counters of what was done."""
        batcher = self._batcher
        done, pool = batcher.counters, batcher.pool
        yield _gauge("running_sequences", "texts being generated", len(batcher.running))
        yield _gauge("waiting_sequences", "texts that wait for KV memory or their turn", len(batcher.waiting))
        yield _gauge("kv_pages_held", "KV pages in use", pool.num_held)
        yield _gauge("kv_pages", "KV pages in all", pool.num_pages)
        yield _gauge("kv_bytes", "memory for keys and values", pool.num_pages * batcher.decoder.memory.page_bytes)
        yield _counter("generation_steps", "forward passes that generate", done.steps)
        yield _counter("generation_step_tokens", "tokens computed in them, prompts included", done.tokens)
        yield _counter("generation_step_seconds", "time of those steps", done.step_s)
        yield _counter("generation_forward_seconds", "time of the model in them", done.forward_s)
        yield _counter("preemptions", "texts that gave their KV memory up and were computed again", done.preemptions)
        yield _counter("cached_prompt_tokens", "prompt tokens found in the pages of others", done.cached_tokens)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"espalier_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"espalier_{name}", text, value=value)


def _powers(count: int) -> tuple[float, ...]:
    return tuple(float(2**i) for i in range(count + 1))
