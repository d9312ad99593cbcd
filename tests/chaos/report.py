"""What a run under fire comes to: what was broken, what the jobs made of it, and every promise that was not kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """Counts of one run. The lists hold a line for each promise that was broken; they are to be empty."""

    seed: int
    server: str
    seconds: float = 0.0
    jobs: Counter[str] = field(default_factory=Counter)  # by their kind
    calls: int = 0
    cancels: int = 0
    hit: set[str] = field(default_factory=set)
    faults: Counter[str] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)  # of launching processes, at a point of the algorithm
    ends: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    false_successes: list[str] = field(default_factory=list)
    false_failures: list[str] = field(default_factory=list)
    false_unknowns: list[str] = field(default_factory=list)
    without_receipt: list[str] = field(default_factory=list)
    cancels_undone: list[str] = field(default_factory=list)
    overlaps: list[str] = field(default_factory=list)
    endless: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)

    BROKEN = (
        ("lost (told to be done for, or never done, though wanted)", "lost"),
        ("doubled (an effect more than once)", "doubled"),
        ("false successes (told, without an effect)", "false_successes"),
        ("false failures (told that nothing is committed, with an effect)", "false_failures"),
        ("false unknowns (told to be unknown, though nothing was broken that makes it so)", "false_unknowns"),
        ("effect and receipt at odds", "without_receipt"),
        ("cancels that did not hold", "cancels_undone"),
        ("two generations of a series at work at once", "overlaps"),
        ("calls without an end", "endless"),
        ("orphans (workers left at the end)", "orphans"),
        ("server processes that crashed by themselves", "crashes"),
        ("errors that nobody expects", "surprises"),
    )

    @property
    def broken_things(self) -> int:
        """How many faults there were, a process that died at a point of the algorithm included."""
        return self.faults.total() + self.deaths.total()

    def broken(self) -> dict[str, list[str]]:
        """The promises that were not kept, with the cases."""
        return {title: cases for title, name in self.BROKEN if (cases := getattr(self, name))}

    def __str__(self) -> str:
        lines = [
            f"chaos on {self.server}: PGBG_CHAOS_SEED={self.seed}, {self.seconds:.0f} s",
            f"{self.jobs.total():7} jobs: {_list(self.jobs)}",
            f"{self.calls:7} calls to run them, {self.cancels} of them cancelled",
            f"{self.broken_things:7} faults, {len(self.hit)} jobs known to be hit by one",
            *_table("faults survived", self.faults),
            *_table("launching processes killed at a point of the algorithm", self.deaths),
            *_table("ends that calls were told", self.ends),
            *_table("jobs without a receipt of their own, rightly told to be unknown", self.unknown),
            "promises broken",
            *(f"{len(getattr(self, name)):7} {title}" for title, name in self.BROKEN),
        ]
        lines += [f"  {title}: {case}" for title, cases in self.broken().items() for case in cases[:20]]
        return "\n".join(lines)


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.most_common())


def _table(title: str, counts: Counter[str]) -> list[str]:
    return [title, *(f"{number:7} {name}" for name, number in counts.most_common())]
