"""Servers whose extension is built from a directory with its source."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.servers import fifteen


def test_real15_asks_for_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fifteen.SOURCE_VARIABLE, raising=False)
    assert fifteen.SOURCE_VARIABLE in (fifteen.why_not() or "")


@pytest.mark.parametrize(
    ("control", "told"),
    [
        (None, "there is no"),
        ("default_version = '2.0'\n", "is not 1.10"),
        ("comment = 'of no version'\n", "says nothing"),
    ],
)
def test_real15_takes_the_source_of_its_own_version_only(
    control: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if control is not None:
        (tmp_path / "pg_background.control").write_text(control)
    monkeypatch.setenv(fifteen.SOURCE_VARIABLE, str(tmp_path))
    assert told in (fifteen.why_not() or "")


def test_real15_says_which_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pg_background.control").write_text("default_version = '1.10'\n")
    monkeypatch.setenv(fifteen.SOURCE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(fifteen, "MAKEFILES", tmp_path / "pgxs.mk")
    assert "postgresql-server-dev-15" in (fifteen.why_not() or "")
