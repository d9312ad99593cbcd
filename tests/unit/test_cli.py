"""``pgbg`` without a server: its options, its exit codes, its words, and what comes from elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pgbg_orchestration import errors
from pgbg_orchestration.cli import app
from pgbg_orchestration.cli.codes import AFTERWARDS, MEANINGS, ExitCode, code_for
from pgbg_orchestration.cli.screen import ago, plain
from pgbg_orchestration.cli.shared_options import _seconds, _seconds_with_unit, pairs
from pgbg_orchestration.ledger import install
from pgbg_orchestration.phrases import duration

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"
COMMANDS = ("run", "jobs", "cancel", "prune", "doctor", "install", "uninstall", "server")
PGBG = [sys.executable, "-m", "pgbg_orchestration"]
NOWHERE = ["--dsn", "host=127.0.0.1 port=1 connect_timeout=2"]


@pytest.fixture
def pgbg(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    return CliRunner()


class TestHelp:
    def test_every_command_is_listed(self, pgbg: CliRunner) -> None:
        shown = pgbg.invoke(app, ["--help"]).stdout

        assert [name for name in COMMANDS if not re.search(rf"^│ {name}\b", shown, re.MULTILINE)] == []

    def test_every_exit_code_is_told(self, pgbg: CliRunner) -> None:
        shown = pgbg.invoke(app, ["--help"]).stdout

        told = {int(code): text.strip() for code, text in re.findall(r"^ +(\d+)  (.+)$", shown, re.MULTILINE)}
        assert told == {int(code): text.replace("`", "") for code, text in MEANINGS.items()}

    def test_the_docs_tell_the_same_exit_codes(self) -> None:
        assert AFTERWARDS in DOCS.read_text()
        rows = re.findall(r"^\| (\d+) \| (.+?) \|$", DOCS.read_text(), re.MULTILINE)

        assert {int(code): text for code, text in rows} == {int(code): text for code, text in MEANINGS.items()}

    @pytest.mark.parametrize("command", COMMANDS)
    def test_the_docs_tell_every_option(self, pgbg: CliRunner, command: str) -> None:
        shown = pgbg.invoke(app, [command, "--help"]).stdout
        options = set(re.findall(r"(--[a-z][a-z-]+)", shown)) - {"--help"}

        assert {option for option in options if option not in DOCS.read_text()} == set()

    def test_the_version(self, pgbg: CliRunner) -> None:
        shown = pgbg.invoke(app, ["--version"])

        assert shown.exit_code == ExitCode.OK
        assert re.fullmatch(r"pgbg \d+\.\d+\.\d+\n", shown.stdout)


class TestExitCodes:
    def test_every_code_has_a_meaning(self) -> None:
        assert set(MEANINGS) == set(ExitCode)

    def test_no_error_ends_like_a_success_or_a_bug(self) -> None:
        kinds = [kind for name in errors.__all__ if isinstance(kind := getattr(errors, name), type)]
        raised = [kind for kind in kinds if issubclass(kind, errors.PgbgError)]
        made = [
            kind("it happened", fields=errors.NO_FIELDS) if kind is errors.WorkerError else kind("it happened")
            for kind in raised
        ]

        assert {code_for(error) for error in made} & {ExitCode.OK, ExitCode.BUG} == set()
        assert code_for(errors.Superseded("newer")) is ExitCode.CANCELLED
        assert code_for(errors.ExtensionMissing("not there")) is ExitCode.NOT_READY

    @pytest.mark.parametrize(
        "arguments",
        [
            ["run", "select 1", *NOWHERE],
            ["jobs", *NOWHERE],
            ["cancel", "some-job", *NOWHERE],
            ["prune", "--older-than", "30d", *NOWHERE],
            ["doctor", *NOWHERE],
            ["install", *NOWHERE],
            ["uninstall", "--yes", *NOWHERE],
            ["server", "status", "--data-dir", "/nonexistent"],
        ],
        ids=lambda arguments: arguments[0],
    )
    def test_a_server_that_is_not_there(self, pgbg: CliRunner, arguments: list[str]) -> None:
        people = pgbg.invoke(app, arguments)
        machines = pgbg.invoke(app, [*arguments, "--json"])

        assert (people.exit_code, machines.exit_code) == (ExitCode.UNREACHABLE, ExitCode.UNREACHABLE)
        assert people.stdout == ""
        assert "unreachable" in people.stderr
        assert arguments[0] == "server" or "Check that the server runs" in people.stderr
        assert json.loads(machines.stdout)["exit_code"] == ExitCode.UNREACHABLE

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["run", "select 1", "-f", __file__], "given twice"),
            (["run", "select 1", "-p", "name"], "NAME=VALUE"),
            (["run", "select 1", "-p", "a=1", "-p", "a=2"], "given twice"),
            (["run", "select 1", "--timeout", "soon"], "no duration"),
            (["run", "select 1", "--timeout", "0"], "timeout"),
            (["run", "select 1", "--generation", "3"], "generation"),
            (["run", "select 1", "--set", "role=me"], "role"),
            (["run", "select 1", "--isolation", "read-uncommitted"], "isolation"),
            (["run", "begin; select 1; commit"], "transaction control"),
            (["run", "select 'open"], "string"),
            (["run", " -- nothing"], "empty"),
            (["run", "-- nothing"], "only comments"),
            (["run", "--nothing\n;"], "only comments"),
            (["run", "--tiemout", "5", "select 1"], "No such option"),
            (["cancel"], "which job"),
            (["cancel", "some-job", "--label", "some label"], "which job"),
            (["jobs", "--state", "done"], "none of running"),
            (["jobs", "--dsn", ""], "empty"),
            (["jobs", "--dsn", "secret"], "not a connection string"),
            (["prune", "--older-than", "30"], "no unit"),
            (["prune", "--older-than", "6d"], "retry horizon"),
            (["prune", "--older-than", "6d", "--retry-horizon", "6.5d"], "retry horizon"),
            (["server", "start", "--surface", "3.0"], "3.0"),
        ],
        ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else None,
    )
    def test_refused_input(self, pgbg: CliRunner, arguments: list[str], words: str) -> None:
        ended = pgbg.invoke(app, arguments)

        assert ended.exit_code == ExitCode.REFUSED, ended.output
        assert words in ended.stderr
        assert "secret" not in ended.output

    def test_sql_that_is_not_utf8(self, pgbg: CliRunner) -> None:
        ended = pgbg.invoke(app, ["run"], input=b"select '\xff'")

        assert ended.exit_code == ExitCode.REFUSED
        assert "not UTF-8" in ended.stderr


class TestTheMachine:
    def test_without_libpq(self) -> None:
        lacking = {**os.environ, "PSYCOPG_IMPL": "no such implementation"}
        done = subprocess.run([*PGBG, "jobs"], env=lacking, capture_output=True, text=True)

        assert (done.returncode, done.stdout) == (ExitCode.BUG, "")
        assert "pip install" in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_terminal_without_our_signs(self) -> None:
        plain_ascii = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}
        done = subprocess.run([*PGBG, "jobs", *NOWHERE], env=plain_ascii, capture_output=True, text=True)

        assert done.returncode == ExitCode.UNREACHABLE, done.stderr
        assert "? unreachable" in done.stderr


class TestInstallPrint:
    def test_the_checksum_is_that_of_the_sql_between_the_lines(self, pgbg: CliRunner) -> None:
        printed = pgbg.invoke(app, ["install", "--print", "--schema", "other", "--owner", "somebody"]).stdout
        checksum = re.search(r"^-- sha256 ([0-9a-f]{64})$", printed, re.MULTILINE)
        body = printed.split("-- ----\n")[1]

        assert checksum is not None
        assert checksum[1] == hashlib.sha256(body.encode()).hexdigest()
        assert body == install.plan(0, schema="other", owner="somebody").text

    def test_for_machines(self, pgbg: CliRunner) -> None:
        printed = json.loads(pgbg.invoke(app, ["install", "--print", "--json"]).stdout)

        assert printed["version"] == install.VERSION
        assert printed["checksum"] == install.plan(0).checksum
        assert printed["sql"] == install.plan(0).text

    def test_nothing_to_do_and_a_version_from_the_future(self, pgbg: CliRunner) -> None:
        current = pgbg.invoke(app, ["install", "--print", "--from-version", str(install.VERSION)])
        newer = pgbg.invoke(app, ["install", "--print", "--from-version", str(install.VERSION + 1)])

        assert (current.exit_code, current.stdout) == (0, f"-- pgbg schema, version {install.VERSION}: nothing to do\n")
        assert newer.exit_code == ExitCode.NOT_READY


class TestValues:
    @pytest.mark.parametrize(
        ("text", "seconds"), [("90", 90), ("1.5", 1.5), ("90s", 90), ("15m", 900), ("2 h", 7200), ("7D", 604800)]
    )
    def test_durations(self, text: str, seconds: float) -> None:
        assert _seconds(text) == seconds

    @pytest.mark.parametrize("text", ["", "s", "-1", "1y", "1h30m", "inf", "nan"])
    def test_what_is_no_duration(self, text: str) -> None:
        with pytest.raises(typer.BadParameter):
            _seconds_with_unit(text)

    def test_pairs(self) -> None:
        assert pairs(["a=1", "b=", "c=x=y"], "--param") == {"a": "1", "b": "", "c": "x=y"}

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0, "0 ms"), (0.0123, "12 ms"), (1, "1.0 s"), (59.96, "1:00 min"), (245, "4:05 min"), (7390, "2:03:10 h")],
    )
    def test_how_durations_are_shown(self, seconds: float, text: str) -> None:
        assert duration(seconds) == text

    @pytest.mark.parametrize(
        ("seconds", "text"), [(5, "5 s ago"), (125, "2 min ago"), (7300, "2 h ago"), (200000, "2 d ago")]
    )
    def test_how_long_ago(self, seconds: float, text: str) -> None:
        assert ago(datetime.now(UTC) - timedelta(seconds=seconds)) == text

    def test_text_from_elsewhere_steers_no_terminal(self) -> None:
        assert plain("\x1b[31mred\x07\r\n\tübrig\u202e") == "·[31mred··␤ übrig·"
        assert plain("two\nlines", keep_lines=True) == "two\nlines"
