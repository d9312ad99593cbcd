"""The benchmark's charts have a bar for each ratio and for each point, the longest for the greatest."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

from benchmarks.plots import charts, write
from benchmarks.rows import Point, Row


def test_points_are_gathered_by_chart() -> None:
    rows = [
        Row("a", "1 s", points=(Point("Waiting (s)", 10, 1.0), Point("CPU (%)", 10, 3.0))),
        Row("b", "2 s", points=(Point("Waiting (s)", 1_000, 2.0),)),
        Row("c", "3 s"),
    ]
    assert charts(rows) == {"Waiting (s)": [("10", 1.0), ("1,000", 2.0)], "CPU (%)": [("10", 3.0)]}


def test_the_file_is_an_svg_with_all_of_them(tmp_path: Path) -> None:
    rows = [Row("ours", "2 s", "theirs: 1 s", 2.0), Row("more", "7 s", points=(Point("Growth", 1_000, 7.0),))]
    write(tmp_path / "all.svg", rows, "a machine")
    assert "url(http" not in (tmp_path / "all.svg").read_text()
    text = " ".join(" ".join(ET.parse(tmp_path / "all.svg").getroot().itertext()).split())
    for told in ("ours", "2 ×", "Growth", "1,000", "a machine"):
        assert told in text.replace("\xa0", " ")
