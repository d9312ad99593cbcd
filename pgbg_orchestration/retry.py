"""What to do about which error, as a table: SQLSTATE -> rule -> decision. No framework, no I/O, no driver import.

Read :data:`RULES` for the defaults, and :meth:`RetryPolicy.decide` for the order in which they are asked. An
orchestrator's package turns the :class:`Decision` into its own words (Airflow's ``RetryDecision``, Dagster's
``RetryRequested``).

The rules follow the PostgreSQL manual, 13.5 "Serialization Failure Handling" and appendix A "PostgreSQL Error Codes".
Messages are localised (``lc_messages``) and decide nothing here; codes do, and the names that an error carries. The one
text that is looked at is an internal message, which PostgreSQL does not translate: see :data:`DDL_MET_DDL`.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from . import errors
from .outcome import ErrorFields


class Action(StrEnum):
    """What the caller should do next."""

    RETRY = "retry"
    """Run the same job again after the delay."""
    FAIL = "fail"
    """Do not run it again: a further try would end the same way, or was not wanted."""
    ATTACH = "attach"
    """Not a failure: run the same job id again at once, which attaches to its worker or reads its receipt."""
    DEFAULT = "default"
    """No rule knows this error: the orchestrator's own settings decide."""


RETRY: Final = Action.RETRY
FAIL: Final = Action.FAIL
ATTACH: Final = Action.ATTACH
DEFAULT: Final = Action.DEFAULT


class Origin(StrEnum):
    """Where an error came from. The same code means another thing in another place."""

    JOB = "job"
    """The worker reported it (``error_info``): it is the error of the job's own SQL."""
    LAUNCH = "launch"
    """The launch call raised it."""
    CONNECTION = "connection"
    """A connection of ours raised it. It tells nothing of the job, which may go on or be committed."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What to do about one SQLSTATE or one class of them.

    Parameters
    ----------
    action:
        What to do.
    why:
        The reason, as half a sentence for the task's log.
    first_delay:
        Seconds before the second try.
    factor:
        By what the delay grows with each further try.
    max_delay:
        Seconds that no delay exceeds.
    jitter:
        The share of the delay, from 0 to 1, that is left to chance, so that jobs which failed together do not meet
        again.
    max_tries:
        Tries in all, the first one included, after which this rule fails the job; None leaves the number to the
        orchestrator.
    look_first:
        Whether the job's receipt has to be looked at before anything runs again: it may be committed. Running the same
        job id through this package does that.
    uses_attempt:
        False when nothing had started, so that the try should not count.

    Raises
    ------
    ValueError
        A number is out of its range.
    """

    action: Action
    why: str = "a rule of yours"
    first_delay: float = 5.0
    factor: float = 2.0
    max_delay: float = 60.0
    jitter: float = 0.5
    max_tries: int | None = None
    look_first: bool = False
    uses_attempt: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "action", Action(self.action))
        if self.first_delay < 0 or self.max_delay < 0:
            raise ValueError("first_delay and max_delay are seconds and cannot be negative")
        if self.factor < 1:
            raise ValueError("factor must be at least 1: a delay does not shrink from try to try")
        if not 0 <= self.jitter <= 1:
            raise ValueError("jitter is a share of the delay, from 0 to 1")
        if self.max_tries is not None and self.max_tries < 1:
            raise ValueError("max_tries counts the first try too, so it is at least 1, or None")

    def delay(self, attempt: int, rng: random.Random) -> float:
        """Return the seconds to wait after try number ``attempt`` (from 1) before the next one."""
        # 2.0 ** 1024 overflows, and max_delay is reached long before.
        grown = self.first_delay * self.factor ** min(attempt - 1, 64)
        return min(self.max_delay, grown) * (1 - self.jitter * rng.random())


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do about one error of one job.

    Attributes
    ----------
    action:
        Retry, fail, attach, or leave it to the orchestrator.
    delay:
        Seconds to wait before the next try; None when there is none, or when the orchestrator's own delay applies.
    reason:
        Why, for the log; it names the SQLSTATE where there is one and never carries the server's message, which can
        hold data.
    sqlstate:
        The SQLSTATE that was judged.
    look_first:
        Whether the receipt must be looked at before anything runs again.
    uses_attempt:
        Whether this try should count.
    why:
        Of a retry: the reason without what comes next, for an orchestrator that has no try left.
    """

    action: Action
    delay: float | None
    reason: str
    sqlstate: str | None = None
    look_first: bool = False
    uses_attempt: bool = True
    why: str | None = None


def _soon(why: str) -> Rule:
    return Rule(RETRY, why, first_delay=0.2, max_delay=5, jitter=1.0, max_tries=6)


def _backoff(why: str, *, max_tries: int | None = None) -> Rule:
    return Rule(RETRY, why, max_tries=max_tries)


def _look(why: str) -> Rule:
    return Rule(RETRY, why, look_first=True)


def _wait(why: str) -> Rule:
    return Rule(RETRY, why, first_delay=15, max_delay=300, uses_attempt=False)


def _fail(why: str) -> Rule:
    return Rule(FAIL, why)


_NO_WAY_TO_TELL = "the commit is unknown until the receipt tells"
_SAME_AGAIN = "it would fail in the same way again"

TOO_MANY_ROWS = "PB005"
"""What the schema raises when a result is larger than ``Job.fetch`` allows."""

RULES: Final[Mapping[str, Rule]] = MappingProxyType(
    {
        # Rolled back by definition: these are answers to running side by side, and the SQL itself is sound.
        "40001": _soon("a serialization failure, rolled back by definition"),
        "40P01": _soon("a deadlock, rolled back by definition"),
        # Something was busy.
        "55P03": _backoff("a lock was busy"),
        "55006": _backoff("an object was in use, which may be permanent", max_tries=4),
        # Something was used up.
        "53000": _wait("a resource of the server is used up (worker slots, most often)"),
        "53300": _wait("the server has no connection left"),
        "53400": _wait("a configured limit is reached"),
        "53200": _backoff("the server was out of memory", max_tries=3),
        "53100": _fail("the disk is full, and one rarely frees itself"),
        # The server could not be reached, so nothing was sent.
        "57P03": _backoff("the server is starting up or shutting down; nothing was sent"),
        "08001": _backoff("no connection could be made; nothing was sent"),
        "08004": _backoff("the server rejected the connection, which may be its configuration; nothing was sent"),
        # The server or the connection went away in the middle.
        "57P01": _look(f"an administrator ended the session or the server; {_NO_WAY_TO_TELL}"),
        "57P02": _look(f"the server crashed; {_NO_WAY_TO_TELL}"),
        "57P05": _look(f"the session was idle for too long; {_NO_WAY_TO_TELL}"),
        "08000": _look(f"the connection failed; {_NO_WAY_TO_TELL}"),
        "08003": _look(f"the connection does not exist; {_NO_WAY_TO_TELL}"),
        "08006": _look(f"the connection was lost; {_NO_WAY_TO_TELL}"),
        "58000": _look(f"the server's system failed; {_NO_WAY_TO_TELL}"),
        "58030": _look(f"the server's input or output failed; {_NO_WAY_TO_TELL}"),
        "08007": _look("how the transaction ended is unknown, so only its receipt can tell"),
        "40003": _look("whether the statement completed is unknown, so only its receipt can tell"),
        # Ended on purpose, or by a limit.
        "57014": _fail(
            "the query was ended by a timeout, or by somebody's cancel or pg_terminate_backend, which a worker reports "
            "alike; a retry of it has to be asked for"
        ),
        "25P03": _fail("the session was idle in a transaction for too long"),
        "25P04": _fail("transaction_timeout passed; a retry of it has to be asked for"),
        "25006": _backoff("the server is read only, as after a failover to a standby; try on a new connection"),
        # Deterministic, or corruption. 23505 and 23P01 can be results of running side by side: users may override them.
        "57P04": _fail("the database was dropped"),
        "08P01": _fail("the protocol was violated"),
        "55000": _fail(f"an object is not in the state that this needs; {_SAME_AGAIN}"),
        "25001": _fail("this cannot run in a transaction that holds anything else: run it alone, as kind='supervised'"),
        "25P01": _fail(f"this needs a transaction of its own kind; {_SAME_AGAIN}"),
        "25P02": _fail("an earlier error had broken the transaction, and the SQL went on all the same; see that error"),
        "2D": _fail("the SQL commits where it may not: run it alone, as kind='supervised'"),
        # A foreign server: HV is SQL/MED's class, which foreign data wrappers raise.
        "HV00N": _backoff("a foreign server could not be reached"),
        "HV001": _backoff("a foreign data wrapper was out of memory", max_tries=3),
        "HV": _fail(f"a foreign data wrapper refused; {_SAME_AGAIN}"),
        "38": _fail(f"a function in another language failed; {_SAME_AGAIN}"),
        "39": _fail(f"a function in another language was called wrongly; {_SAME_AGAIN}"),
        "0A": _fail(f"the server does not support this; {_SAME_AGAIN}"),
        "22": _fail(f"the data does not fit; {_SAME_AGAIN}"),
        "23": _fail(f"a constraint is violated; {_SAME_AGAIN}"),
        "28": _fail(f"the login was refused; {_SAME_AGAIN}"),
        "3D": _fail(f"the database does not exist; {_SAME_AGAIN}"),
        "3F": _fail(f"the schema does not exist; {_SAME_AGAIN}"),
        "42": _fail(f"the SQL or a privilege is wrong; {_SAME_AGAIN}"),
        "54": _fail(f"a limit of PostgreSQL is exceeded; {_SAME_AGAIN}"),
        "P0": _fail(f"the job's own PL/pgSQL raised it; {_SAME_AGAIN}"),
        "XX": _fail("an internal error or corrupted data: an administrator has to look at the server"),
        # This package's own, raised by begin_work and, the last, by keep_chunk.
        "PB001": Rule(ATTACH, "the job has a receipt already: it is a success if that is there", look_first=True),
        "PB002": Rule(ATTACH, "another worker is on it"),
        "PB003": _fail("the job was cancelled, or a newer generation of it is there"),
        TOO_MANY_ROWS: _fail(f"the result is larger than the job may keep; {_SAME_AGAIN}"),
    }
)
"""The default rule of each SQLSTATE (five characters) or class (two)."""

RULES_BY_ORIGIN: Final[Mapping[Origin, Mapping[str, Rule]]] = MappingProxyType(
    {
        Origin.JOB: {
            # The worker had started, so the try counts. These come from what the job's own SQL asked for.
            "53000": _backoff("a resource of the server was used up while the job ran"),
            "53300": _backoff("the job's SQL wanted a connection and the server has none left"),
            "53400": _backoff("the job's SQL reached a configured limit"),
        },
        Origin.LAUNCH: {
            "53100": _wait("the server's shared memory (/dev/shm) is full, and it empties as workers end"),
        },
        Origin.CONNECTION: {
            # A launch call that is cancelled has launched more often than not.
            "57014": _look("a query of ours was cancelled, which says nothing of the job"),
            "25P03": _look("a session of ours was idle in a transaction for too long, which says nothing of the job"),
            "25P04": _look("a transaction of ours took too long, which says nothing of the job"),
            "25P02": _look("a transaction of ours was broken, which says nothing of the job"),
        },
    }
)
"""Where a code means something else than :data:`RULES` says, by where the error came from."""

DDL_MET_DDL: Final = _soon("it met other DDL on the same object of the catalog, and passes at the next try")
"""What to do when two sessions changed the catalog at once: XX000 "tuple concurrently updated" or "… deleted", and a
duplicate key (23505) in an index of the schema pg_catalog, as of two CREATE … IF NOT EXISTS. Rules of one's own for
these codes come first. pg_background 1.x tells no names, and redacted errors no messages: there RULES hold."""

_CATALOG: Final = "pg_catalog"
# Of simple_heap_update, simple_heap_delete and heap_inplace_lock in PostgreSQL's heapam.c, by elog: never translated.
_CONCURRENTLY: Final = frozenset({"tuple concurrently updated", "tuple concurrently deleted"})

_LAUNCHED_NOTHING: Final = frozenset({"53000", "53400", "53100"})
"""The only codes of a failed launch call that prove that it launched nothing."""

_SENT_NOTHING: Final = frozenset({"53300", "57P03", "08001", "08004"})
"""Codes that a connection raises while it is being made, so that no launch can have gone through it."""


@dataclass(frozen=True, slots=True)
class _Own:
    """What one of this package's errors means.

    ``sqlstate`` stands for it where it carries none; ``final`` keeps users' rules away from it.
    """

    sqlstate: str | None
    rule: Rule
    final: bool = False


_OWN: Final[Mapping[type[BaseException], _Own]] = MappingProxyType(
    {
        errors.InvalidJob: _Own(None, _fail("the job was refused as it is written"), final=True),
        errors.JobIdReused: _Own(None, _fail("the job's id stands for other SQL"), final=True),
        errors.JobCancelled: _Own("PB003", _fail("the job was cancelled, on purpose"), final=True),
        errors.Superseded: _Own("PB003", _fail("a newer generation of the job is there"), final=True),
        # Running it again could do the work twice: only a verify_sql can tell, and it was asked by now.
        errors.OutcomeUnknown: _Own(
            None, _fail("how the job ended cannot be told, and it is never run again blindly"), final=True
        ),
        errors.RowsGone: _Own(None, _fail("the job is committed, and its rows are not to be had again"), final=True),
        errors.DeadlinePassed: _Own("57014", _fail("the job's own timeout passed; a retry of it has to be asked for")),
        errors.WorkerLost: _Own(None, _look("the worker is gone and reported no SQLSTATE")),
        errors.StillRunning: _Own(None, _look("a worker could not be ended in time and still runs")),
        errors.SeriesHeld: _Own(None, _look("somebody else's session holds the lock of the series")),
        errors.NoWorkerSlot: _Own("53000", _wait("no worker slot came free in time")),
        errors.LaunchFailed: _Own(None, _look("the launch call failed without a SQLSTATE, and may have launched")),
        errors.ServerUnreachable: _Own("08006", _look("the server did not answer")),
        errors.LedgerError: _Own(None, _fail("the package's own tables were changed or dropped")),
        errors.ReadOnlyServer: _Own("25006", RULES["25006"]),
        errors.ExtensionMissing: _Own(None, _fail("pg_background is not installed in this database")),
        errors.ExtensionTooOld: _Own(None, _fail("pg_background is too old in this database")),
        errors.SchemaMissing: _Own(None, _fail("the package's schema is not installed in this database")),
        errors.SchemaVersionMismatch: _Own(None, _fail("the package's schema is of another version")),
        errors.NoPrivilege: _Own("42501", _fail("the login lacks a privilege")),
        errors.PoolerInTransactionMode: _Own(None, _fail("a pooler in transaction mode breaks handles")),
    }
)

_KEY = re.compile(r"[0-9A-Z]{2}(?:[0-9A-Z]{3})?")


@dataclass(frozen=True)
class RetryPolicy:
    """Decide what to do about an error: the user's rules first, then the defaults.

    Parameters
    ----------
    overrides:
        Rules of one's own, by SQLSTATE (``"55P03"``) or class (``"53"``). A code wins over a class, and any of these
        over the defaults, so ``{"53": …}`` covers all of class 53. They cannot take away a look at the receipt where
        the commit is unknown, nor run a cancelled job or one of unknown outcome again.
    rng:
        Where the jitter comes from; a seeded :class:`random.Random` makes the delays repeatable.

    Raises
    ------
    ValueError
        A key is no SQLSTATE and no class, or is one of this package's own (PB001 to PB003).

    Examples
    --------
    >>> policy = RetryPolicy({"23505": Rule(RETRY, "two loads met", first_delay=1, max_tries=3)})
    >>> policy.decide("23505", 1).action.value
    'retry'
    """

    overrides: Mapping[str, Rule] = field(default_factory=dict)
    rng: random.Random = field(default_factory=random.Random, compare=False, repr=False)

    def __post_init__(self) -> None:
        # A copy, so that the caller's dict can change without changing a policy.
        object.__setattr__(self, "overrides", dict(self.overrides))
        for key in self.overrides:
            if not _KEY.fullmatch(key):
                raise ValueError(
                    f"{key!r} is neither a SQLSTATE (5 characters) nor a class (2): digits and capitals only"
                )
            if key.startswith("PB"):
                raise ValueError(
                    f"{key!r} is how this package's own parts talk to one another and cannot be overridden"
                )

    def decide(
        self,
        error: BaseException | ErrorFields | str,
        attempt: int = 1,
        *,
        origin: Origin | None = None,
    ) -> Decision:
        """Decide what to do about ``error``.

        Parameters
        ----------
        error:
            An error of this package, one of a driver's (with a ``sqlstate``), the fields of a worker's error, or a
            SQLSTATE.
        attempt:
            The number of the try that failed, from 1.
        origin:
            Where the error came from. By default a driver's error came from a connection, a
            :class:`~pgbg_orchestration.errors.LaunchFailed` from the launch call, and all else from the job.

        Returns
        -------
        Decision
            What to do, with a reason that names the SQLSTATE.

        Raises
        ------
        ValueError
            ``attempt`` is less than 1.
        """
        if attempt < 1:
            raise ValueError("attempt counts from 1")
        sqlstate, found, where = self._find(error, origin)
        named = f"SQLSTATE {sqlstate}" if sqlstate else _name_of(error)
        if found is None:
            return Decision(DEFAULT, None, f"{named}: no rule knows it, the orchestrator's settings decide", sqlstate)
        why = found.why
        look_first = found.look_first or (found.action is RETRY and _commit_unknown(sqlstate, where))
        if found.action is not RETRY:
            return Decision(found.action, None, f"{named}: {why}", sqlstate, look_first, found.uses_attempt)
        if found.max_tries is not None and attempt >= found.max_tries:
            return Decision(
                FAIL, None, f"{named}: {why}; that was try {attempt} of {found.max_tries}", sqlstate, look_first
            )
        delay = found.delay(attempt, self.rng)
        first = "looking at the receipt first, " if look_first else ""
        reason = f"{named}: {why}; {first}again in {delay:.1f} s after try {attempt}"
        return Decision(RETRY, delay, reason, sqlstate, look_first, found.uses_attempt, f"{named}: {why}")

    def _find(
        self, error: BaseException | ErrorFields | str, origin: Origin | None
    ) -> tuple[str | None, Rule | None, Origin]:
        """Return the SQLSTATE of ``error``, the rule for it, and where the error came from."""
        if isinstance(error, str):
            return error, self._rule_of(error, origin or Origin.JOB), origin or Origin.JOB
        if isinstance(error, ErrorFields):
            where = origin or Origin.JOB
            return error.sqlstate, self._rule_of_fields(error, where), where
        if isinstance(error, errors.WorkerError):
            # Whoever ran the job has looked by now and found no receipt: a PB code here was raised by the job's own
            # SQL, and what that means only its author knows.
            raised_by_user = error.sqlstate is not None and error.sqlstate.startswith("PB")
            raised_by_user = raised_by_user and error.sqlstate != TOO_MANY_ROWS
            return (
                error.sqlstate,
                None if raised_by_user else self._rule_of_fields(error.fields, Origin.JOB),
                Origin.JOB,
            )
        if isinstance(error, errors.PgbgError):
            return self._own_rule(error, origin)
        where = origin or Origin.CONNECTION
        sqlstate = getattr(error, "sqlstate", None)
        if isinstance(sqlstate, str):
            return sqlstate, self._rule_of(sqlstate, where), where
        # libpq gives no SQLSTATE when it cannot connect or finds the connection gone.
        return None, RULES["08006"] if _is_lost_connection(error) else None, where

    def _own_rule(self, error: errors.PgbgError, origin: Origin | None) -> tuple[str | None, Rule | None, Origin]:
        is_launch = isinstance(error, errors.LaunchFailed)
        where = origin or (Origin.LAUNCH if is_launch else Origin.JOB)
        own = next((_OWN[kind] for kind in type(error).__mro__ if kind in _OWN), None)
        if own is None:
            return error.sqlstate, self._rule_of(error.sqlstate, where), where
        sqlstate = error.sqlstate or own.sqlstate
        if own.final:
            return sqlstate, own.rule, where
        if is_launch and sqlstate is not None:
            return sqlstate, self._rule_of(sqlstate, where), where
        return sqlstate, _match(self.overrides, sqlstate) or own.rule, where

    def _rule_of_fields(self, fields: ErrorFields, origin: Origin) -> Rule | None:
        if _is_ddl_met_ddl(fields):
            return _match(self.overrides, fields.sqlstate) or DDL_MET_DDL
        return self._rule_of(fields.sqlstate, origin)

    def _rule_of(self, sqlstate: str | None, origin: Origin) -> Rule | None:
        """Return the first rule that matches: the user's, then the origin's, then the defaults."""
        tables = (self.overrides, RULES_BY_ORIGIN[origin], RULES)
        return next((rule for table in tables if (rule := _match(table, sqlstate))), None)


def _match(table: Mapping[str, Rule], sqlstate: str | None) -> Rule | None:
    if not sqlstate:
        return None
    return table.get(sqlstate) or table.get(sqlstate[:2])


def _is_ddl_met_ddl(fields: ErrorFields) -> bool:
    if fields.sqlstate == "XX000":
        return fields.message in _CONCURRENTLY
    return fields.sqlstate == "23505" and fields.schema_name == _CATALOG and fields.constraint_name is not None


def _commit_unknown(sqlstate: str | None, origin: Origin) -> bool:
    """Tell whether the job may be committed although this error was seen, whatever a user's rule says."""
    if origin is Origin.JOB:
        default = _match(RULES, sqlstate)
        return default is not None and default.look_first
    # A launch call that fails with any other code may have launched.
    return sqlstate not in _LAUNCHED_NOTHING | _SENT_NOTHING


def _is_lost_connection(error: BaseException) -> bool:
    """Tell whether ``error`` is psycopg's word for a connection that failed, without importing psycopg."""
    # An error of psycopg's can only be met where psycopg is imported already; importing it here would cost every DAG
    # file 64 ms.
    psycopg = sys.modules.get("psycopg")
    return psycopg is not None and isinstance(error, psycopg.OperationalError)


def _name_of(error: BaseException | ErrorFields | str) -> str:
    return type(error).__name__ if isinstance(error, BaseException) else "No SQLSTATE"


__all__ = [
    "ATTACH",
    "DDL_MET_DDL",
    "DEFAULT",
    "FAIL",
    "RETRY",
    "RULES",
    "RULES_BY_ORIGIN",
    "Action",
    "Decision",
    "Origin",
    "RetryPolicy",
    "Rule",
]
