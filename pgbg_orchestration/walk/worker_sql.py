"""From a job to the text that its worker runs: parameters bound, statements joined, the receipt in front.

Here stands how the kinds of job differ in that text, and in the settings of their launch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import chain
from types import MappingProxyType
from typing import Any, TypedDict

import psycopg
from psycopg import AsyncClientCursor, AsyncConnection, sql

from pgbg_orchestration import pace, statements
from pgbg_orchestration.errors import InvalidJob, NoPrivilege
from pgbg_orchestration.job import Job, Kind
from pgbg_orchestration.labels import NAME_BYTES, shorten_label
from pgbg_orchestration.ledger.sighting import SUPERVISES, Key, Registration
from pgbg_orchestration.outcome import WITHHELD, ErrorFields
from pgbg_orchestration.postgres import catalog, literals, markers
from pgbg_orchestration.postgres.durations import milliseconds
from pgbg_orchestration.postgres.launch_message import LaunchText
from pgbg_orchestration.postgres.pg_background import DEFAULT_QUEUE_BYTES
from pgbg_orchestration.rows import Fetch
from pgbg_orchestration.statements import index_builds
from pgbg_orchestration.statements.row_source import row_source
from pgbg_orchestration.threads import off_loop

from . import kept_rows, location

# Overridden by the job's own settings.
BASE_SETTINGS: Mapping[str, str] = {
    # NOTICEs that nobody reads would fill the worker's queue, and block it for ever.
    "client_min_messages": "warning",
    # statements.split() takes a backslash in a plain string for itself.
    "standard_conforming_strings": "on",
}


WORK = "pgbg.work"
"""The setting in which a worker finds what it is to write into its receipt."""

# A supervisor writes down how its worker ended: a timeout of the worker's must not end it too, and it must be able to
# write where the worker is read only.
SUPERVISOR_SETTINGS: Mapping[str, str] = {
    "statement_timeout": "0",
    "pg_background.worker_timeout": "0",
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
}


MOST_OF_A_STATEMENT = 10_000  # characters of a job's SQL that the history keeps
PADDING = statements.SEPARATOR.rstrip(";")


@dataclass(frozen=True, slots=True)
class Work:
    """A job bound for one database: its key, its statements with parameters in, and their digest.

    Attributes
    ----------
    applied:
        What its own SET statements set that counts in a worker only if it is set at the launch.
    gives_rows:
        Its last statement may give rows.
    kept:
        The statements whose rows are kept.
    is_streamed:
        Its rows are read as they come.
    may_number:
        Every role may run the block that tells which statement is at work.
    progress_function:
        The extension's function that keeps what a worker reports of its progress.
    adds_supervisor:
        It writes its own receipt, and a supervisor was asked for all the same.
    """

    job: Job
    key: Key
    kind: Kind
    label: str
    statements: tuple[statements.Statement, ...]
    sql_digest: bytes
    applied: Mapping[str, str]
    gives_rows: bool
    kept: tuple[kept_rows.RowPlan, ...] = ()
    is_streamed: bool = False
    may_number: bool = False
    progress_function: str | None = None
    adds_supervisor: bool = False

    @property
    def carries_receipt(self) -> bool:
        """Whether there is a receipt to look for: of the worker, or of its supervisor."""
        return self.kind is not Kind.SESSION

    @property
    def has_supervisor(self) -> bool:
        """Whether a second worker launches the one that runs the SQL, and has its handle."""
        return self.adds_supervisor or self.kind is Kind.SUPERVISED

    @property
    def slots(self) -> int:
        """How many worker slots it takes at once: its worker's, a supervisor's, and one where a statement needs it."""
        return 1 + self.has_supervisor + any(map(statements.takes_slot, self.statements))

    @property
    def is_marked(self) -> bool:
        """Whether its worker is found by its marker, since it holds no lock."""
        return self.kind is not Kind.RECEIPT

    @property
    def is_padded(self) -> bool:
        """Whether a statement without rows is put behind the job's last one, which may give some.

        A worker sends the rows of its last statement only. So none are sent, which nobody would read, and the tag of
        the job's statement still tells their number.
        """
        return self.gives_rows and not self.kept and not self.is_streamed

    @property
    def makes_table(self) -> bool:
        """Whether its last statement is a CREATE or a REFRESH: such gives no rows, and may have a count of them.

        That count is in the handle's report. The tag in a result lacks it, or has another form (``SELECT 9``).
        """
        return self.statements[-1].keywords[:1] in (("CREATE",), ("REFRESH",))

    @property
    def is_counted(self) -> bool:
        """Whether handle and result have the count and tag of the job's SQL, not of statements that keep its rows."""
        return not self.kept and not self.is_streamed

    @property
    def size(self) -> int:
        """How many characters its statements have."""
        return sum(len(statement.text) for statement in self.statements)

    @property
    def statement(self) -> str | None:
        """The SQL as it was given, for the history: never a parameter's value. None for a job that hides details."""
        if self.job.redact_details:
            return None
        text = self.job.sql if isinstance(self.job.sql, str) else ";\n".join(self.job.sql)
        left = len(text) - MOST_OF_A_STATEMENT
        return text if left <= 0 else f"{text[:MOST_OF_A_STATEMENT]}\n... and {left} characters more"

    @property
    def verify_sql(self) -> str | None:
        """The query that tells whether the work is done: the job's own, or one of the catalog; None without one."""
        return self.job.verify_sql or index_builds.verify_sql(self.statements, tuple(self.job.settings or ()))

    @property
    def marker(self) -> str:
        """What the name of a worker without a lock begins with; the same for all runs of one id."""
        return markers.marker(self.key.owner, self.key.job_id)

    @property
    def worker_name(self) -> str:
        """The ``application_name`` of a worker without a lock: its marker, and its label for people."""
        return markers.worker_name(self.key.owner, self.key.job_id, self.label)

    @property
    def raises_numbers(self) -> bool:
        """Whether its worker tells which of its statements is at work."""
        number = len(self.statements)
        room = (self.job.queue_size or DEFAULT_QUEUE_BYTES) // 2
        if not self.may_number or self.has_supervisor:
            return False  # what is raised comes to its supervisor, which passes nothing on
        return 1 < number <= location.MOST and number * location.BYTES <= room

    @property
    def reports_numbers(self) -> bool:
        """Whether its worker reports the statement at work as its progress: not where the SQL reports its own."""
        if self.progress_function is None or "$$" in self.progress_function or len(self.statements) < 2:
            return False
        own = self.progress_function.rpartition(".")[2].strip('"')
        return not any(own in part.text for part in self.statements)

    def bodies(self, schema: str) -> list[str]:
        """Return what stands in the worker's text for each statement."""
        if not self.kept or not isinstance(self.job.fetch, Fetch):
            return [part.text for part in self.statements]
        keep = sql.SQL("select {}({}, {}").format(
            sql.Identifier(schema, "keep_table"), _literal(self.key.owner), _literal(self.key.job_id)
        )
        texts = kept_rows.texts(self.statements, self.kept, self.job.fetch, keep.as_string(None))
        return [statements.SEPARATOR.join(lines) for lines in texts]

    def body(self, schema: str) -> str:
        """Return the part of the worker's text that the job's statements make."""
        return self._joined(self.bodies(schema))

    @property
    def numbers_up_to(self) -> int | None:
        """Of how many statements its worker reports which one is at work; None where it does not."""
        return len(self.statements) if self.reports_numbers else None

    @property
    def bare(self) -> str:
        """The job's statements without a receipt, as workers of other kinds than receipt run them."""
        return self._joined([part.text for part in self.statements])

    def _joined(self, bodies: Sequence[str]) -> str:
        progress_function = self.progress_function if self.reports_numbers else None
        if progress_function is None and not self.raises_numbers:
            return statements.SEPARATOR.join(bodies)
        return location.numbered(bodies, raised=self.raises_numbers, progress_function=progress_function)

    def telling(self, fields: ErrorFields) -> ErrorFields:
        """Return what may be told of a server's error."""
        return fields.redacted() if self.job.redact_details else fields

    def server_text(self, error: BaseException) -> str:
        """Return the text of an error as far as it may be shown: it may be the server's, and quote data."""
        if self.job.redact_details:
            return WITHHELD
        primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
        return (primary or str(error)).strip() or type(error).__name__

    def supervisor(
        self, schema: str, registration: Registration, text: str, calls: Sequence[str], settings: Mapping[str, str]
    ) -> str:
        """Return what the supervisor runs: a single statement, which can commit.

        Parameters
        ----------
        schema:
            Name of the package's schema.
        registration:
            The registered launch.
        text:
            What the worker below it runs.
        calls:
            pg_background's statements, from ``Extension.supervision``.
        settings:
            The settings of the worker below it.
        """
        if not self.adds_supervisor:
            unregistered = self.supervisor_text(schema, text, calls, settings)
            return unregistered.of(registration.generation, registration.attempt)
        settings = {**settings, WORK: self._arguments(registration)}
        kept = next((one.number for one in self.kept if one.number == len(self.statements)), None)
        queue_size = self.job.queue_size or DEFAULT_QUEUE_BYTES
        call = sql.SQL("call {}({}, {}::text[], {}::text[], {}, {})").format(
            sql.Identifier(schema, "watch"),
            _literals(self.key.owner, self.key.job_id, self.label, registration.attempt, text, queue_size),
            _array(*chain(*settings.items())), _array(*calls), sql.Literal(self.job.redact_details), sql.Literal(kept),
        )  # fmt: skip
        return call.as_string(None)

    def supervisor_text(self, schema: str, text: str, calls: Sequence[str], settings: Mapping[str, str]) -> LaunchText:
        """Return what the supervisor of a job of kind supervised runs, for a launch that is not registered yet."""
        head = sql.SQL("call {}({}, ").format(
            sql.Identifier(schema, "supervise"), _literals(self.key.owner, self.key.job_id, self.key.series)
        )
        queue_size = self.job.queue_size or DEFAULT_QUEUE_BYTES
        tail = sql.SQL(", {}, {}::text[], {}::text[], {})").format(
            _literals(self.sql_digest, text, queue_size, self.job.role, self.worker_name),
            _array(*chain(*settings.items())), _array(*calls), sql.Literal(self.job.redact_details),
        )  # fmt: skip
        middle = sql.SQL(", {}, ").format(_literal(self.label))
        return LaunchText(head.as_string(None), middle.as_string(None), tail.as_string(None))

    def text(self, schema: str) -> str:
        """Return what a worker runs that writes its own receipt: a short line, and the job's SQL.

        Short, because ``pg_stat_activity`` shows the beginning only (``track_activity_query_size``).

        Parameters
        ----------
        schema:
            Name of the package's schema.
        """
        head = [f"/* {_in_comment(self.label)} */ select {_begin_job(schema)}()"]
        if self.kept:
            head.append(kept_rows.BEFORE_ALL)
        if self.job.role is not None:
            head.append(sql.SQL("set local role {}").format(sql.Identifier(self.job.role)).as_string(None))
        return "\n;".join([*head, self.body(schema)]) + (PADDING if self.is_padded else "")

    def launch_settings(
        self, seconds_left: float | None, defaults: Mapping[str, str], registration: Registration | None
    ) -> dict[str, str]:
        """Return the settings of a launch: those of the work, or of its supervisor.

        Parameters
        ----------
        seconds_left, defaults:
            As in `settings`.
        registration:
            The registered launch; a worker that writes its own receipt reads it from there.
        """
        if self.kind is Kind.SESSION:
            return self.settings(seconds_left, defaults)
        if not self.has_supervisor:
            assert registration is not None
            return {**self.settings(seconds_left, defaults), WORK: self._arguments(registration)}
        return {
            **BASE_SETTINGS,
            **SUPERVISOR_SETTINGS,
            "application_name": SUPERVISES + shorten_label(self.label, NAME_BYTES - len(SUPERVISES)),
        }

    def _arguments(self, registration: Registration) -> str:
        return self.arguments().of(registration.generation, registration.attempt)

    def arguments(self) -> LaunchText:
        """Return the arguments of ``begin_job``, which reads them from the setting ``WORK``."""
        key = [_as_json(part) for part in (self.key.owner, self.key.job_id, self.key.series)]
        label = _as_json(self.label)
        # The schema could compute digests and locks itself, which would be a good part of a short job's time.
        job, series = self.key.digests
        assert series is not None
        digests = ", ".join(f'"{digest.hex()}"' for digest in (self.sql_digest, job, series))
        locks = ", ".join(map(str, self.key.locks))
        tail = f', {digests}, {locks}, "{markers.marker(self.key.owner, self.key.job_id)}"]'
        return LaunchText(f"[{', '.join(key)}, ", f", {label}, ", tail)

    def meaning(self) -> dict[str, str]:
        """Return the settings that the meaning of the statements may depend on, the role included."""
        role = {"role": self.job.role} if self.job.role else {}
        return {**BASE_SETTINGS, **(self.job.settings or {}), **role}

    def settings(self, seconds_left: float | None, defaults: Mapping[str, str]) -> dict[str, str]:
        """Return the settings of the work.

        Parameters
        ----------
        seconds_left:
            The time until the job's deadline.
        defaults:
            The values of the two timeouts that the login has where the job sets none.
        """
        settings = dict(BASE_SETTINGS)
        if self.job.isolation is not None:
            settings["default_transaction_isolation"] = self.job.isolation
        if seconds_left is not None:
            # The server ends the SQL then, should nobody be left to cancel it.
            bound = int((max(seconds_left, 0) + pace.DEADLINE_MARGIN) * 1000)
            settings["pg_background.worker_timeout"] = str(min(bound, 2**31 - 1))
        settings |= self.job.settings or {}
        settings |= self.applied  # as in psql, where the SQL's own SET comes last
        # In a worker worker_timeout takes the place of statement_timeout, even of a shorter one.
        clock = {**defaults, **settings}
        statement = milliseconds(clock.get("statement_timeout", "0")) or 0
        if 0 < statement < (milliseconds(clock.get("pg_background.worker_timeout", "0")) or 0):
            settings["pg_background.worker_timeout"] = clock["statement_timeout"]
        if self.kind is Kind.SESSION:
            settings["application_name"] = self.worker_name  # by which the worker is found, and cancelled
        return settings

    def limits(self, defaults: Mapping[str, str]) -> dict[str, float]:
        """Return the timeouts in force for the SQL, but for the job's own deadline, in seconds by name.

        Parameters
        ----------
        defaults:
            As in `settings`.
        """
        clock = {**defaults, **self.settings(None, defaults)}
        known = {name: milliseconds(clock.get(name, "0")) or 0 for name in defaults}
        return {name: value / 1000 for name, value in known.items() if value}


async def bind(
    job: Job,
    conn: AsyncConnection[Any] | None,
    login: str,
    *,
    may_number: bool = False,
    progress_function: str | None = None,
) -> Work:
    """Bind a job's parameters with psycopg's own quoting, and check its role.

    Parameters
    ----------
    conn:
        A connection to the database that the job is for. None for a job with neither parameters, role, owner nor rows
        to keep.
    login:
        The ``session_user`` there.
    may_number, progress_function:
        As in :class:`Work`.

    Raises
    ------
    InvalidJob
        Parameters and placeholders do not fit, or a role does not exist. Nothing has been launched.
    NoPrivilege
        The login is no member of the role or of the owner.
    """
    work = await off_loop(
        _size(job), lambda: _bound(job, conn, login, may_number=may_number, progress_function=progress_function)
    )
    if conn is not None and job.role is not None:
        await _check_role(job, conn)
    if conn is not None and job.owner is not None:
        await _check_owner(job, conn)
    if conn is None or not isinstance(job.fetch, Fetch):
        return work
    return replace(work, kept=await kept_rows.plan(job, job.fetch, work.statements, conn, work.meaning()))


def _size(job: Job) -> int:
    texts = [job.sql] if isinstance(job.sql, str) else job.sql
    values = job.parameters.values() if isinstance(job.parameters, Mapping) else job.parameters or ()
    return sum(map(len, texts)) + sum(len(value) for value in values if isinstance(value, Sized))


def _bound(
    job: Job, conn: AsyncConnection[Any] | None, login: str, *, may_number: bool, progress_function: str | None
) -> Work:
    """Return the job's work, its parameters in; of the connection only the encoding is used."""
    if job.parameters is None:
        parts = job.split()  # the job has checked them
    else:
        assert conn is not None
        texts = [job.sql] if isinstance(job.sql, str) else list(job.sql)
        cursor = AsyncClientCursor(conn)
        literals.register(cursor)
        values = literals.bound(literals.literals_of(job.parameters, texts, job_id=job.id, label=job.label))
        try:
            texts = [cursor.mogrify(text, values) for text in texts]
        except (psycopg.Error, TypeError, ValueError, IndexError, KeyError) as error:
            # Its own message is about placeholders and types, never about values.
            raise InvalidJob(f"the parameters do not fit the SQL: {error}", job_id=job.id, label=job.label) from error
        parts = tuple(part for text in texts for part in job.split(text))
        try:
            statements.check(parts, one_transaction=len(parts) > 1 or job.kind is Kind.RECEIPT)
        except ValueError as error:
            raise InvalidJob(str(error), job_id=job.id, label=job.label) from error
    assert job.id  # the job filled in what was not given
    assert job.series
    assert job.label
    return Work(
        job=job,
        key=Key(job.owner or login, job.id, job.series),
        kind=Kind(job.kind or Kind.RECEIPT),
        label=job.label,
        statements=parts,
        **_read(parts, again=job.parameters is None),
        may_number=may_number,
        progress_function=progress_function,
    )


def _read(parts: tuple[statements.Statement, ...], *, again: bool) -> _Reading:
    """Return what follows from statements alone; from a cache, where (``again``) the same texts may come again."""
    short = again and sum(len(part.text) for part in parts) <= statements.CACHED_CHARACTERS
    return _read_again(parts) if short else _read_once(parts)


class _Reading(TypedDict):
    sql_digest: bytes
    applied: Mapping[str, str]
    gives_rows: bool


def _read_once(parts: tuple[statements.Statement, ...]) -> _Reading:
    return {
        "sql_digest": hashlib.sha256(";".join(part.text for part in parts).encode()).digest(),
        "applied": MappingProxyType(statements.applied(parts)),
        "gives_rows": _gives_rows(parts[-1]),
    }


_read_again = lru_cache(maxsize=statements.CACHED_TEXTS)(_read_once)


def _gives_rows(last: statements.Statement) -> bool:
    if statements.best_alone(last):
        return False
    return row_source(last) is not None or last.keywords[:1] in (("FETCH",), ("EXECUTE",))


async def _check_role(job: Job, conn: AsyncConnection[Any]) -> None:
    # Without a receipt of its own a worker starts as the role: the login needs the role's rights to read and detach it.
    inherits = () if job.kind is Kind.RECEIPT else ("USAGE",)
    # Since 16 each grant of a role says whether its member may SET ROLE to it.
    how = (*inherits, "SET" if conn.info.server_version >= 160000 else "MEMBER")
    await _check_membership(job, conn, job.role or "", how, "become")


async def _check_owner(job: Job, conn: AsyncConnection[Any]) -> None:
    await _check_membership(job, conn, job.owner or "", ("MEMBER",), "own a job as")


async def _check_membership(job: Job, conn: AsyncConnection[Any], role: str, how: Sequence[str], what: str) -> None:
    named = {"job_id": job.id, "label": job.label}
    try:
        has, login = await catalog.membership(conn, role, how)
    except psycopg.errors.UndefinedObject as error:
        raise InvalidJob(f"there is no role {role!r}", sqlstate="42704", **named) from error
    if not has:
        options = [name for need, name in (("USAGE", "INHERIT TRUE"), ("SET", "SET TRUE")) if need in how]
        todo = f"GRANT {sql.Identifier(role).as_string(None)} TO {login}"
        if "SET" in how:
            todo += f" WITH {', '.join(options)}"
        elif options:
            todo += f"; ALTER ROLE {login} INHERIT"
        raise NoPrivilege(f"the login cannot {what} the role {role!r}", sqlstate="42501", todo=f"{todo};", **named)


_as_json = json.JSONEncoder(ensure_ascii=False).encode


@cache
def _begin_job(schema: str) -> str:
    return sql.Identifier(schema, "begin_job").as_string(None)


def _in_comment(label: str) -> str:
    """Return a label for a comment: it must not end it, begin another one, or break the line."""
    printable = label if label.isprintable() else "".join(char if char.isprintable() else " " for char in label)
    return printable.replace("*/", "* /").replace("/*", "/ *")


def _literals(*values: object) -> sql.Composable:
    return sql.SQL(", ").join(map(_literal, values))


@lru_cache  # most jobs have the same settings and calls
def _array(*texts: str) -> sql.SQL:
    return sql.SQL(sql.Literal([*texts]).as_string(None))


def _literal(value: object) -> sql.Composable:
    if isinstance(value, bytes):
        return sql.SQL("pg_catalog.decode({}, 'hex')").format(sql.Literal(value.hex()))
    return sql.Literal(value)
