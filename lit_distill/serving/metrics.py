"""Counts for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lit_distill.serving.worker import PATH

_PATHS = (PATH, "/health", "/metrics", "/docs", "/openapi.json", "/info", "/")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """What a server counts since its start."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self._requests = Counter(
            "lit_distill_requests", "Requests by path and status.", ["path", "status"], registry=own
        )
        self._seconds = Histogram("lit_distill_predict_seconds", f"Seconds of {PATH}.", buckets=_SECONDS, registry=own)
        self.rows = Counter("lit_distill_rows", "Rows answered.", registry=own)
        self.waiting = Gauge("lit_distill_rows_waiting", "Rows in the queue or in a worker.", registry=own)

    def count(self, path: str, status: int, seconds: float) -> None:
        """Count a request; paths that do not exist are one."""
        self._requests.labels(path if path in _PATHS else "other", status).inc()
        if path == PATH:
            self._seconds.observe(seconds)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
