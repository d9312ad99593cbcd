"""A job: SQL to be run once, as one text or a list of statements, with a stable id."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from enum import StrEnum
from functools import cache
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

from .errors import InvalidJob, shorten
from .labels import LABEL_BYTES, shorten_label
from .rows import Fetch

if TYPE_CHECKING:
    from . import statements

QUEUE_BYTES = (4 * 1024, 256 * 1024 * 1024)  # pg_background raises 22023 outside
GENERATIONS = (0, 2**63 - 1)  # bigint
ISOLATIONS = ("read committed", "repeatable read", "serializable")
OWN_SETTINGS = {
    "role": "role=",
    "session_authorization": "role=",
    "default_transaction_isolation": "isolation=",
    "standard_conforming_strings": "E'' strings",
    "pgbg.work": "id=, label= and series=",
}
SETTING_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*\Z")


class Kind(StrEnum):
    """How a job's outcome is made certain (see docs/durability.md)."""

    RECEIPT = "receipt"
    SESSION = "session"
    SUPERVISED = "supervised"


@dataclass(frozen=True)
class Job:
    """One SQL text to be run once.

    Parameters
    ----------
    sql:
        The statements: one text, split as psql would, or a list of such texts. They run in one transaction
        and see each other's rows. What holds no statement (nothing but blanks, comments, semicolons) is left out, in
        a text and in a list; a job of nothing else is refused. A byte-order mark before a statement is dropped.
    id:
        Says which work this is. Whoever runs the same id again attaches to it or gets its outcome; it never
        commits twice. Default: ``series#generation`` where a series is given, else a fresh random id, which
        nobody can attach to after this process is gone.
    label:
        What a person sees on the worker; at most 64 bytes of UTF-8, of which the server shows 49 (fewer where they are
        not ASCII). Default: the id, shortened to what is seen.
    parameters:
        Values for ``%s`` or ``%(name)s`` placeholders, bound on the client with psycopg's own quoting. A ``%`` of the
        SQL is then written ``%%``; without parameters, or with an empty list or mapping, it is an ordinary character.
    settings:
        Server settings for this job's transaction, such as ``{"work_mem": "256MB"}``.
    role:
        Role that the SQL runs as (``SET LOCAL ROLE``); the login must be a member of it.
    isolation:
        ``read committed``, ``repeatable read`` or ``serializable``. Default: what the login's sessions have.
    kind:
        ``receipt``, ``session`` or ``supervised``. Default: ``receipt``, or for a statement that cannot run in
        a transaction block the kind that can carry it. So is a single CALL, whose procedure may commit, unless its
        notices are asked for.
    timeout:
        Seconds, from the call until the outcome, waiting for a slot included. Then the worker is cancelled.
    queue_size:
        Bytes of the worker's output queue, 4 KiB to 256 MiB. Default: the extension's own (64 KiB).
    verify_sql:
        A query that returns true when the work is done. It decides where an outcome would stay unknown. Default:
        for a single CREATE or DROP INDEX CONCURRENTLY of a named index, one that asks the catalog.
    drop_invalid_index:
        Before a CREATE INDEX CONCURRENTLY, drop the invalid index of that name and table that an earlier build left.
        A build that is still at work is waited for, and a valid index is never dropped.
    series:
        What excludes one another: jobs of one series never run at the same time. Default: the id.
    generation:
        Which wanted run of its series this is; a newer one deals with the workers of older ones. Default: the
        order in which the ids of the series were registered.
    owner:
        The role that owns the job's receipt; the login must be a member of it. Default: the login.
    redact_details:
        Of the server's errors keep the SQLSTATE and the names of schema, table, column and constraint only. Message,
        detail, hint and context, which may quote data, are neither raised, logged nor written to the history.
    fetch:
        Keep the rows that the job's last statement gives, beside its receipt, and return them with the outcome: True,
        a :class:`~pgbg_orchestration.rows.Fetch` with bounds, or a mapping of its parameters. Kind receipt only; a
        CALL whose kind is left out is of that kind then, and its procedure may not commit by itself.

    Raises
    ------
    InvalidJob
        A field or a statement cannot be used. Nothing has been launched.
    """

    sql: str | Sequence[str]
    _: KW_ONLY
    id: str | None = None
    label: str | None = None
    parameters: Sequence[Any] | Mapping[str, Any] | None = field(default=None, repr=False)  # they may be secrets
    settings: Mapping[str, str] | None = None
    role: str | None = None
    isolation: str | None = None
    kind: Kind | str | None = None
    timeout: float | None = None
    queue_size: int | None = None
    verify_sql: str | None = None
    series: str | None = None
    generation: int | None = None
    owner: str | None = None
    drop_invalid_index: bool = False
    redact_details: bool = False
    fetch: Fetch | Mapping[str, Any] | bool | None = None
    _kind_was_left: bool = field(init=False, default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("id", "label", "role", "verify_sql", "series", "owner"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        if self.verify_sql is not None:
            self._fill("verify_sql", self.verify_sql.removeprefix("\ufeff"))  # as `sql`, it may come from a file
        if self.series is None and self.generation is not None and self.id is None:
            raise InvalidJob("a generation needs a series (or an id) that it is a generation of")
        if self.generation is not None and not (
            _is_int(self.generation) and GENERATIONS[0] <= self.generation <= GENERATIONS[1]
        ):
            raise InvalidJob(f"generation must be an integer from 0 to 2^63-1, not {self.generation!r}")
        if self.id is None:
            self._fill("id", _default_id(self.series, self.generation))
        if self.label is None:
            self._fill("label", shorten_label(self.id or ""))
        elif len(self.label.encode()) > LABEL_BYTES:
            size = len(self.label.encode())
            raise InvalidJob(f"the label has {size} bytes of UTF-8 and may have {LABEL_BYTES}: {shorten(self.label)!r}")
        if self.series is None:
            self._fill("series", self.id)
        _check_bounds(self.timeout, self.queue_size)
        if self.isolation is not None:
            self._fill("isolation", _isolation(self.isolation))
        self._fill("settings", MappingProxyType(_settings(self.settings)))
        self._fill("parameters", _parameters(self.parameters))
        self._fill("sql", _sql(self.sql))
        self._fill("_kind_was_left", self.kind is None)
        self._fill("kind", self._choose_kind())
        try:
            self._fill("fetch", Fetch.of(self.fetch))
        except ValueError as error:
            raise InvalidJob(str(error), job_id=self.id, label=self.label) from None
        if self.fetch is not None and self.kind is not Kind.RECEIPT:
            raise InvalidJob(
                f"a job of kind {self.kind} keeps no rows: a receipt's own transaction writes them",
                job_id=self.id,
                label=self.label,
                todo="Ask for no rows (fetch, a handler), or have the SQL write to a table.",
            )
        if not isinstance(self.sql, str):
            # What renders to nothing takes no parameters either.
            self._fill("sql", tuple(text for text in self.sql if self.split(text)))

    def _fill(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen for everybody else

    def _choose_kind(self) -> Kind:
        """Refuse SQL that no kind can run, and return the kind that this SQL gets."""
        statements = _statements()
        parts = self.split()
        try:
            wanted = None if self.kind is None else Kind(self.kind)
        except ValueError:
            raise InvalidJob(f"kind must be one of {', '.join(Kind)}, not {self.kind!r}") from None
        alone = len(parts) == 1 and statements.best_alone(parts[0])
        if self.fetch not in (None, False) and _is_call(parts):
            alone = False  # its output is kept beside a receipt, in one transaction
        kind = wanted or (Kind.SUPERVISED if alone else Kind.RECEIPT)
        try:
            statements.check(parts, one_transaction=len(parts) > 1 or kind is Kind.RECEIPT)
        except ValueError as error:
            raise InvalidJob(str(error), job_id=self.id, label=self.label) from error
        if kind is Kind.SESSION and len(parts) > 1:
            raise InvalidJob(
                "a job of kind 'session' is a single statement: several are one transaction, which is kind 'receipt'"
            )
        return kind

    def with_notices(self) -> Job:
        """Return the job as it runs when its notices are asked for.

        A single CALL is supervised, since its procedure may commit, and a supervisor alone has its worker's output.
        Most procedures do not commit. So one whose kind was left to this package carries a receipt then; a procedure
        that does commit fails with 2D000 before its first commit, which no handler in it can catch: PostgreSQL allows
        no COMMIT within a block that has one.
        """
        if self._kind_was_left and self.kind is Kind.SUPERVISED and _is_call(self.split()):
            return replace(self, kind=Kind.RECEIPT)
        return self

    def split(self, bound: str | None = None) -> tuple[statements.Statement, ...]:
        """Return the job's statements, of the SQL as given or of its bound text.

        Raises
        ------
        InvalidJob
            A string, comment or quoted identifier does not end.
        """
        try:
            if bound is not None:
                found: tuple[statements.Statement, ...] = _statements().split(bound)
                return found
            texts = [self.sql] if isinstance(self.sql, str) else self.sql
            return tuple(part for text in texts for part in _statements().split_again(text))
        except ValueError as error:
            raise InvalidJob(str(error), job_id=self.id, label=self.label) from error


@cache
def _statements() -> ModuleType:
    from . import statements  # its patterns cost 30 ms, which whoever only names a Job does not pay

    return statements


SQL_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        f.name: f.default
        for f in fields(Job)
        # Which work it is, what it runs and how long it may take has other names and forms in each surface.
        if f.init and f.name not in ("sql", "parameters", "id", "label", "series", "generation", "owner", "timeout")
    }
)
"""The fields of a job that say how its SQL is run, with their defaults. An orchestrator's operators, triggers and
options pass them on under the same names; tests/unit/test_job_options.py says where each of them is named."""


def _is_call(parts: Sequence[statements.Statement]) -> bool:
    return [part.keywords[:1] for part in parts] == [("CALL",)]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidJob(f"{name} must be text, not {type(value).__name__}")
    if not name.startswith("sql") and not value.strip():
        raise InvalidJob(f"{name} is empty")
    if "\0" in value:
        raise InvalidJob(f"{name} has a NUL byte, which PostgreSQL cannot store")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidJob(f"{name} cannot be written as UTF-8 (character {error.start})") from error


def _check_bounds(timeout: object, queue_size: object) -> None:
    if timeout is not None and not (
        isinstance(timeout, int | float) and not isinstance(timeout, bool) and 0 < timeout < float("inf")
    ):
        raise InvalidJob(f"timeout must be a number of seconds above 0, not {timeout!r}")
    low, high = QUEUE_BYTES
    if queue_size is not None and not (isinstance(queue_size, int) and low <= queue_size <= high):
        raise InvalidJob(f"queue_size must be from {low} to {high} bytes, not {queue_size!r}")


def _default_id(series: str | None, generation: int | None) -> str:
    if series is None:
        return secrets.token_hex(16)
    if generation is None:
        raise InvalidJob("a series needs a generation, or an id for this run of it")
    return f"{series}#{generation}"


def _isolation(value: object) -> str:
    text = str(value).lower().replace("_", " ").strip()
    if text not in ISOLATIONS:
        raise InvalidJob(f"isolation must be one of {', '.join(ISOLATIONS)}, not {value!r}")
    return text


def _settings(given: Mapping[str, str] | None) -> dict[str, str]:
    checked: dict[str, str] = {}
    if given is not None and not isinstance(given, Mapping):
        raise InvalidJob(f"settings must be a mapping of names to values, not {type(given).__name__}")
    for name, value in (given or {}).items():
        if not isinstance(name, str) or not SETTING_NAME.match(name):
            raise InvalidJob(f"{name!r} is not the name of a server setting")
        if not isinstance(value, str | int | float):
            raise InvalidJob(f"the value of the setting {name} must be text or a number, not {type(value).__name__}")
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if "\0" in text:
            raise InvalidJob(f"the setting {name} has a NUL byte")
        if name.lower() in OWN_SETTINGS:
            raise InvalidJob(f"the setting {name} is this package's own: use {OWN_SETTINGS[name.lower()]}")
        checked[name] = text
    return checked


def _parameters(given: Sequence[Any] | Mapping[str, Any] | None) -> Sequence[Any] | Mapping[str, Any] | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        return MappingProxyType(dict(given)) if given else None
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise InvalidJob(f"parameters must be a sequence or a mapping, not {type(given).__name__}")
    return tuple(given) or None


def _sql(given: object) -> str | tuple[str, ...]:
    if isinstance(given, str):
        _check_text("sql", given)
        return given
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise InvalidJob(f"sql must be text or a list of statements, not {type(given).__name__}")
    for number, text in enumerate(given, 1):
        _check_text(f"sql statement {number}", text)
    return tuple(given)
