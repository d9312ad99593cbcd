"""When the tree with pg_background for PostgreSQL 19 is built anew: see tests/servers/experimental.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.servers.debian import DebianTree, ServerUnavailableError
from tests.servers.experimental import SOURCE_DIRECTORY, SOURCE_VARIABLE, ExtensionTree

LIBRARY = "usr/lib/postgresql/19/lib/pg_background.so"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source of the extension that the environment names."""
    source = tmp_path / "source"
    (source / "src").mkdir(parents=True)
    (source / "src/pg_background.c").write_text("int a;")
    (source / "Makefile").write_text("all:")
    monkeypatch.setenv(SOURCE_VARIABLE, str(source))
    return source


@pytest.fixture
def tree(tmp_path: Path, source: Path) -> ExtensionTree:
    """A tree that was built from that source."""
    tree = ExtensionTree(tmp_path / "servers")
    testing = DebianTree(tree.directory).root / "usr/lib/postgresql/18/lib/pg_background.so"
    for file in (testing, tree.root / "usr/lib/postgresql/19/bin/postgres", tree.root / LIBRARY):
        file.parent.mkdir(parents=True)
        file.touch()
    (tree.root / "etc/apt/sources.list.d").mkdir(parents=True)
    shutil.copytree(source, tree.root / SOURCE_DIRECTORY / "unpacked")
    return tree


def test_the_source_that_is_named_is_what_is_built(tree: ExtensionTree, source: Path) -> None:
    assert tree.is_built()
    (source / "src/pg_background.o").touch()  # somebody compiled there
    assert tree.is_built()
    (source / "src/pg_background.c").write_text("int b;")
    assert not tree.is_built()


def test_a_file_that_was_not_there(tree: ExtensionTree, source: Path) -> None:
    (source / "src/pg_background.h").touch()
    assert not tree.is_built()


def test_no_source_is_named(tree: ExtensionTree, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "src/pg_background.c").write_text("int b;")
    monkeypatch.delenv(SOURCE_VARIABLE)
    assert tree.is_built()


def test_a_build_that_fails_leaves_no_library_of_another_source(
    tree: ExtensionTree, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new source is in the tree then, so the old library would pass for its own."""
    (source / "src/pg_background.c").write_text("not C")

    def fails(script: str, otherwise: str) -> None:
        raise ServerUnavailableError(otherwise)

    monkeypatch.setattr(tree, "_do", fails)
    monkeypatch.setattr(tree, "why_not", lambda: None)
    with pytest.raises(ServerUnavailableError):
        tree.ensure()
    assert not (tree.root / LIBRARY).exists()
    assert not tree.is_built()
