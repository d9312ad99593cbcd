"""What users say about a job, and the core's job that it becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from pgbg_orchestration import Fetch, Job, Kind
from pgbg_orchestration.labels import shorten_label

from .identity import Identity


class JobOptions(TypedDict, total=False):
    """Options of a job; :class:`pgbg_orchestration.Job` tells what each means."""

    parameters: Sequence[Any] | Mapping[str, Any] | None
    label: str | None
    settings: Mapping[str, str] | None
    role: str | None
    isolation: str | None
    kind: Kind | str | None
    timeout: float | None
    queue_size: int | None
    verify_sql: str | None
    redact_details: bool
    drop_invalid_index: bool
    fetch: Fetch | Mapping[str, Any] | bool | None


@dataclass(frozen=True)
class Sql:
    """SQL with what belongs to it.

    Parameters
    ----------
    text:
        The statements: one text, or a list of statements. They run in one transaction.
    parameters:
        Values for its ``%s`` or ``%(name)s`` placeholders. Empty ones are none: ``%`` is an ordinary character then.
    options:
        Further options of the job, as :class:`JobOptions` names them.
    """

    text: str | Sequence[str]
    parameters: Sequence[Any] | Mapping[str, Any] | None = None
    options: JobOptions = field(default_factory=JobOptions)

    @classmethod
    def of(cls, given: SqlLike, options: JobOptions | None = None) -> Sql:
        """Return what a user gave as one thing.

        Parameters
        ----------
        given:
            SQL as text, a list of statements, a tuple of either and its parameters, or an ``Sql``.
        options:
            Options of the job; those that an ``Sql`` brings along win.

        Returns
        -------
        Sql
            The SQL with all of its options.

        Raises
        ------
        TypeError
            It is none of these.
        """
        if isinstance(given, cls):
            sql = given
        elif isinstance(given, str):
            sql = cls(given)
        elif isinstance(given, tuple) and len(given) == 2 and not isinstance(given[1], str):
            sql = cls(given[0], given[1])
        elif isinstance(given, list) and all(isinstance(part, str) for part in given):
            sql = cls(given)
        else:
            raise TypeError(
                f"expected SQL: text, a list of statements, a tuple (SQL, parameters) or Sql(...), "
                f"not {type(given).__name__}"
            )
        return cls(sql.text, sql.parameters, JobOptions(**{**(options or {}), **sql.options}))

    @property
    def shown(self) -> str:
        """The SQL as people see it, without the values of its parameters."""
        return self.text if isinstance(self.text, str) else ";\n".join(self.text)

    def job(self, *, job_id: str, series: str, label: str, owner: str | None) -> Job:
        """Make the core's job of it.

        Parameters
        ----------
        job_id, series:
            Which work this is, and what it excludes.
        label:
            What a person is to see, where the options have no label; shortened to what is seen.
        owner:
            Role that owns the receipt; None for the login.

        Returns
        -------
        Job
            The job, checked and not yet bound.

        Raises
        ------
        InvalidJob
            A field or a statement cannot be used.
        """
        options: dict[str, Any] = {"parameters": self.parameters, **self.options}
        if isinstance(options["parameters"], Sequence | Mapping) and not options["parameters"]:
            options["parameters"] = None  # none at all: a percent sign stays what it is
        options["label"] = options.get("label") or shorten_label(label)
        return Job(self.text, id=job_id, series=series, owner=owner, **options)


SqlLike = str | list[str] | tuple[str | Sequence[str], Sequence[Any] | Mapping[str, Any]] | Sql


def label_for(identity: Identity, name: str | None) -> str:
    """Return what a person is to see on the worker: the job's own name first."""
    return f"{name}: {identity.label}" if name else identity.label
