"""What a Prometheus server scrapes: the board as gauges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pgbg_orchestration.ledger.board import Board
from pgbg_orchestration.telemetry import prefix_of
from pgbg_orchestration.view.lines import Line, lines_of
from pgbg_orchestration.view.states import ALL_STATES

CONTENT_TYPE = CONTENT_TYPE_LATEST


def exposition(board: Board) -> bytes:
    """Return the gauges in Prometheus's text form."""
    registry = CollectorRegistry()
    registry.register(_OfBoard(board))
    return generate_latest(registry)


class _OfBoard(Collector):
    def __init__(self, board: Board) -> None:
        self._board = board

    def collect(self) -> Iterable[Metric]:
        lines = lines_of(self._board)
        at_work = [line for line in lines if line.is_at_work]
        yield _one("pgbg_worker_slots", "max_worker_processes of the server.", self._board.slots)
        yield _one("pgbg_worker_slots_used", "Worker slots seen in use, by whatever.", self._board.slots_used)
        yield _by(
            "pgbg_jobs",
            "Jobs at work or waiting, and workers that no job is known of, by state and first part of the label.",
            Counter((line.state, prefix_of(line.label)) for line in at_work),
        )
        yield _by(
            "pgbg_recent_jobs",
            "Jobs that ended in the last quarter of an hour, by state and by the first part of the label.",
            Counter((line.state, prefix_of(line.label)) for line in lines if not line.is_at_work),
        )
        longest = GaugeMetricFamily("pgbg_longest_seconds", "For how long the oldest has run.", labels=["state"])
        for state in ALL_STATES:
            seconds = [line.seconds for line in at_work if line.state == state and line.seconds is not None]
            if seconds:
                longest.add_metric([state], max(seconds))
        yield longest
        yield _one("pgbg_blocked_workers", "Workers that wait for a lock.", sum(map(_is_blocked, at_work)))


def _is_blocked(line: Line) -> bool:
    at = line.worker.activity if line.worker is not None else None
    return at is not None and bool(at.blockers)


def _one(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _by(name: str, text: str, counts: Counter[tuple[str, str]]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=["state", "label_prefix"])
    for (state, prefix), count in sorted(counts.items()):
        family.add_metric([state, prefix], count)
    return family
