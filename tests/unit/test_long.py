"""``make long`` goes on where it was interrupted, and takes nothing for passed that did not pass on this commit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import long


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file with a line for each step that ran; of the steps ``good`` and ``bad``."""
    log = tmp_path / "ran"
    step = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + ' '); sys.exit(sys.argv[2] == 'bad')"
    monkeypatch.setattr(long, "STEPS", {name: ["-c", step, str(log), name] for name in ("good", "bad")})
    monkeypatch.setattr(long, "PASSED", tmp_path / "passed.json")
    monkeypatch.setattr(long, "commit", lambda: "c1")
    return log


def test_a_step_that_passed_on_this_commit_is_not_run_again(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert long.main([]) == 1
    assert long.main([]) == 1, "one that failed is run again, and fails again"
    assert ran.read_text().split() == ["good", "bad", "bad"]
    assert "good: not run again: it passed at " in capsys.readouterr().out


def test_one_that_is_named_is_run_again(ran: Path) -> None:
    assert [long.main(["good"]), long.main(["good"])] == [0, 0]
    assert ran.read_text().split() == ["good", "good"]


def test_one_that_fails_this_time_has_passed_no_more(ran: Path) -> None:
    long.PASSED.write_text(json.dumps({"commit": "c1", "steps": {"bad": "passed"}}))
    assert long.main(["bad"]) == 1
    assert long.passed("c1") == {}


@pytest.mark.parametrize("now", ["c2", None], ids=["another commit", "a changed tree"])
def test_what_passed_on_another_tree_is_run(ran: Path, monkeypatch: pytest.MonkeyPatch, now: str | None) -> None:
    long.main(["good"])
    monkeypatch.setattr(long, "commit", lambda: now)
    long.main([])
    assert ran.read_text().split() == ["good", "good", "bad"]


def test_a_tree_that_changes_meanwhile_has_not_passed(ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["c1", "c2"])
    monkeypatch.setattr(long, "commit", lambda: next(commits))
    assert long.main(["good"]) == 0
    assert long.passed("c1") == {}
    assert ran.exists()
