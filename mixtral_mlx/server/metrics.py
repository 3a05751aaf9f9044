"""Numbers for Prometheus: what answers took, counted as they go by, and what the engine says of itself when asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from ..engine.engine import Engine
from ..engine.request import Done, Event, Token

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
# Each half again the one before: a median or a 95th percentile read from them is off by less than that.
_SECONDS = tuple(round(0.001 * 1.5**step, 6) for step in range(30))


class Metrics:
    """The numbers of one server, apart from those of any other in the process."""

    def __init__(self, engine: Callable[[], Engine | None]) -> None:
        self._registry = CollectorRegistry()
        self.first_token = self._histogram("first_token_seconds", "From asking the engine to the first token.")
        self.gap = self._histogram("token_gap_seconds", "Between two tokens of an answer.")
        self.queue = self._histogram("queue_seconds", "Until the engine began with a request.")
        self.requests = Counter(
            "mixtral_http_requests", "Answers by path and status.", ["path", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "mixtral_http_seconds",
            "What whole answers took.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_Engine(engine))

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(f"mixtral_{name}", about, buckets=_SECONDS, registry=self._registry)


class Clock:
    """Takes the times of one reply."""

    def __init__(self, metrics: Metrics, since: float) -> None:
        self._metrics = metrics
        self._since = since
        self._has_first = False

    def saw(self, event: Event) -> None:
        """Note what came now."""
        if isinstance(event, Done):
            self._metrics.queue.observe(event.queued_seconds)
        if not isinstance(event, Token):
            return
        now = time.monotonic()
        (self._metrics.gap if self._has_first else self._metrics.first_token).observe(now - self._since)
        self._since, self._has_first = now, True


class _Engine(Collector):
    """The engine's own numbers, read when they are asked for."""

    def __init__(self, engine: Callable[[], Engine | None]) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Any]:
        return ()

    def collect(self) -> Iterator[Any]:
        engine = self._engine()
        if engine is None:
            return
        stats, memory, health = engine.stats(), engine.memory(), engine.health()
        requests = stats["requests"]
        yield _by("requests", "Requests by how they ended.", "end", requests, ("finished", "cancelled", "failed"))
        yield _by("tokens", "Tokens by kind.", "kind", _tokens(requests), ("prompt", "cached", "generated"))
        yield _counter("passes", "Passes through the model.", requests["passes"])
        yield _counter("pass_seconds", "Seconds that they took.", requests["pass_seconds"])
        yield _counter("model_loads", "Times that the model was brought into memory.", requests["loads"])
        yield _gauge("requests_running", "Requests that are being answered.", health.running)
        yield _gauge("requests_queued", "Requests that wait.", health.queued)
        yield _gauge("ready", "Whether the model is in memory.", health.state == "ready")
        held = GaugeMetricFamily("mixtral_memory_bytes", "Memory by what it is for.", labels=["of"])
        for name, value in vars(memory).items():
            held.add_metric([name.removesuffix("_bytes")], value)
        yield held
        yield from _group("prefix", "Prompts that began like earlier ones", stats["prefixes"], ("entries", "nbytes"))
        yield from _group("prefix_file", "Blocks of prompts kept on disk", stats["prefix_files"] or {}, ())
        yield from _group("expert", "Experts streamed from the SSD", stats["experts"] or {}, ())


def _tokens(requests: dict[str, Any]) -> dict[str, Any]:
    return {kind: requests[f"{kind}_tokens"] for kind in ("prompt", "cached", "generated")}


def _by(name: str, about: str, label: str, values: dict[str, Any], kinds: Iterable[str]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"mixtral_{name}", about, labels=[label])
    for kind in kinds:
        family.add_metric([kind], values[kind])
    return family


def _group(name: str, about: str, values: dict[str, Any], now: Iterable[str]) -> Iterator[Any]:
    """A family for each of `values`: a gauge for what is so `now`, a counter for what only grows."""
    for key, value in values.items():
        make = _gauge if key in now else _counter
        yield make(f"{name}_{key}", f"{about}: {key}.", value)


def _counter(name: str, about: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"mixtral_{name}", about, value=value)


def _gauge(name: str, about: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"mixtral_{name}", about, value=float(value))
