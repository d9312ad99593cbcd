"""``pgbg`` on a server: what it prints, how it ends, and what Ctrl-C does."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner, Result

from pgbg_orchestration import errors
from pgbg_orchestration.cli import app
from pgbg_orchestration.cli.codes import ExitCode
from pgbg_orchestration.ledger import install
from tests.conftest import Database
from tests.core.kit import APP, ROOT, Watched, effect, eventually, slow, within
from tests.kit.proxy import TO_CLIENT, Proxy

pytestmark = pytest.mark.any_surface

Pgbg = Callable[..., Result]


@pytest.fixture
def pgbg(db: Watched, monkeypatch: pytest.MonkeyPatch) -> Pgbg:
    """Runs ``pgbg`` as the login that may do nothing but run jobs."""
    monkeypatch.setenv("TERM", "dumb")

    def invoke(command: str, *arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, [command, "--dsn", db.conninfo, *arguments], input=stdin)

    return invoke


def told(result: Result, code: ExitCode = ExitCode.OK) -> Any:
    """What a command with --json printed; it ended with that code."""
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


class TestRun:
    def test_sql_from_everywhere(self, db: Watched, pgbg: Pgbg, tmp_path: Any) -> None:
        file = tmp_path / "job.sql"
        file.write_text("\ufeff" + effect("from a file"), encoding="utf-8")

        ends = [
            pgbg("run", effect("an argument")).exit_code,
            pgbg("run", "-f", str(file)).exit_code,
            pgbg("run", stdin=effect("stdin")).exit_code,
            pgbg("run", "-", stdin=effect("a dash")).exit_code,
            pgbg("run", "-f", "-", stdin="\ufeff" + effect("a dash for a file")).exit_code,
        ]

        assert ends == [0, 0, 0, 0, 0]
        where = ["an argument", "from a file", "stdin", "a dash", "a dash for a file"]
        assert db.effects_by_job() == dict.fromkeys(where, 1)

    def test_the_outcome_for_people_and_machines(self, db: Watched, pgbg: Pgbg) -> None:
        people = pgbg("run", effect("j"), "--id", "j", "--label", "the label")
        machines = told(pgbg("run", effect("j"), "--id", "j", "--label", "the label", "--json"))

        assert people.exit_code == 0
        assert people.stdout.startswith("✓ committed  the label\n  INSERT · 1 row · ")
        assert "launched attempt 1" in people.stderr
        assert (machines["job_id"], machines["row_count"], machines["command_tag"]) == ("j", 1, "INSERT")
        assert machines["launched"] is False
        assert db.effects("j") == 1

    def test_quiet(self, pgbg: Pgbg) -> None:
        assert pgbg("run", "select 1", "-q").stderr == ""

    @pytest.mark.servers("real", "embedded")
    def test_notices_are_shown_where_they_are_asked_for(self, pgbg: Pgbg) -> None:
        raises = "do $$ begin raise notice 'a step' using hint = 'go on'; raise warning 'take care'; end $$"

        heard, unheard = pgbg("run", raises, "--notices"), pgbg("run", raises)

        assert heard.exit_code == unheard.exit_code == 0
        assert "NOTICE: a step" in heard.stderr
        assert "\n         HINT: go on\n" in heard.stderr
        assert "job " not in heard.stderr
        assert heard.stderr.count("WARNING: take care") == 1
        assert "a step" not in unheard.stderr

    @pytest.mark.servers("real", "embedded")
    def test_a_procedure_is_heard_as_psql_would(self, db: Watched, pgbg: Pgbg) -> None:
        db.sql("create procedure tells() language plpgsql as $$ begin raise notice 'a step'; end $$")

        ended = pgbg("run", "call tells()", "--notices")

        assert ended.exit_code == 0, ended.output
        assert "NOTICE: a step" in ended.stderr

    @pytest.mark.servers("real", "embedded")
    def test_advice_is_in_the_words_of_the_command_line(self, db: Watched, pgbg: Pgbg) -> None:
        db.sql("create procedure commits() language plpgsql as $$ begin commit; end $$")

        refused = pgbg("run", "vacuum effects", "--notices")
        failed = pgbg("run", "call commits()", "--notices")

        assert refused.exit_code == ExitCode.REFUSED
        assert "choose --kind session, whose outcome" in refused.stderr
        assert failed.exit_code == ExitCode.FAILED
        assert "SQLSTATE 2D000" in failed.stderr
        assert "as --kind supervised, or, where its notices are to be heard, as --kind session" in failed.stderr
        assert "kind='" not in refused.stderr + failed.stderr

    def test_parameters_settings_and_role(self, db: Watched, pgbg: Pgbg) -> None:
        db.role("pgbg_other", "nologin", ())
        db.sql("grant insert on effects to pgbg_other")
        db.sql("grant pgbg_other to pgbg_app")
        query = "insert into effects (job, who) select %(name)s, current_user || ' ' || current_setting('work_mem')"

        ended = pgbg("run", query, "-p", "name=it's = 100%", "--set", "work_mem=7MB", "--role", "pgbg_other")

        assert ended.exit_code == 0, ended.output
        assert db.sql("select job, who from effects") == [("it's = 100%", "pgbg_other 7MB")]

    def test_a_failure(self, pgbg: Pgbg) -> None:
        people = pgbg("run", "select 1/0", "--label", "divides")
        machines = told(pgbg("run", "select 1/0", "--json"), ExitCode.FAILED)

        assert people.exit_code == ExitCode.FAILED
        assert people.stdout == ""
        assert "✗ failed  divides\n  SQLSTATE 22012: division by zero" in people.stderr
        assert "Nothing of this job is committed." in people.stderr
        assert machines["error"] == "WorkerError"
        assert machines["fields"]["sqlstate"] == "22012"
        assert machines["data_state"] == "Nothing of this job is committed."

    def test_an_id_of_other_sql(self, db: Watched, pgbg: Pgbg) -> None:
        pgbg("run", effect("first"), "--id", "same")

        refused = pgbg("run", effect("second"), "--id", "same")
        accepted = pgbg("run", effect("second"), "--id", "same", "--accept-changed-sql")

        assert refused.exit_code == ExitCode.REFUSED
        assert "--accept-changed-sql" in refused.stderr
        assert accepted.exit_code == ExitCode.OK
        assert db.effects_by_job() == {"first": 1}

    def test_a_timeout(self, db: Watched, pgbg: Pgbg) -> None:
        ended = pgbg("run", slow("late", 60), "--timeout", "0.3")

        assert ended.exit_code == ExitCode.DEADLINE, ended.output
        assert db.effects("late") == 0

    def test_a_newer_generation(self, pgbg: Pgbg) -> None:
        newer = pgbg("run", "select 1", "--series", "s", "--generation", "2")
        older = pgbg("run", "select 1", "--series", "s", "--generation", "1")

        assert (newer.exit_code, older.exit_code) == (ExitCode.OK, ExitCode.CANCELLED)
        assert "generation 2" in older.stderr

    def test_a_statement_that_runs_alone(self, db: Watched, pgbg: Pgbg) -> None:
        of_its_own_accord = told(pgbg("run", "vacuum effects", "--json"))
        in_a_session = told(pgbg("run", "vacuum effects", "--kind", "session", "--json"))

        assert (of_its_own_accord["command_tag"], in_a_session["command_tag"]) == ("VACUUM", "VACUUM")
        assert in_a_session["proof"] == "result"

    def test_an_invalid_index_is_dropped_on_demand(self, db: Watched, pgbg: Pgbg) -> None:
        db.sql("insert into effects values ('same'), ('same')")
        db.sql(f"alter table effects owner to {APP}")
        db.sql(f"grant create on schema public to {APP}")
        build = "create unique index concurrently only_one on effects (job)"
        assert pgbg("run", build).exit_code == ExitCode.FAILED
        db.sql("delete from effects")

        again = pgbg("run", build)
        with_the_option = pgbg("run", build, "--drop-invalid-index")

        assert (again.exit_code, with_the_option.exit_code) == (ExitCode.FAILED, ExitCode.OK)
        assert db.value("select indisvalid from pg_index where indexrelid = 'only_one'::regclass") is True

    def test_without_the_privilege(self, db: Watched) -> None:
        db.role("pgbg_nobody", "login", ())

        ended = CliRunner().invoke(app, ["run", "select 1", "--dsn", db.database.conninfo_as("pgbg_nobody")])

        assert ended.exit_code == ExitCode.NOT_READY
        assert 'GRANT "pgbackground_role" TO "pgbg_nobody";' in ended.stderr


class TestJobs:
    def test_true_states_and_filters(self, db: Watched, pgbg: Pgbg) -> None:
        pgbg("run", effect("a"), "--id", "a", "--label", "load/a")
        pgbg("run", "select 1/0", "--id", "b", "--label", "load/b")
        pgbg("run", "select 1/0", "--id", "c", "--label", "load_c", "--series", "third")
        pgbg("cancel", "c")

        def ids(*filters: str) -> list[str]:
            return [job["job_id"] for job in told(pgbg("jobs", "--json", *filters))]

        listed = told(pgbg("jobs", "--json"))
        assert [(job["job_id"], job["state"]) for job in listed] == [
            ("c", "cancelled"),
            ("b", "failed"),
            ("a", "committed"),
        ]
        assert ids("--state", "failed") == ["b"]
        assert ids("--state", "failed,committed") == ["b", "a"]
        assert ids("--label", "load/*") == ["b", "a"]
        assert ids("--label", "load_c") == ["c"]
        assert ids("--label", "load?a") == ["a"]
        assert ids("--series", "th*") == ["c"]
        assert ids("--limit", "1") == ["c"]
        assert ids("--id", "a") == ["a"]
        assert ids("--state", "lost") == []

    def test_a_newer_generation_hides_no_failure(self, db: Watched, pgbg: Pgbg) -> None:
        for sql, generation in (("select 1/0", "1"), ("select 1", "2")):
            pgbg("run", sql, "--series", "s", "--generation", generation, "--label", generation)

        listed = {entry["label"]: entry for entry in told(pgbg("jobs", "--json"))}

        assert {label: entry["state"] for label, entry in listed.items()} == {"1": "failed", "2": "committed"}
        assert listed["1"]["sqlstate"] == "22012"
        assert "generation 2" in listed["1"]["reason"], "and it never starts again"

    def test_the_table(self, db: Watched, pgbg: Pgbg) -> None:
        assert pgbg("jobs").output == "no jobs that this login may see\n"
        pgbg("run", effect("a"), "--id", "a", "--label", "first \x1b[31m[bold]job")
        pgbg("run", "select 1/0", "--id", "b")

        lines = pgbg("jobs").stdout.splitlines()

        assert lines[0].split() == ["STATE", "LABEL", "LAUNCHED", "TOOK", "ROWS", "TRY", "BY", "WHAT"]
        assert "✗ failed" in lines[1]
        assert "22012 division by zero" in lines[1]
        assert "first ·[31m[bold]job" in lines[2]
        assert len(lines) == 3
        assert "only the newest 1" in pgbg("jobs", "--limit", "1").stderr
        assert [line.split()[2] for line in pgbg("jobs", "--ids").stdout.splitlines()[1:]] == ["b", "a"]

    def test_one_job(self, pgbg: Pgbg) -> None:
        pgbg("run", "select 1/0", "--id", "b")

        shown = pgbg("jobs", "--id", "b")

        assert shown.exit_code == 0
        assert "sqlstate" in shown.stdout
        assert pgbg("jobs", "--id", "c").exit_code == ExitCode.NO_SUCH_JOB

    def test_one_job_with_its_sql_and_its_attempts(self, pgbg: Pgbg) -> None:
        """What the page and the terminal tell of it, from the same place."""
        pgbg("run", "select 1/0", "--id", "b", "--label", "nightly load")
        pgbg("run", "select\n  1", "--id", "b", "--label", "nightly load", "--accept-changed-sql")

        shown = pgbg("jobs", "--id", "b").stdout
        [found] = told(pgbg("jobs", "--id", "b", "--json"))

        assert "✗ failed: 22012 division by zero" in shown
        assert "✓ committed" in shown
        assert "label so far" in shown
        lines = [line.split() for line in shown.splitlines()]
        assert lines[-2:] == [["SQL", "select"], ["1"]]
        assert found["statement"] == "select\n  1"
        assert [(one["attempt"], one["sqlstate"]) for one in found["past_attempts"]] == [(1, "22012")]
        assert found["attempt"] == 2

    def test_a_job_of_another_owner_is_not_shown(self, db: Watched, pgbg: Pgbg) -> None:
        db.role("pgbg_second")
        CliRunner().invoke(
            app, ["run", "select 1", "--id", "theirs", "--dsn", db.database.conninfo_as("pgbg_second"), "-q"]
        )

        assert pgbg("jobs", "--id", "theirs").exit_code == ExitCode.NO_SUCH_JOB
        assert pgbg("cancel", "theirs").exit_code == ExitCode.NO_SUCH_JOB

    async def test_cancel_a_job_of_another_process(self, db: Watched) -> None:
        running = await start(db, "run", slow("j", 60), "--id", "j", "--series", "another name")
        await db.at_work("j")

        cancelled = await start(db, "cancel", "j", "--reason", "enough", "--json")
        decided, code = await output_of(cancelled)

        assert (json.loads(decided)["decided"], code) == ("cancelled", ExitCode.OK)
        _, code = await output_of(running)
        assert code == ExitCode.CANCELLED
        assert db.effects() == 0
        assert db.value("select reason from pgbg.receipt where job_id = 'j'") == "enough"

    async def test_cancel_by_the_label_that_people_see(self, db: Watched) -> None:
        first = await start(db, "run", slow("a", 60), "--id", "first", "--label", "load 1")
        second = await start(db, "run", slow("b", 60), "--id", "second", "--label", "load 2")
        await db.at_work("first")
        await db.at_work("second")

        refused = await output_of(await start(db, "cancel", "--label", "load*", "--json"))
        one = await output_of(await start(db, "cancel", "--label", "load 2", "--json"))
        rest = await output_of(await start(db, "cancel", "--label", "load*", "--json"))
        none = await output_of(await start(db, "cancel", "--label", "load*", "--json"))

        assert [code for _, code in (refused, one, rest, none)] == [
            ExitCode.REFUSED, ExitCode.OK, ExitCode.OK, ExitCode.NO_SUCH_JOB
        ]  # fmt: skip
        assert {"first", "second"} <= set(re.findall(r"\w+", json.loads(refused[0])["message"]))
        assert [json.loads(told)["job_id"] for told, _ in (one, rest)] == ["second", "first"]
        assert [(await output_of(each))[1] for each in (first, second)] == [ExitCode.CANCELLED] * 2

    def test_cancel_too_late_or_unknown(self, db: Watched, pgbg: Pgbg) -> None:
        pgbg("run", effect("j"), "--id", "j")

        late, unknown = pgbg("cancel", "j"), pgbg("cancel", "never heard of")

        assert (late.exit_code, unknown.exit_code) == (ExitCode.TOO_LATE, ExitCode.NO_SUCH_JOB)
        assert "too late, committed" in late.stdout
        assert db.receipts("cancelled") == set()

    def test_a_cancelled_job_runs_again_on_demand_only(self, db: Watched, pgbg: Pgbg) -> None:
        pgbg("run", "select 1/0", "--id", "j")
        assert pgbg("cancel", "j").exit_code == ExitCode.OK

        refused = pgbg("run", "select 1/0", "--id", "j")
        again = pgbg("run", effect("j"), "--id", "j", "--retry-cancelled", "--accept-changed-sql")

        assert refused.exit_code == ExitCode.CANCELLED
        assert "--retry-cancelled" in refused.stderr
        assert again.exit_code == ExitCode.OK
        assert db.effects("j") == 1

    def test_prune(self, db: Watched, pgbg: Pgbg) -> None:
        pgbg("run", "select 1", "--id", "old")
        pgbg("run", "select 1", "--id", "new")
        db.sql("update pgbg.receipt set decided_at = decided_at - interval '40 d' where job_id = 'old'")
        db.sql(
            "update pgbg.job set launched_at = launched_at - interval '40 d', ended_at = ended_at - interval '40 d'"
            " where job_id = 'old'"
        )

        refused = pgbg("prune", "--older-than", "1d")
        pruned = told(pgbg("prune", "--older-than", "30d", "--json"))

        assert refused.exit_code == ExitCode.REFUSED
        assert pruned == {"receipts": 1, "jobs": 1}
        assert db.receipts() == {"new"}
        assert told(pgbg("prune", "--older-than", "0s", "--retry-horizon", "0s", "--json"))["receipts"] == 1


class TestSetup:
    def test_install_and_uninstall(self, extension_database: Database) -> None:
        def invoke(*arguments: str, stdin: str | None = None) -> Result:
            return CliRunner().invoke(app, [*arguments, "--dsn", extension_database.conninfo], input=stdin)

        first, second = told(invoke("install", "--json")), told(invoke("install", "--json"))
        assert (first["from_version"], first["version"], first["changed"]) == (0, install.VERSION, True)
        assert second["changed"] is False
        assert invoke("run", "select 1", "-q").exit_code == ExitCode.OK

        assert invoke("uninstall", stdin="n\n").exit_code == ExitCode.REFUSED
        assert invoke("uninstall", stdin="").exit_code == ExitCode.REFUSED
        assert told(invoke("jobs", "--json")) != []
        assert invoke("uninstall", stdin="y\n").exit_code == ExitCode.OK
        assert invoke("uninstall", "--yes").exit_code == ExitCode.NOT_READY
        missing = invoke("run", "select 1")
        assert missing.exit_code == ExitCode.NOT_READY
        assert "pgbg install" in missing.stderr
        assert invoke("run", "select 1", "--kind", "session", "-q").exit_code == ExitCode.OK

    def test_what_print_prints_can_be_run(self, extension_database: Database) -> None:
        printed = CliRunner().invoke(app, ["install", "--print"]).stdout
        for_psql, _, script = printed.partition("\\set ON_ERROR_STOP on\n")
        assert for_psql.startswith("-- pgbg schema")

        with extension_database.connect() as connection:
            connection.execute(script)
            assert install.installed_version(connection, "pgbg") == install.VERSION

    def test_without_the_extension(self, empty_database: Database) -> None:
        ended = CliRunner().invoke(app, ["install", "--dsn", empty_database.conninfo])

        assert ended.exit_code == ExitCode.NOT_READY
        assert "CREATE EXTENSION pg_background" in ended.stderr

    def test_a_login_that_may_not(self, extension_database: Database) -> None:
        with extension_database.connect() as connection, connection.transaction():
            role = f"pgbg_weak_{os.urandom(4).hex()}"
            connection.execute(psycopg.sql.SQL("create role {} login").format(psycopg.sql.Identifier(role)))
        try:
            ended = CliRunner().invoke(app, ["install", "--dsn", extension_database.conninfo_as(role)])
        finally:
            with extension_database.connect() as connection:
                connection.execute(psycopg.sql.SQL("drop role {}").format(psycopg.sql.Identifier(role)))

        assert ended.exit_code == ExitCode.NOT_READY
        assert "install --print" in ended.stderr


# Whoever runs the suite may ignore signals, under nohup or in the background of a script; a child would inherit that.
PGBG = """
import signal
from pgbg_orchestration import pace
pace.CANCEL = 3.0  # that there is a bound is tested, not how long it is
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from pgbg_orchestration.__main__ import main
main()
"""


async def start(db: Watched, command: str, *arguments: str, dsn: str | None = None) -> asyncio.subprocess.Process:
    """Start ``pgbg`` as a process of its own; await :func:`output_of` it."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", PGBG, command, "--dsn", dsn or db.conninfo, *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip


async def output_of(process: asyncio.subprocess.Process) -> tuple[str, int]:
    """Everything that it printed, and its exit code."""
    stdout, stderr = await within(process.communicate())
    code = process.returncode
    await asyncio.sleep(0)
    assert code is not None
    return (stdout + stderr).decode(), code


class TestInterrupts:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    async def test_the_worker_is_cancelled(self, db: Watched, number: signal.Signals) -> None:
        process = await start(db, "run", slow("j", 60), "--id", "j")
        await db.at_work("j")

        process.send_signal(number)
        printed, code = await output_of(process)

        assert code == ExitCode.CANCELLED, printed
        assert "cancelled by the interrupt" in printed
        assert db.effects() == 0
        assert db.receipts("cancelled") == {"j"}
        assert db.workers() == []

    async def test_left_at_work(self, db: Watched) -> None:
        process = await start(db, "run", slow("j", 3), "--id", "j", "--leave")
        await db.at_work("j")

        process.send_signal(signal.SIGINT)
        printed, code = await output_of(process)

        assert code == ExitCode.INTERRUPTED, printed
        assert "--id 'j'" in printed
        await eventually(lambda: db.receipts() == {"j"}, "the worker that was left commits")
        assert db.effects("j") == 1

    async def test_too_late(self, db: Watched) -> None:
        """A worker that catches the cancel commits all the same: a success, and it says so."""
        stubborn = f"{effect('j')}; do $$ begin perform pg_sleep(2); exception when query_canceled then null; end $$"
        process = await start(db, "run", stubborn, "--id", "j")
        await db.at_work("j")

        process.send_signal(signal.SIGINT)
        printed, code = await output_of(process)

        assert code == ExitCode.OK, printed
        assert "too late" in printed
        assert db.effects("j") == 1

    async def test_nobody_reads_what_it_prints(self, db: Watched) -> None:
        process = await start(db, "run", slow("j", 60), "--id", "j")
        await db.at_work("j")
        assert process.stdout is not None
        assert process.stderr is not None
        for stream in (process.stdout, process.stderr):
            stream._transport.close()  # type: ignore[attr-defined]  # as a shell's pipe does when its reader ends

        process.send_signal(signal.SIGTERM)

        assert await within(process.wait()) == ExitCode.CANCELLED
        assert db.receipts("cancelled") == {"j"}

    @pytest.mark.servers("real", "embedded")
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    async def test_the_server_is_stopped(self, own_db: Callable[..., Watched], number: signal.Signals) -> None:
        db = own_db()
        process = await start(db, "run", slow("j", 60), "--id", "j")
        await db.at_work("j")
        db.close()
        db.server.stop()
        try:
            process.send_signal(number)
            printed, code = await output_of(process)
        finally:
            db.server.start()

        assert code == ExitCode.UNREACHABLE, printed
        assert "could not be decided within 3 s" in printed
        assert "Nothing was launched" not in printed

    @pytest.mark.servers("real", "embedded")
    async def test_no_connection_left_before_the_launch(self, own_db: Callable[..., Watched]) -> None:
        """The login may have no connection any more while the job waits for its series: nothing was launched."""
        db = own_db()
        assert await (await start(db, "run", "select 1", "--series", "s", "--generation", "1")).wait() == 0
        (key,) = db.sql("select pgbg.lock_key('series', %s, pgbg.digest('s'))", APP)[0]
        db.sql("select pg_advisory_lock(%s)", key)
        process = await start(db, "run", effect("j"), "--id", "j", "--series", "s", "--generation", "2")
        await eventually(lambda: "j" in db.states(), "it is registered, and waits")
        await eventually(lambda: db.sessions("pgbg: looking"), "it looks for its turn")
        db.sql(f"alter role {APP} connection limit 0")
        db.sql("select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'pgbg: %%'")
        process.send_signal(signal.SIGTERM)
        printed, code = await output_of(process)

        assert code == ExitCode.UNREACHABLE, printed
        assert errors.NOT_BY_THIS_CALL in " ".join(printed.split())
        assert db.effects() == 0

    async def test_before_the_server_answers(self, db: Watched, proxy: Proxy) -> None:
        when = proxy.when(TO_CLIENT, 1, stall=TO_CLIENT)
        process = await start(db, "run", effect("j"), "--id", "j", dsn=proxy.through(db.conninfo))
        await asyncio.to_thread(when.wait)

        process.send_signal(signal.SIGINT)
        printed, code = await output_of(process)

        assert code == ExitCode.CANCELLED, printed
        assert "before anything was launched" in printed
        assert errors.NOT_BY_THIS_CALL in " ".join(printed.split())
        proxy.cut()
        assert db.effects() == 0

    @pytest.mark.parametrize("kind", ["session", "supervised"])
    async def test_a_job_without_a_receipt_of_its_own(self, db: Watched, kind: str) -> None:
        process = await start(db, "run", "select pg_sleep(60)", "--kind", kind)
        await eventually(lambda: sleepers(db), "its worker")

        process.send_signal(signal.SIGINT)
        printed, code = await output_of(process)

        assert code == ExitCode.CANCELLED, printed
        await eventually(lambda: not sleepers(db), "its worker ends")


def sleepers(db: Watched) -> list[tuple[Any, ...]]:
    """Who sleeps in this database: (pid,). A worker of the stand-in is a client like any other."""
    return db.sql("select pid from pg_stat_activity where datname = %s and wait_event = 'PgSleep'", db.database.name)
