"""The same literal reaches the server from every mode of a task: psycopg's own, whatever Airflow's serialisers do."""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import ipaddress
import json
import uuid
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import msgspec
import pendulum
import psycopg
import pytest
from airflow.models.trigger import Trigger
from airflow.sdk import DAG, task
from airflow.sdk.exceptions import AirflowNotFoundException, TaskDeferred
from airflow.serialization.serialized_objects import BaseSerialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.types.json import Json, Jsonb, JsonDumper
from psycopg.types.multirange import Multirange
from psycopg.types.range import Range

from airflow_provider import events
from airflow_provider.arguments import job_of
from airflow_provider.hook import PgBackgroundHook
from airflow_provider.operators import PgBackgroundBatchOperator, PgBackgroundOperator
from airflow_provider.sensors import PgBackgroundSensor
from airflow_provider.triggers import PgBackgroundBatchTrigger, PgBackgroundStartTrigger, PgBackgroundTrigger
from pgbg_orchestration import errors
from pgbg_orchestration.postgres.literals import literals_of
from pgbg_orchestration.walk import worker_sql
from tests.core.kit import count

pytestmark = [
    pytest.mark.airflow,
    pytest.mark.servers("real", "embedded"),
    pytest.mark.filterwarnings("ignore:Task .* was never mapped"),
]

SQL = "select %(value)s"
TRIGGERS: dict[str, Any] = {
    f"airflow_provider.triggers.{kind.__name__}": kind
    for kind in (PgBackgroundTrigger, PgBackgroundBatchTrigger, PgBackgroundStartTrigger)
}


class Colour(enum.Enum):
    """A plain enum: psycopg writes its name."""

    RED = 1


class Text(str):
    """A text of one's own."""


class Number(int):
    """A number of one's own."""


def _context(template: Any = None) -> Any:
    told = {"dag_id": "books", "run_id": "q1", "task_id": "t", "map_index": -1, "start_date": dt.datetime.now(dt.UTC)}
    return {"ti": MagicMock(try_number=1, max_tries=0, **told), "task_state_store": {"pgbg_first_run": 1}}


@pytest.fixture(autouse=True)
def _connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PgBackgroundHook, "check", lambda _self: None)


def _stored(path: str, arguments: dict[str, Any]) -> Any:
    """What a triggerer makes of the row that Airflow stores."""
    return TRIGGERS[path](**Trigger._decrypt_kwargs(Trigger.encrypt_kwargs(arguments)))


def _deferred(operator: Any) -> Any:
    with pytest.raises(TaskDeferred) as caught:
        operator.execute(_context())
    return _stored(*caught.value.trigger.serialize())


def _own_process(value: Any) -> Any:
    operator: Any = PgBackgroundOperator(task_id="t", sql=SQL, parameters={"value": value}, deferrable=False)
    found: list[Any] = []
    operator._do_here = found.append
    operator.execute_complete = lambda *_: {}
    operator.execute(_context())
    return found[0].job


def _in_a_trigger(value: Any) -> Any:
    return _deferred(PgBackgroundOperator(task_id="t", sql=SQL, parameters={"value": value}, deferrable=True)).job


def _in_a_batch(value: Any) -> Any:
    operator = PgBackgroundBatchOperator(
        task_id="t", jobs={"a": {"sql": SQL, "parameters": {"value": value}}}, deferrable=True
    )
    return _deferred(operator).jobs["a"]


def _of_a_batchs_default(value: Any) -> Any:
    operator = PgBackgroundBatchOperator(task_id="t", jobs={"a": SQL}, parameters={"value": value}, deferrable=True)
    return _deferred(operator).jobs["a"]


def _mapped(value: Any) -> Any:
    with DAG("d", schedule=None):
        mapped = PgBackgroundOperator.partial(task_id="t", sql=SQL, deferrable=True).expand(
            parameters=[{"value": value}]
        )
    return _deferred(mapped.unmap({"parameters": {"value": value}})).job


def _decorated(value: Any) -> Any:
    @task.pg_background(deferrable=True)
    def compose() -> Any:
        return SQL, {"value": value}

    with DAG("d", schedule=None):
        operator = compose().operator  # type: ignore[attr-defined]
    return _deferred(operator).job


def _try() -> Any:
    return SimpleNamespace(
        dag_id="books", run_id="q1", task_id="t", map_index=-1, try_number=1, id=uuid.UUID(int=7 << 76)
    )


def _begun(operator: Any, context: Any) -> Any:
    """The trigger of a task that never was on a worker, rendered as a triggerer does."""
    told = operator.start_trigger_args
    # The scheduler stores them as the DAG has them.
    trigger = _stored(told.trigger_cls, json.loads(json.dumps(BaseSerialization.serialize(told.trigger_kwargs))))
    trigger.task_instance = _try()
    for name in ("sql", "parameters", "settings"):
        setattr(trigger, name, operator.render_template(getattr(trigger, name), context))
    return trigger


def _from_the_start(value: Any) -> Any:
    operator = PgBackgroundOperator(task_id="t", sql=SQL, parameters={"value": value}, start_from_trigger=True)
    trigger = _begun(operator, {})
    done = trigger.work(SimpleNamespace(run=_refuse))
    with pytest.raises(errors.JobCancelled):
        asyncio.run(done)
    return trigger.job


async def _refuse(*_: Any, **__: Any) -> Any:
    raise errors.JobCancelled("what it would run is all that is wanted")


MODES: dict[str, Callable[[Any], Any]] = {
    "own process": _own_process,
    "deferred": _in_a_trigger,
    "batch": _in_a_batch,
    "a batch's default": _of_a_batchs_default,
    "mapped": _mapped,
    "@task": _decorated,
    "start_from_trigger": _from_the_start,
}


@pytest.fixture(scope="module")
def connection(request: pytest.FixtureRequest, server: Any) -> Iterator[psycopg.Connection[Any]]:
    with server.connect() as connected:
        connected.adapters.register_dumper(dict, JsonDumper)  # what "dict as Json" means
        yield connected


def _by_psycopg(connection: psycopg.Connection[Any], value: Any) -> str:
    return psycopg.ClientCursor(connection).mogrify(SQL, {"value": value})


def _by_us(connection: psycopg.Connection[Any], arguments: Any) -> str:
    """What the core sends of a job: bound for a connection."""

    async def bind() -> str:
        async with await psycopg.AsyncConnection.connect(connection.info.dsn, password=None) as bound:
            return (await worker_sql.bind(job_of(arguments), bound, "postgres")).statements[0].text

    return asyncio.run(bind())


EARLY, LATE = dt.datetime.fromisoformat("0002-01-01"), dt.datetime.fromisoformat("9998-01-01")
ZONES: Any = st.sampled_from(
    [dt.UTC, dt.timezone(dt.timedelta(hours=5, minutes=30)), None, pendulum.timezone("Asia/Tokyo")]
)
# Jinja renders texts of a task that begins in the triggerer, as it does on a worker.
TEXTS = st.text(st.characters(exclude_characters="\0{}", exclude_categories=["Cs"])).filter(
    lambda text: not text.endswith(("\n", "\r", ".sql")) and "\r" not in text
)
# Larger whole numbers are refused where a DAG file is parsed: Airflow cannot carry them.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
SCALARS = {
    "int": st.integers(-(2**63), 2**64 - 1),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    # psycopg's literal of a NaN with a sign is no SQL.
    "decimal": st.decimals(allow_infinity=True).filter(lambda number: not (number.is_nan() and number.is_signed())),
    "bool": st.booleans(),
    "text": TEXTS,
    "bytes": st.binary(),
    "date": st.dates(),
    "time": st.times(timezones=st.sampled_from([None, dt.UTC, dt.timezone(dt.timedelta(hours=-3))])),
    "datetime": st.datetimes(timezones=ZONES, min_value=EARLY, max_value=LATE),
    # Of mixed signs, psycopg's text depends on the server's IntervalStyle: below.
    "timedelta": st.timedeltas(min_value=dt.timedelta()),
    "uuid": st.uuids(),
    "address": st.ip_addresses(),
    "network": st.ip_addresses(v=4).map(lambda ip: ipaddress.ip_network(f"{ip}/32")),
    "enum": st.sampled_from(Colour),
    "str's": TEXTS.map(Text),
    "int's": st.integers(-(2**31), 2**31).map(Number),
    "none": st.none(),
    "range": st.builds(Range, st.decimals(-9, 0, places=2), st.decimals(1, 9, places=2)),
    "dates' range": st.builds(lambda day: Range(day, None), st.dates()),
    "multirange": st.builds(lambda a, b: Multirange([Range(Decimal(a), Decimal(b))]), st.just(1), st.integers(2, 9)),
    "dict": st.dictionaries(TEXTS, JSON, max_size=3),
    "json": JSON.map(Json),
    "jsonb": JSON.map(Jsonb),
    "pendulum": st.datetimes(min_value=EARLY, max_value=LATE).map(
        lambda moment: pendulum.instance(moment, tz="Europe/Berlin")
    ),
}  # fmt: skip
LISTS = [
    st.lists(st.lists(SCALARS[name], min_size=2, max_size=2), max_size=3) | st.lists(SCALARS[name], max_size=4)
    for name in (
        "int", "float", "decimal", "bool", "text", "bytes", "date", "datetime", "timedelta", "uuid", "address", "dict",
    )
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@settings(
    max_examples=count(20, 60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(value=st.one_of(*SCALARS.values(), *LISTS))
def test_the_same_literal_reaches_the_server(mode: str, connection: psycopg.Connection[Any], value: Any) -> None:
    try:
        expected = _by_psycopg(connection, value)
    except psycopg.DataError:
        return  # psycopg cannot write it: lists of different lengths, say
    assert _by_us(connection, MODES[mode](value)) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("style", ["postgres", "sql_standard"])
@pytest.mark.parametrize(
    ("value", "expression", "expected"),
    [
        (2**64 - 1, "value", "18446744073709551615"),
        (Decimal(2**70), "value", "1180591620717411303424"),
        (Decimal("12345678901234567.89"), "value", "12345678901234567.89"),
        (Decimal("sNaN"), "value", "NaN"),
        (Decimal("-NaN"), "value", "NaN"),
        ([Decimal("-NaN"), Decimal("-0.5")], "value", "{NaN,-0.5}"),
        (dt.datetime(4000, 1, 1, 0, 0, 0, 123457, tzinfo=dt.UTC), "value", "4000-01-01 00:00:00.123457+00"),
        (EARLY, "pg_typeof(value)", "timestamp without time zone"),
        (dt.date(2020, 1, 1), "value + 1", "2020-01-02"),
        (dt.timedelta(days=-1, microseconds=5), "extract(epoch from value)", "-86399.999995"),
        (pendulum.duration(days=8, microseconds=500001), "extract(epoch from value)", "691200.500001"),
        (
            pendulum.duration(years=1, months=2, days=3, microseconds=4),
            "value = interval '1 year 2 mons 3 days 00:00:00.000004'",
            "true",
        ),
        (
            pendulum.interval(pendulum.datetime(2020, 1, 1), pendulum.datetime(2020, 3, 1)),
            "value = interval '60 days'",
            "true",
        ),
        (Json({"a": [1]}), "value->'a'->>0", "1"),
        ({"a": {"b": 2}}, "value->'a'->>'b'", "2"),
        ("'; drop table x; --\\", "value", "'; drop table x; --\\"),
        (b"\x00\xff'\\", "encode(value, 'hex')", "00ff275c"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_the_value_arrives(
    mode: str, connection: psycopg.Connection[Any], value: Any, expression: str, expected: str, style: str
) -> None:
    text = _by_us(connection, MODES[mode](value))
    connection.execute("set timezone to 'UTC'")
    connection.execute(f"set intervalstyle to {style}")
    found = connection.execute(f"select ({expression})::text from ({text}) as t(value)").fetchone()

    assert found == (expected,)


@pytest.mark.parametrize(
    ("value", "text"),
    [(2**70, "1180591620717411303424"), (-(2**64), "-18446744073709551616"), (float("nan"), "NaN")],
)
@pytest.mark.parametrize("mode", ["deferred", "batch", "@task"])
def test_a_number_that_no_dag_can_carry_arrives_when_the_task_computes_it(
    mode: str, connection: psycopg.Connection[Any], value: Any, text: str
) -> None:
    """In the DAG file it is refused (test_parsing.py): here it is what rendering or a function returned."""
    if mode == "@task":
        job = MODES[mode](value)
    else:
        operator: Any = (
            PgBackgroundBatchOperator(task_id="t", jobs={"a": SQL}, deferrable=True)
            if "batch" in mode
            else PgBackgroundOperator(task_id="t", sql=SQL, deferrable=True)
        )
        operator.parameters = {"value": value}
        trigger = _deferred(operator)
        job = trigger.jobs["a"] if "batch" in mode else trigger.job

    assert connection.execute(f"select value::text from ({_by_us(connection, job)}) as t(value)").fetchone() == (text,)


def test_the_connections_state_of_others_does_not_change_a_literal(server: Any) -> None:
    """libpq escapes by the encoding of whichever connection was used last, where it is given none."""
    with server.connect() as other:
        other.execute("set client_encoding to 'BIG5'")
        assert literals_of(["é'; drop table x; --", "\\é'"]) == ["'é''; drop table x; --'", " E'\\\\é'''"]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (object(), "object"),
        ({1}, "set"),
        ("a\0", "NUL|UTF-8"),
        ("\ud800", "UTF-8"),
        ([1, "a"], "mixed"),
        (Json({"secret": {1, 2}}), "set"),
    ],
    ids=["object", "set", "NUL", "surrogate", "mixed", "json"],
)
@pytest.mark.parametrize("mode", MODES)
def test_what_psycopg_cannot_write_is_refused_by_name(mode: str, value: Any, why: str) -> None:
    if mode == "start_from_trigger" and why == "mixed":
        with pytest.raises(errors.InvalidJob, match=r"value.*mixed"):
            TestTemplates().rendered({"value": value}, unchecked=True)
        return
    with pytest.raises(ValueError, match=f"(value|parameters|jobs).*({why})") as caught:
        MODES[mode](value)

    assert "secret" not in str(caught.value)


class TestTemplates:
    """What a task that begins in the triggerer renders there, and what stays as it is."""

    def rendered(self, parameters: Any, settings: Any = None, *, unchecked: bool = False) -> Any:
        sql = f"select {', '.join(f'%({name})s' for name in parameters)}" if isinstance(parameters, dict) else SQL
        operator = PgBackgroundOperator(
            task_id="t", sql=sql, parameters=parameters, settings=settings, start_from_trigger=True
        )
        trigger = _begun(operator, {"ds": "2013-04-01", "n": 5})
        if unchecked:
            asyncio.run(trigger.work(SimpleNamespace(run=_refuse)))
        with pytest.raises(errors.JobCancelled):
            asyncio.run(trigger.work(SimpleNamespace(run=_refuse)))
        return trigger.job

    def test_texts_are_rendered_wherever_they_stand(self) -> None:
        job = self.rendered(
            {
                "a": "{{ ds }}",
                "b": ["{{ ds }}", "{{ n }}"],
                "c": {"day": "{{ ds }}", "n": [1, None, True]},
                "d": [[1, 2], [3, 4]],
                "e": Decimal("1.10"),
            }
        )

        assert job["literals"] == {
            "a": "'2013-04-01'",
            "b": "'{2013-04-01,5}'",
            "c": """'{"day": "2013-04-01", "n": [1, null, true]}'::json""",
            "d": "'{{1,2},{3,4}}'::int2[]",
            "e": "1.10",
        }

    def test_by_position(self) -> None:
        assert self.rendered(["{{ n }}", 5, dt.date(2020, 1, 1)])["literals"] == ["'5'", "5", "'2020-01-01'::date"]

    def test_settings(self) -> None:
        job = self.rendered(None, {"work_mem": "{{ n }}MB", "my.sql": 1.5, "enable_seqscan": False})

        assert job["settings"] == {"work_mem": "5MB", "my.sql": "1.5", "enable_seqscan": "false"}
        assert job["literals"] is None

    def test_names_are_never_rendered(self) -> None:
        assert self.rendered({"x.sql": 2, "__type": 3, "__classname__": "a"})["literals"] == {
            "x.sql": "2",
            "__type": "3",
            "__classname__": "'a'",
        }


@pytest.mark.parametrize("name", ["__type", "__var", "__classname__", "__version__", "__data__"])
def test_names_that_airflow_knows_itself(name: str) -> None:
    """A serialiser that takes a user's dict for one of its own objects ends the triggerer."""
    sql = f"select %({name})s"
    operator = PgBackgroundOperator(task_id="t", sql=sql, parameters={name: 1}, settings={name: "x"}, deferrable=True)

    assert _deferred(operator).job["literals"] == {name: "1"}
    with pytest.raises(ValueError, match="cannot have the name"):
        PgBackgroundBatchOperator(task_id="t", jobs={name: "select 1"}, deferrable=True).execute(_context())


ROWS = json.loads((Path(__file__).parent / "stored_triggers.json").read_text())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_a_row_of_a_release_before_is_read(row: dict[str, Any], connection: psycopg.Connection[Any]) -> None:
    """Upgrades meet tasks that are deferred: what an earlier version stored is replayed."""
    trigger = TRIGGERS[row["classpath"]](**Trigger._decrypt_kwargs(json.dumps(row["kwargs"])))
    if isinstance(trigger, PgBackgroundStartTrigger):
        trigger.task_instance = _try()
        launcher: Any = SimpleNamespace(run=_refuse)
        with pytest.raises(errors.JobCancelled):
            asyncio.run(trigger.work(launcher))
    job = trigger.jobs["a"] if isinstance(trigger, PgBackgroundBatchTrigger) else trigger.job

    assert _by_us(connection, job) == row["sql"]
    assert (str(trigger.deadline) if trigger.deadline else None) == row["deadline"]
    assert trigger.poll_interval == 2


def test_no_event_of_ours_can_end_a_triggerer() -> None:
    """What a server tells may be anything; Airflow's processes tell one another of it in MessagePack."""
    payload = {
        "status": "failed",
        "message": "x" * 1_000_000,
        "fields": {"detail": "a\0b", "hint": "\ud800"},
        "jobs": {"a": {"row_count": 2**70, "took": float("nan"), "proof": object}},
        "ok": [1, None, True, 1.5, "é"],
    }
    plain = events.plain(payload)

    assert len(msgspec.msgpack.encode(plain)) < 50_000
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["fields"] == {"detail": "a\ufffdb", "hint": "?"}
    assert plain["jobs"]["a"] == {"row_count": "1180591620717411303424", "took": "nan", "proof": "<class 'object'>"}
    assert plain["ok"] == payload["ok"]


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (PgBackgroundOperator, {"sql": "select 1"}),
        (PgBackgroundBatchOperator, {"jobs": {"a": "select 1"}}),
        (PgBackgroundSensor, {"job_id": "a"}),
    ],
)
def test_a_missing_connection_is_told_before_the_task_defers(
    monkeypatch: pytest.MonkeyPatch, kind: Any, given: dict[str, Any]
) -> None:
    monkeypatch.undo()
    operator = kind(task_id="t", postgres_conn_id="no_such", deferrable=True, **given)

    with pytest.raises(AirflowNotFoundException, match="no_such"):
        operator.execute(_context())
