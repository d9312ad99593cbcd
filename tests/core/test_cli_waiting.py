"""``pgbg wait`` and ``pgbg history`` on a server."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pgbg_orchestration import Job, arun
from pgbg_orchestration.cli import app
from pgbg_orchestration.cli.codes import ExitCode
from tests.core.kit import ROOT, Watched, effect, within

pytestmark = pytest.mark.any_surface

Pgbg = Callable[..., Result]


@pytest.fixture
def pgbg(db: Watched, monkeypatch: pytest.MonkeyPatch) -> Pgbg:
    monkeypatch.setenv("TERM", "dumb")

    def invoke(command: str, *arguments: str) -> Result:
        return CliRunner().invoke(app, [command, "--dsn", db.conninfo, *arguments])

    return invoke


def told(result: Result, code: ExitCode = ExitCode.OK) -> Any:
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


class TestWait:
    def test_for_what_has_ended(self, pgbg: Pgbg) -> None:
        pgbg("run", effect("a"), "--id", "a", "--label", "load/a")
        pgbg("run", "select 1/0", "--id", "b", "--label", "load/b")

        assert pgbg("wait", "a").exit_code == ExitCode.OK
        assert pgbg("wait", "b").exit_code == ExitCode.FAILED
        assert pgbg("wait", "--label", "load/*").exit_code == ExitCode.FAILED
        assert pgbg("wait", "b", "--state", "failed").exit_code == ExitCode.OK
        assert pgbg("wait", "a", "-s", "failed").exit_code == ExitCode.ENDED_OTHERWISE
        assert pgbg("wait", "b", "--fail-on", "none", "--timeout", "0").exit_code == ExitCode.WAITED_IN_VAIN
        assert pgbg("wait", "nobody").exit_code == ExitCode.NO_SUCH_JOB
        assert pgbg("wait", "nobody", "--may-come", "--timeout", "0").exit_code == ExitCode.WAITED_IN_VAIN
        assert pgbg("wait", "--label", "*", "--owner", "postgres").exit_code == ExitCode.NO_SUCH_JOB
        assert pgbg("wait").exit_code == ExitCode.REFUSED
        assert pgbg("wait", "a", "--state", "done").exit_code == ExitCode.REFUSED

        machines = told(pgbg("wait", "--label", "load/*", "--json"), ExitCode.FAILED)
        assert ([job["job_id"] for job in machines["jobs"]], machines["exit_code"]) == (["b", "a"], 3)

    def test_the_newest_of_a_series_counts(self, pgbg: Pgbg) -> None:
        for sql, generation in (("select 1/0", "1"), ("select 1", "2")):
            pgbg("run", sql, "--series", "s", "--generation", generation)
        assert pgbg("wait", "--series", "s").exit_code == ExitCode.OK

    async def test_for_what_is_to_come_and_commits(self, db: Watched) -> None:
        waiting = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "pgbg_orchestration", "wait", "--label", "late *", "--may-come", "--dsn", db.conninfo,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        await within(arun(db.conninfo, Job("select pg_sleep(0.5)", id="l", label="late one")))
        out, err = await within(waiting.communicate())
        assert waiting.returncode == ExitCode.OK, err
        assert "✓ committed  late one" in out.decode()
        assert "late one: committed" in err.decode()

    async def test_a_timeout_leaves_the_job_alone(self, db: Watched) -> None:
        job = asyncio.create_task(arun(db.conninfo, Job("select pg_sleep(1.5)", id="slow")))
        await db.at_work("slow")
        done = await asyncio.to_thread(
            CliRunner().invoke, app, ["wait", "slow", "--timeout", "0.2", "--dsn", db.conninfo]
        )
        assert done.exit_code == ExitCode.WAITED_IN_VAIN
        assert "goes on" in done.stderr
        assert (await within(job)).launched


class TestHistory:
    def test_by_label_and_series(self, db: Watched, pgbg: Pgbg) -> None:
        assert pgbg("history").output == "no jobs that this login may see\n"
        for number in range(1, 7):
            seconds = "0.02" if number < 4 else "0.4"
            pgbg("run", f"select pg_sleep({seconds})", "--series", "s", "--generation", str(number), "--label", "nap")
        for number in (1, 2):
            pgbg("run", "insert into nowhere values (1)", "--id", f"d{number}", "--label", "failing")
        pgbg("run", "select 1/0", "--id", "n", "--label", "failing")

        failing, nap = told(pgbg("history", "--json"))

        assert (nap["name"], nap["jobs"], nap["committed"], nap["failures"]) == ("nap", 6, 6, {})
        assert 0 < nap["median"] <= nap["p95"] <= nap["longest"]
        assert nap["trend"] == nap["later_median"] / nap["earlier_median"] > 1
        assert (failing["jobs"], failing["committed"], failing["failed"], failing["median"]) == (3, 0, 3, None)
        assert list(failing["failures"].items()) == [("42P01", 2), ("22012", 1)]
        assert [line["name"] for line in told(pgbg("history", "--json", "--label", "n*"))] == ["nap"]
        assert {line["name"] for line in told(pgbg("history", "--json", "--by", "series"))} == {"s", "d1", "d2", "n"}
        assert "only the latest 1" in pgbg("history", "--limit", "1").stderr
        lines = pgbg("history").stdout.splitlines()
        assert lines[0].split() == ["LABEL", "JOBS", "COMMITTED", "MEDIAN", "P95", "TREND", "LAST", "FAILURES"]
        assert "42P01 ×2 22012 ×1" in lines[1]
