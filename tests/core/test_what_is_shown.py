"""What ``pg_stat_activity`` shows of a worker: the job's label and its SQL, and hardly anything else."""

from __future__ import annotations

import asyncio

import pytest

from pgbg_orchestration import Job, arun
from pgbg_orchestration.walk.worker_sql import PADDING
from tests.core.kit import Watched, within

pytestmark = pytest.mark.any_surface


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("close 2013-04-01", "close 2013-04-01"),
        ("*/ drop table effects; /* x", "* / drop table effects; / * x"),
        ("two\nlines", "two lines"),
        ("Zoë's %s \\ job", "Zoë's %s \\ job"),
    ],
)
async def test_the_query_is_the_users(db: Watched, label: str, shown: str) -> None:
    series = "airflow:a_dag_of_a_long_name/scheduled__2013-01-01T00:00:00+00:00/a_task_of_a_long_name/-1"
    job = asyncio.create_task(arun(db.conninfo, Job("select pg_sleep(1.5)", label=label, series=series, generation=7)))
    pid = await db.at_work(f"{series}#7")
    query = db.value("select query from pg_stat_activity where pid = %s", pid)
    # Its last statement may give rows: one that gives none stands behind it (Work.is_padded).
    assert query == f'/* {shown} */ select "pgbg"."begin_job"()\n;select pg_sleep(1.5){PADDING}'
    outcome = await within(job)
    assert (outcome.label, outcome.job_id) == (label, f"{series}#7")
    assert db.sql("select series, generation from pgbg.jobs") == [(series, 7)]
