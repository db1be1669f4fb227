"""Prometheus metrics. Names and buckets are those of vLLM with another prefix, so that its dashboards can be reused."""

from collections import Counter as Count
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lorasmith.engine.engine import Engine

PREFIX = "lorasmith:"
FIRST = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)  # seconds to the first token
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
WHOLE = (0.1, 0.3, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class ServerMetrics:
    """The metrics of a server, labeled by model. Belongs to the event loop's thread."""

    def __init__(self, engine: Engine, max_concurrency: int) -> None:
        self.registry, self._engine, cache = CollectorRegistry(), engine, engine.cache
        self.running = self._gauge("num_requests_running", "Requests that have a place in the batch.")
        self.waiting = self._gauge("num_requests_waiting", "Requests that wait for a slot or for memory.")
        if cache is not None:
            text = "Part of the KV cache in use, 0 to 1."
            usage = Gauge(f"{PREFIX}kv_cache_usage_perc", text, registry=self.registry)
            usage.set_function(lambda: cache.reserved / cache.limit)
            text = "Capacity of the KV cache in tokens."
            Gauge(f"{PREFIX}kv_cache_tokens", text, registry=self.registry).set(cache.limit)
        text = "Requests of the whole context that run at once."
        Gauge(f"{PREFIX}max_concurrency", text, registry=self.registry).set(max_concurrency)
        text = "How often a request lost its place, for lack of memory or to another adapter, and was computed again."
        self.preemptions = Counter(f"{PREFIX}num_preemptions", text, registry=self.registry)
        self._preempted = 0
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens of replies.")
        self.success = self._counter("request_success", "Requests that came to their end.", "finished_reason")
        self.first = self._histogram("time_to_first_token_seconds", "Until the first token, waiting included.", FIRST)
        self.between = self._histogram("time_per_output_token_seconds", "Between two tokens of a reply.", BETWEEN)
        self.whole = self._histogram("e2e_request_latency_seconds", "Until the last token, waiting included.", WHOLE)

    def text(self, running: Iterable[str], waiting: Iterable[str], models: Iterable[str]) -> bytes:
        """All metrics in Prometheus' text format.

        `running` and `waiting` are the models of the current requests, one name per request; `models` are all models.
        """
        for gauge, names in ((self.running, Count(running)), (self.waiting, Count(waiting))):
            gauge.clear()
            for name in {*models, *names}:
                gauge.labels(name).set(names[name])
        self.preemptions.inc(self._engine.preemptions - self._preempted)
        self._preempted = self._engine.preemptions
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(PREFIX + name, text, ["model_name"], registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, ["model_name", *labels], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, ["model_name"], registry=self.registry, buckets=buckets)
