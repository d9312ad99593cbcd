"""What is to happen to each job of a run under fire: it follows from the seed and the job's number alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from tests.core.kit import effect

ENDLESS = 40
"""Seconds that a job sleeps which only a cancel is to end."""
STEPS = 2
"""How many effects a supervised procedure leaves, each in a transaction of its own."""
MUCH_OUTPUT = "select repeat('x', 1000) from generate_series(1, 200)"
"""More than the worker's queue holds, and nobody reads it."""


@dataclass(frozen=True)
class Plan:
    """What is to happen to one job."""

    name: str
    kind: str
    sql: str
    settings: dict[str, str] | None = None
    isolation: str | None = None
    contenders: int = 1
    cancel_after: float | None = None  # seconds
    cancel_by: str = "cancel"  # 'cancel' from elsewhere, or 'cancel_task' of the call
    wanted_again: bool = False  # after its cancel
    newer_after: float | None = None  # seconds until a newer generation is wanted
    effects: int = 1  # that the job leaves when it is done
    verify_sql: str | None = None

    @classmethod
    def make(cls, seed: int, number: int, *, fatal: bool = True) -> Plan:
        """Return the plan of job ``number``; ``fatal``: the server has ``transaction_timeout``."""
        chance = random.Random(f"{seed}/job/{number}")
        kind = chance.choices(("receipt", "supervised", "session"), (80, 12, 8))[0]
        if kind == "receipt":
            return cls._with_receipt(f"j{number}", chance, fatal=fatal)
        return cls._without_receipt(f"j{number}", kind, chance)

    @classmethod
    def _with_receipt(cls, name: str, chance: random.Random, *, fatal: bool) -> Plan:
        sql = effect(name)
        if chance.random() < 0.1:
            sql += "; select 1 / (random() < 0.6)::int"
        if chance.random() < 0.6:
            sql += f"; select pg_sleep({chance.choice([0, 0.01, 0.05, 0.3, 1])})"
        if chance.random() < 0.05:
            sql += f"; {MUCH_OUTPUT}"
        fate = chance.random()
        cancel = fate < 0.15
        settings = None
        if cancel and chance.random() < 0.4:
            sql += f"; select pg_sleep({ENDLESS})"
        elif fate > 0.8 and chance.random() < 0.5:
            # Every other attempt ends by a FATAL error: "completed", no error, nothing done.
            sql = f"{effect(name)}; select pg_sleep(2 * (random() < 0.4)::int)"
            settings = {"transaction_timeout": "1000"} if fatal else None
        return cls(
            name=name,
            kind="receipt",
            sql=sql,
            settings=settings,
            isolation=chance.choice([None, None, "repeatable read", "serializable"]),
            contenders=chance.choice([1, 1, 1, 2, 3]),
            cancel_after=chance.choice([0, 0.005, 0.02, 0.1, 0.3]) if cancel else None,
            cancel_by=chance.choice(["cancel", "cancel_task"]),
            wanted_again=chance.random() < 0.5,
            newer_after=chance.choice([0, 0.01, 0.05, 0.2]) if fate > 0.92 else None,
        )

    @classmethod
    def _without_receipt(cls, name: str, kind: str, chance: random.Random) -> Plan:
        seconds = chance.choice([0, 0.01, 0.05, 0.3, 1])
        verify_sql = None
        effects = 1
        if kind == "supervised" and chance.random() < 0.4:
            effects = STEPS
            sql = f"call steps('{name}', {STEPS}, {seconds / STEPS})"
        else:
            sql = f"insert into effects (job) select '{name}' from pg_sleep({seconds})"
            if chance.random() < 0.1:
                sql += " where 1 / (random() < 0.6)::int = 1"
            if chance.random() < 0.4:
                verify_sql = f"select exists (select from effects where job = '{name}')"
        cancel = kind == "supervised" and chance.random() < 0.15
        return cls(
            name=name,
            kind=kind,
            sql=sql,
            cancel_after=chance.choice([0, 0.02, 0.1, 0.3]) if cancel else None,
            effects=effects,
            verify_sql=verify_sql,
        )

    def job(self, generation: int | None = None) -> dict[str, Any]:
        """The job as :class:`pgbg_orchestration.Job` takes it."""
        fields = {"sql": self.sql, "isolation": self.isolation, "settings": self.settings}
        if self.kind != "receipt":
            fields |= {"kind": self.kind, "verify_sql": self.verify_sql}
        if generation is None:
            return {**fields, "id": self.name}
        job_id = f"{self.name}#{generation}"
        sql = ";".join((
            f"insert into spans values ('{self.name}', '{job_id}', clock_timestamp())",
            self.sql if generation == 1 else effect(job_id),
            f"update spans set ended = clock_timestamp() where job = '{job_id}'",
        ))  # fmt: skip
        return {**fields, "sql": sql, "series": self.name, "generation": generation}
