"""Prometheus metrics, and the endpoint that serves them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from crishim.errors import ConfigError

REGISTRY = CollectorRegistry()

CALLS = Counter("crishim_calls_total", "CRI calls answered", ["method", "code"], registry=REGISTRY)
CALL_SECONDS = Histogram(
    "crishim_call_seconds",
    "time to answer CRI calls",
    ["method"],
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
    registry=REGISTRY,
)
PULLED_BYTES = Counter("crishim_pulled_bytes_total", "compressed bytes downloaded", registry=REGISTRY)
OPERATIONS = Gauge("crishim_operations", "operations under way", registry=REGISTRY)


def serve(listen: str) -> None:
    """Serve the metrics over HTTP on ``listen`` (``ADDRESS:PORT``) from a thread."""
    address, _, port = listen.rpartition(":")
    if not address or not port.isdigit():
        raise ConfigError(f"metrics.listen {listen!r} is not ADDRESS:PORT")
    try:
        start_http_server(int(port), address.strip("[]"), registry=REGISTRY)
    except OSError as err:
        raise ConfigError(f"cannot listen on metrics.listen {listen}: {err.strerror}") from err
