"""What an Airflow of another version promises; on the newest too, which is told that it is an older one."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from importlib import import_module
from pkgutil import walk_packages
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import msgspec
import pytest
from airflow.sdk.exceptions import AirflowException

import airflow_provider
from airflow_provider import compat
from airflow_provider.operators import PgBackgroundOperator
from airflow_provider.retry_policy import SqlStateRetryPolicy
from airflow_provider.triggers import PgBackgroundTrigger
from airflow_provider.triggers.task import state_of
from pgbg_orchestration import ErrorFields
from pgbg_orchestration.errors import WorkerError

pytestmark = pytest.mark.airflow
MODULES = sorted(module.name for module in walk_packages(airflow_provider.__path__, "airflow_provider."))


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this Airflow for 3.2."""
    monkeypatch.setattr(compat, "HERE", compat.promises_of((3, 2)))
    monkeypatch.setattr("airflow_provider.triggers.base.HERE", compat.promises_of((3, 2)))


@pytest.mark.parametrize("airflow", [(2, 11), (3, 0)])
def test_an_older_airflow_is_refused(airflow: tuple[int, int]) -> None:
    with pytest.raises(ImportError, match=rf"needs Apache Airflow 3\.1 or newer, and this is {airflow[0]}"):
        compat.promises_of(airflow)


@pytest.mark.parametrize(
    ("airflow", "whole"), [((3, 1), False), ((3, 2), False), ((3, 3), True), ((3, 10), True), ((4, 0), True)]
)
def test_what_a_version_promises(airflow: tuple[int, int], whole: bool) -> None:
    promises = compat.promises_of(airflow)

    assert {promises.calls_on_kill, promises.asks_retry_policies, promises.keeps_task_state} == {whole}
    assert promises.starts_from_triggers is whole


def test_this_airflow_is_known() -> None:
    import airflow

    assert compat.airflow_version() == tuple(int(part) for part in airflow.__version__.split(".")[:2])


@pytest.mark.parametrize(
    "module", sorted(m.name for m in walk_packages(airflow_provider.__path__, "airflow_provider."))
)
def test_every_module_can_be_imported(module: str) -> None:
    """What is imported only when a task runs is missed by a DAG file that can be parsed."""
    import_module(module)


def _operator(error: Exception | None) -> Any:
    class Operator:
        retry_policy = SqlStateRetryPolicy()

        @compat.fails_for_good
        def execute(self, context: Any, event: str = "done") -> str:
            if error is not None:
                raise error
            return event

    return Operator()


def _context() -> dict[str, Any]:
    return {"ti": MagicMock(try_number=1, max_tries=3, task=MagicMock(retries=3))}


def _failed(sqlstate: str) -> WorkerError:
    return WorkerError(f"it failed with {sqlstate}", fields=ErrorFields(sqlstate=sqlstate, message="no"))


@pytest.mark.usefixtures("older")
class TestWithoutRetryPolicies:
    def test_what_must_not_be_tried_again_fails_the_task(self) -> None:
        error = _failed("23505")

        with pytest.raises(compat.AirflowFailException, match="WorkerError: it failed with 23505") as raised:
            _operator(error).execute(_context())
        assert raised.value.__cause__ is error

    def test_what_may_be_tried_again_is_raised_as_it_is(self) -> None:
        error = _failed("40001")

        with pytest.raises(WorkerError) as raised:
            _operator(error).execute(_context())
        assert raised.value is error

    @pytest.mark.parametrize("kind", [compat.AirflowSkipException, compat.AirflowSensorTimeout, AirflowException])
    def test_airflows_own_ends_stay(self, kind: type[Exception]) -> None:
        with pytest.raises(kind, match=r"^as decided$"):
            _operator(kind("as decided")).execute(_context())

    def test_a_success_is_one(self) -> None:
        assert _operator(None).execute(_context(), event="well") == "well"

    def test_the_operators_argument_is_taken_before_airflow_refuses_it(self) -> None:
        policy = SqlStateRetryPolicy()
        arguments = {"retry_policy": policy, "retries": 2}

        assert compat.take_retry_policy(arguments) is policy
        assert arguments == {"retries": 2}


@pytest.mark.usefixtures("older")
def test_no_task_begins_in_a_triggerer() -> None:
    with pytest.raises(ValueError, match=r"that needs Airflow 3\.3 or newer"):
        PgBackgroundOperator(task_id="t", sql="select 1", start_from_trigger=True)


class TestOnKill:
    @pytest.fixture
    def trigger(self, monkeypatch: pytest.MonkeyPatch) -> PgBackgroundTrigger:
        self.killed = 0

        async def on_kill(_: Any) -> None:
            self.killed += 1

        monkeypatch.setattr(PgBackgroundTrigger, "on_kill", on_kill)
        return PgBackgroundTrigger(job={"sql": "select 1", "id": "j"})

    @pytest.mark.usefixtures("older")
    async def test_a_trigger_that_ends_before_its_event_looks_at_its_task(self, trigger: PgBackgroundTrigger) -> None:
        await trigger.cleanup()
        assert self.killed == 1

    @pytest.mark.usefixtures("older")
    async def test_one_that_told_its_event_does_not(self, trigger: PgBackgroundTrigger) -> None:
        trigger._fired = True
        await trigger.cleanup()
        assert self.killed == 0

    @pytest.mark.skipif(not compat.HERE.calls_on_kill, reason="this Airflow is the older one")
    async def test_where_airflow_calls_it_nothing_else_does(self, trigger: PgBackgroundTrigger) -> None:
        await trigger.cleanup()
        assert self.killed == 0


@pytest.mark.parametrize(
    "extra", ["{}", '{"sslmode": "require", "options": "-c x=1", "cursor": "dictcursor", "host": "there"}']
)
def test_an_older_postgres_provider_hands_the_same_to_libpq(monkeypatch: pytest.MonkeyPatch, extra: str) -> None:
    """Before 6.8 its hook cannot be asked what it would connect with: it connects."""
    from airflow.providers.postgres.hooks.postgres import PostgresHook
    from airflow.sdk import Connection
    from psycopg.conninfo import conninfo_to_dict

    from airflow_provider.hook import conninfo_of

    connection = Connection(
        conn_id="books",
        conn_type="postgres",
        host="db",
        login="etl",
        password="x y",
        port=5433,
        schema="b",
        extra=extra,
    )
    if not hasattr(PostgresHook, "_create_connection"):
        expected = {"host": "there" if "there" in extra else "db", "user": "etl", "password": "x y", "dbname": "b"}
        assert conninfo_to_dict(conninfo_of(connection)).items() >= expected.items()
        return
    newer = conninfo_to_dict(conninfo_of(connection))
    monkeypatch.delattr(PostgresHook, "_create_connection")

    assert conninfo_to_dict(conninfo_of(connection)) == newer


class TestAsking:
    """A trigger asks Airflow while the triggerer does, over the same socket."""

    @pytest.fixture
    async def decoder(self, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
        """The triggerer's end of the socket; the other end answers each question with what was asked for."""
        from airflow.jobs.triggerer_job_runner import TriggerCommsDecoder
        from airflow.sdk.execution_time import task_runner
        from airflow.sdk.execution_time.comms import _ResponseFrame

        ours, theirs = socket.socketpair()

        def supervise() -> None:
            with suppress(OSError), theirs:
                while length := theirs.recv(4, socket.MSG_WAITALL):
                    request = msgspec.msgpack.decode(theirs.recv(int.from_bytes(length), socket.MSG_WAITALL))
                    time.sleep(0.002)
                    states = {request[1]["run_ids"][0]: {"t": "deferred"}}
                    answer = {"type": "TaskStatesResult", "task_states": states}
                    theirs.sendall(_ResponseFrame(request[0], answer).as_bytes())

        thread = threading.Thread(target=supervise)
        thread.start()
        reader, writer = await asyncio.open_connection(sock=ours)
        decoder = TriggerCommsDecoder(async_reader=reader, async_writer=writer, socket=MagicMock())
        if hasattr(decoder, "start_reader"):
            await decoder.start_reader()
        monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", decoder, raising=False)
        yield decoder
        await asyncio.get_running_loop().shutdown_default_executor()  # what asked in vain gets its answer too
        if reading := getattr(decoder, "_reader_task", None):
            reading.cancel()
            await asyncio.wait({reading})
        writer.close()
        await writer.wait_closed()
        thread.join()

    async def test_each_gets_its_own_answer(self, decoder: Any) -> None:
        from airflow.sdk.execution_time.comms import GetTaskStates

        async def the_triggerer(number: int) -> bool:
            answer = await decoder.asend(GetTaskStates(dag_id="d", task_ids=["t"], run_ids=[f"own {number}"]))
            return list(answer.task_states) == [f"own {number}"]

        async def a_trigger(number: int) -> bool:
            ti = SimpleNamespace(dag_id="d", task_id="t", run_id=f"run {number}", map_index=-1)
            return await state_of(ti) == "deferred"

        async def a_trigger_that_is_ended(number: int) -> bool:
            asking = asyncio.create_task(a_trigger(number))
            await asyncio.sleep(number / 1000)
            asking.cancel()
            await asyncio.wait({asking})
            return True

        async with asyncio.timeout(60):
            told = await asyncio.gather(
                *(of(number) for number in range(30) for of in (the_triggerer, a_trigger, a_trigger_that_is_ended))
            )
        assert set(told) == {True}

    async def test_an_error_is_told(self) -> None:
        def fail() -> None:
            raise KeyError("no")

        with pytest.raises(KeyError, match="no"):
            await compat.in_thread(fail)
