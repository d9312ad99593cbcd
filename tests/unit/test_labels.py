"""Labels: comparing them with what the server shows, and shortening them so that jobs stay told apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgbg_orchestration import errors
from pgbg_orchestration.labels import NAME_BYTES, VISIBLE, LabelPattern, make_label, shorten_label, shown, worker_name

LABELS = st.text(st.characters(exclude_characters="*?\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: len(text.encode()) <= 64
)
PIDS = st.integers(1, 4_194_304)
VERSIONS = st.sampled_from([140000, 150000, 160000, 180006])


@pytest.mark.parametrize(
    ("label", "seen", "before_16"),
    [
        ("plain", "plain", "plain"),
        ("é", r"\xc3\xa9", "??"),
        ("tab\there", r"tab\x09here", "tab?here"),
        ("\x7f", r"\x7f", "?"),
        (r"a\x41b", r"a\x41b", r"a\x41b"),
        ("😀", r"\xf0\x9f\x98\x80", "????"),
    ],
)
def test_how_a_label_looks(label: str, seen: str, before_16: str) -> None:
    assert shown(label) == seen
    assert shown(label, server_version=150000) == before_16


@given(label=LABELS, pid=PIDS, version=VERSIONS)
def test_a_label_fits_its_own_worker(label: str, pid: int, version: int) -> None:
    name = worker_name(label, pid, server_version=version)
    assert len(name) <= NAME_BYTES
    assert LabelPattern(label, server_version=version).fits(name, pid)


@given(label=LABELS, pid=PIDS, version=VERSIONS, data=st.data())
def test_a_pattern_fits_what_its_wildcards_stand_for(label: str, pid: int, version: int, data: st.DataObject) -> None:
    pattern = "".join(data.draw(st.sampled_from([character, "?", "*", f"*{character}"])) for character in label)
    assert LabelPattern(pattern, server_version=version).fits(worker_name(label, pid, server_version=version), pid)


@given(label=LABELS, other=LABELS, pid=PIDS)
def test_labels_that_look_different_do_not_fit(label: str, other: str, pid: int) -> None:
    names = [worker_name(text, pid) for text in (label, other)]
    assert LabelPattern(label).fits(names[1], pid) is (names[0] == names[1])


@pytest.mark.parametrize(
    ("pattern", "label"),
    [
        ("load", "loads"),
        ("load?", "load"),
        ("l?d", "load"),
        ("*b", "a"),
        ("?", "éé"),
        ("a?", "aéb"),
        ("a*c", "abd"),
        ("é*", "e"),
    ],
)
def test_what_does_not_fit(pattern: str, label: str) -> None:
    assert not LabelPattern(pattern).fits(worker_name(label, 4711), 4711)


def test_the_pid_is_no_part_of_the_label() -> None:
    assert not LabelPattern("load").fits("pg_background:load:47", 4711)
    assert LabelPattern("load:47").fits("pg_background:load:47:4711", 4711)
    assert not LabelPattern("load").fits("pg_background:load:47:4711", 4711)
    assert not LabelPattern("*").fits("psql", 4711)


def test_another_encoding() -> None:
    pattern = LabelPattern("caf? é")
    assert pattern.texts() == ["caf", " é"]
    latin1 = LabelPattern("caf? é", [text.encode("latin-1") for text in pattern.texts()])
    name = f"pg_background:{shown('café é'.encode('latin-1'))}:4711"
    assert latin1.fits(name, 4711)
    assert not pattern.fits(name, 4711)


# Shortening -----------------------------------------------------------------------------------------------------------


@given(text=st.text(min_size=1).filter(lambda text: not any(0xD800 <= ord(c) <= 0xDFFF for c in text)), pid=PIDS)
def test_a_shortened_label_is_seen_whole(text: str, pid: int) -> None:
    label = shorten_label(text)
    assert len(shown(label)) <= VISIBLE
    assert worker_name(label, pid).startswith(f"pg_background:{shown(label)}")
    assert len(label.encode()) <= 64
    assert not any(ord(character) < 32 for character in label)


def test_what_tells_labels_apart_survives() -> None:
    texts = [
        f"a_dag_with_a_very_long_name_{middle}_and_more_of_it.the_task_that_loads_{end}"
        for middle in ("north", "south")
        for end in ("orders", "orders[1]", "orders[12]", "orders[1].a member")
    ]
    labels = [shorten_label(text) for text in texts]
    assert len({worker_name(label, 1) for label in labels}) == len(texts)
    for text, label in zip(texts, labels, strict=True):
        assert label.startswith(text[:10])
        assert label.endswith(text[-20:])


def test_a_label_that_is_seen_whole_stays_as_it_is() -> None:
    assert shorten_label("sales.load[3]") == "sales.load[3]"
    assert shorten_label("x" * VISIBLE) == "x" * VISIBLE


def test_a_label_of_parts() -> None:
    assert make_label("billing", "prod", 4711) == "billing/prod/4711"
    assert make_label("a", "b", separator=" ") == "a b"
    long = make_label("billing" * 9, "prod", "req-4711")
    assert long.endswith("/prod/req-4711")
    assert len(shown(long)) <= VISIBLE


@pytest.mark.parametrize("parts", [(), ("",), ("a", " "), ("a/b", "c"), ("a\n",)])
def test_parts_that_could_not_be_taken_apart(parts: tuple[str, ...]) -> None:
    with pytest.raises(errors.InvalidJob, match="part"):
        make_label(*parts)
