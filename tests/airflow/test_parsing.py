"""What is refused when a DAG file is parsed: another operator's parameters, and numbers that no DAG can carry."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from decimal import Decimal
from inspect import signature
from typing import Any

import msgspec
import pytest
from airflow.providers.common.sql.operators.sql import BaseSQLOperator, SQLExecuteQueryOperator
from airflow.sdk import DAG, task
from airflow.serialization.serialized_objects import DagSerialization

from airflow_provider.operators import PgBackgroundBatchOperator, PgBackgroundOperator
from airflow_provider.parse_checks import ELSEWHERE, LARGEST_CARRIED, SMALLEST_CARRIED, check
from airflow_provider.sensors import PgBackgroundSensor

pytestmark = [pytest.mark.airflow, pytest.mark.filterwarnings("ignore:Task .* was never mapped")]


@pytest.fixture(scope="module", autouse=True)
def unmapped() -> Iterator[None]:
    """Have what was refused before it was mapped say so here, and not within a test of another file."""
    yield
    gc.collect()


def compose() -> str:
    return "select 1"


WAYS: dict[str, Callable[..., Any]] = {
    "operator": lambda **given: PgBackgroundOperator(task_id="t", **{"sql": "select 1", **given}),
    "batch": lambda **given: PgBackgroundBatchOperator(task_id="t", jobs={"a": "select 1"}, **given),
    "partial": lambda **given: PgBackgroundOperator.partial(task_id="t", **given).expand(sql=["select 1"]),
    "expand": lambda **given: PgBackgroundOperator.partial(task_id="t").expand(
        sql=["select 1"], **{name: [value] for name, value in given.items()}
    ),
    "expand_kwargs": lambda **given: PgBackgroundOperator.partial(task_id="t").expand_kwargs(
        [{"sql": "select 1", **given}]
    ),
    "@task": lambda **given: task.pg_background(task_id="t", **given)(compose)(),
}


class TestAnotherOperatorsParameters:
    @pytest.mark.parametrize("name", ELSEWHERE)
    @pytest.mark.parametrize("way", WAYS)
    def test_what_there_is_in_its_place_is_told(self, way: str, name: str) -> None:
        with DAG("d", schedule=None), pytest.raises(TypeError, match=f"'t' has no '{name}'"):
            WAYS[way](**{name: "x"})

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ({"enable_log_db_messages": True}, ["here it is enable_log_db_messages, a parameter of the operator"]),
            ({"options": "-c work_mem=1GB", "log_sql": False}, ["options: here they are settings"]),
            ({"options": "", "enable_log_db_messages": True}, ["settings", "enable_log_db_messages, a parameter"]),
            ({"log_sql": False}, ["settings={…}", "enable_log_db_messages=True", "database"]),
            ("{{ params.hook }}", ["settings={…}", "enable_log_db_messages=True", "database"]),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("way", WAYS)
    def test_each_of_the_hooks_parameters_has_its_place(self, way: str, given: Any, told: list[str]) -> None:
        with DAG("d", schedule=None), pytest.raises(TypeError, match="'t' has no 'hook_params'") as caught:
            WAYS[way](hook_params=given)

        assert [text for text in told if text not in str(caught.value)] == []

    def test_the_parameters_that_take_the_hooks_place_are_there(self) -> None:
        ours = signature(PgBackgroundOperator.__init__).parameters

        assert {"enable_log_db_messages", "settings", "database"} <= set(ours)

    def test_a_text_is_always_split(self) -> None:
        assert PgBackgroundOperator(task_id="t", sql="select 1", split_statements=True).split_statements
        with pytest.raises(TypeError, match="'t' has no split_statements=False: a text is split"):
            PgBackgroundOperator(task_id="t", sql="select 1", split_statements=False)
        with pytest.raises(TypeError, match="'t' has no split_statements=False"):
            PgBackgroundOperator.partial(task_id="t", split_statements=False)

    def test_none_is_forgotten(self) -> None:
        """Each parameter of SQLExecuteQueryOperator is ours, or has its sentence."""
        theirs = {
            name
            for kind in (SQLExecuteQueryOperator, BaseSQLOperator)
            for name in signature(kind.__init__).parameters
            if name not in ("self", "kwargs")
        }
        ours = set(signature(PgBackgroundOperator.__init__).parameters)

        assert theirs - ours - set(ELSEWHERE) == set()
        assert ours & set(ELSEWHERE) == set()

    def test_a_sentence_names_parameters_that_there_are(self) -> None:
        ours = signature(PgBackgroundOperator.__init__).parameters

        assert {"postgres_conn_id", "settings", "database"} <= set(ours)

    def test_default_arguments_for_another_operator_are_no_error(self) -> None:
        """They are there for all operators of a DAG."""
        with DAG("d", schedule=None, default_args={"conn_id": "books", "autocommit": True}):
            PgBackgroundOperator(task_id="t", sql="select 1")

    def test_parameters_as_a_text_are_read(self) -> None:
        """As SQLExecuteQueryOperator does, for what a DAG file has from elsewhere."""
        operator = PgBackgroundOperator(task_id="t", sql="select %(a)s", parameters="{'a': [1, None]}")
        operator.prepare_template()

        assert operator.parameters == {"a": [1, None]}


class TestNumbers:
    """Airflow's processor would end at such a one without a word, and its whole DAG vanish (3.3.2): they never meet."""

    @pytest.mark.parametrize("value", [LARGEST_CARRIED + 1, SMALLEST_CARRIED - 1, float("nan"), float("inf")])
    @pytest.mark.parametrize("way", WAYS)
    def test_what_no_dag_can_carry_is_refused(self, way: str, value: Any) -> None:
        for given in ({"parameters": {"deep": [(1, {"n": value})]}}, {"params": {"n": value}}):
            if way == "expand" and "params" in given:
                continue  # Airflow maps over no params
            with DAG("d", schedule=None), pytest.raises(ValueError, match=r"'t': param\w+ holds .*carry in a DAG"):
                WAYS[way](**given)

    def test_wherever_it_stands(self) -> None:
        for name in ("timeout", "slot_timeout", "poll_interval", "queue_size"):
            with pytest.raises(ValueError, match=f"{name} holds a whole number"):
                WAYS["operator"](**{name: 2**64})
        with pytest.raises(ValueError, match="jobs holds"):
            PgBackgroundBatchOperator(task_id="t", jobs={"a": {"sql": "select %s", "parameters": [2**64]}})

        @task.pg_background
        def select(number: int) -> str:
            return f"select {number}"

        with DAG("d", schedule=None), pytest.raises(ValueError, match="op_args holds"):
            select(2**64)

    @pytest.mark.parametrize("value", [LARGEST_CARRIED, SMALLEST_CARRIED, 1e308, Decimal(2**70), str(2**70)])
    @pytest.mark.parametrize("start", [True, False])
    def test_what_is_let_through_a_dag_can_carry(self, value: Any, start: bool) -> None:
        with DAG("d", schedule=None) as dag:
            PgBackgroundOperator(task_id="t", sql="select %s", parameters=[value], start_from_trigger=start)

        assert msgspec.msgpack.encode(DagSerialization.to_dict(dag))

    def test_half_of_a_character(self) -> None:
        """The same processor's end: a text that no UTF-8 can be made of."""
        halves: dict[str, Any] = {"sql": "select '\ud800'", "parameters": {"\udfff": 1}, "doc_md": "\ud83d"}
        for name, value in halves.items():
            with pytest.raises(ValueError, match=f"{name} holds half of a surrogate pair.* Write whole characters"):
                PgBackgroundOperator(**({"task_id": "t", "sql": "select 1"} | {name: value}))
        with DAG("d", schedule=None) as dag:
            PgBackgroundOperator(task_id="t", sql="select '\U0001f600'", label="Zo\xeb \U0001f600")
        assert msgspec.msgpack.encode(DagSerialization.to_dict(dag))

    def test_a_sensors_too(self) -> None:
        with pytest.raises(ValueError, match="worker_pid holds a whole number"):
            PgBackgroundSensor(task_id="t", worker_pid=2**64)
        with pytest.raises(TypeError, match="postgres_conn_id"):
            PgBackgroundSensor(task_id="t", job_id="a", conn_id="books")

    def test_parameters_that_hold_themselves(self) -> None:
        deep: list[Any] = [1]
        deep.append(deep)

        check(PgBackgroundOperator, {"task_id": "t", "parameters": deep})
