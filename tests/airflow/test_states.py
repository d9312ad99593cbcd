"""Which task a job belongs to, and how Airflow is asked for the states of tasks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

from airflow_provider.triggers.task import state_of, states_of
from pgbg_orchestration.series import AirflowTask, airflow_task_of_job, of_airflow_task

pytestmark = pytest.mark.airflow

LOAD = AirflowTask("books", "q1", "load", -1)


class TestNames:
    @pytest.mark.parametrize(
        "task",
        [LOAD, LOAD._replace(map_index=3), LOAD._replace(run_id="a/b/1"), LOAD._replace(run_id="manual#1/x")],
    )
    @pytest.mark.parametrize("number", ["0.0", "1.try2", "0192d3a4-0000-7000-8000-000000000000"])
    @pytest.mark.parametrize("name", ["", "/one", "/a/b/-1", "/#1"])
    def test_of_a_task(self, task: AirflowTask, number: str, name: str) -> None:
        series = of_airflow_task(*task)
        assert airflow_task_of_job(f"{series}{name}", f"{series}#{number}{name}") == task

    @pytest.mark.parametrize(
        ("series", "job_id"),
        [
            ("mine", "mine#1"),
            ("airflow:books/q1/load/-1", "another"),
            ("airflow:books/q1/load/-1", "airflow:books/q1/load/-1"),
            ("airflow:books/q1/load/-1", "airflow:books/q1/load/-1#1.0/one"),
            ("airflow:books/q1/load/-1/one", "airflow:books/q1/load/-1#1.0"),
            ("airflow:books/q1/load/-1/one", "airflow:books/q1/load/-1/one"),
            ("airflow:books/q1/load", "airflow:books/q1/load#1.0"),
            ("airflow:books/q1/load/x", "airflow:books/q1/load/x#1.0"),
            ("dagster:books/q1/load/-1", "dagster:books/q1/load/-1#1.0"),
        ],
    )
    def test_of_none(self, series: str, job_id: str) -> None:
        assert airflow_task_of_job(series, job_id) is None


class TestStates:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """What Airflow was asked; it knows the task `load`, mapped in run m, and the task `load_1`."""
        known: dict[str, dict[str, dict[str, str | None]]] = {
            "load": {"q1": {"load": "success"}, "q2": {"load": None}, "m": {"load_0": "failed", "load_1": "running"}},
            "load_1": {"m": {"load_1": "success"}},
        }
        questions: list[dict[str, Any]] = []

        def answer(**question: Any) -> dict[str, Any]:
            questions.append(question)
            (task_id,) = question["task_ids"]
            index = question["map_index"]
            return {
                run: {k: v for k, v in found.items() if index is None or k == f"{task_id}_{index}"}
                for run, found in known[task_id].items()
                if run in question["run_ids"] and question["dag_id"] == "books"
            }

        monkeypatch.setattr(RuntimeTaskInstance, "get_task_states", staticmethod(answer))
        return questions

    async def test_of_many_at_once(self, asked: list[dict[str, Any]]) -> None:
        tasks = {
            AirflowTask("books", "q1", "load", -1): "success",
            AirflowTask("books", "q2", "load", -1): "none",
            AirflowTask("books", "m", "load", 0): "failed",
            AirflowTask("books", "m", "load", 1): "running",
            AirflowTask("books", "m", "load_1", -1): "success",
        }
        strangers = [
            AirflowTask("books", "q3", "load", -1),
            AirflowTask("films", "q1", "load", -1),
            AirflowTask("books", "q1", "load", 0),
        ]

        assert await states_of([*tasks, *strangers]) == tasks
        assert len(asked) == 3, "one question for each task of a DAG"

    async def test_of_more_runs_than_an_address_holds(self, asked: list[dict[str, Any]]) -> None:
        assert await states_of([AirflowTask("books", f"r{n}", "load", -1) for n in range(120)]) == {}
        assert sum(len(question["run_ids"]) for question in asked) == 120
        assert max(len(question["run_ids"]) for question in asked) <= 50

    async def test_of_one(self, asked: list[dict[str, Any]]) -> None:
        def ti(run_id: str, map_index: int | None) -> SimpleNamespace:
            return SimpleNamespace(dag_id="books", run_id=run_id, task_id="load", map_index=map_index)

        assert await state_of(ti("q1", None)) == "success"
        assert await state_of(ti("q2", -1)) == "none"
        assert await state_of(ti("m", 1)) == "running"
        assert await state_of(ti("away", -1)) is None
        assert await state_of(None) is None
        assert [question["map_index"] for question in asked] == [None, None, 1, None]
