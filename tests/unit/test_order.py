"""Where the tests' data are, and the order in which several processes begin the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.order import longest_first
from tests.servers import memory

TESTS = """
import pytest

@pytest.mark.parametrize("server_kind", range({servers}))
def test_server(server_kind): ...

@pytest.mark.parametrize("n", range(3))
def test_other(n): ...
"""
SLOW = """
@pytest.mark.slow
def test_slow(): ...
"""


class Collected:
    """A pytest plugin that keeps what was collected."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def test_the_longest_file_comes_first(tmp_path: Path) -> None:
    for name, servers, slow in (("a", 1, ""), ("b", 5, ""), ("c", 1, SLOW), ("d", 5, "")):
        (tmp_path / f"test_{name}.py").write_text(TESTS.format(servers=servers) + slow)
    collected = Collected()
    options = ["--collect-only", "-qq", "-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function"]
    assert pytest.main([*options, str(tmp_path)], [collected]) == 0
    items = list(collected.items)
    longest_first(items)
    assert list(dict.fromkeys(item.path.stem for item in items)) == ["test_c", "test_b", "test_d", "test_a"]
    for stem in ("test_a", "test_b", "test_c", "test_d"):  # within a file, as they were
        of_it = [item.name for item in collected.items if item.path.stem == stem]
        assert [item.name for item in items if item.path.stem == stem] == of_it


@pytest.mark.parametrize(("needed", "there"), [(0, True), (2**60, False)])
def test_data_are_in_memory_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: int, there: bool
) -> None:
    monkeypatch.setattr(memory, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(memory, "NEEDED", needed)
    assert memory.in_memory.__wrapped__() == (tmp_path if there else None)


def test_data_are_on_the_disk_where_there_is_no_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SHARED_MEMORY", tmp_path / "none")
    assert memory.in_memory.__wrapped__() is None
