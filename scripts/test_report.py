"""Print where the tests ran, how long, and what was skipped, from JUnit reports: python scripts/test_report.py FILE...

A test that is run on several servers carries the server's name in its id, in square brackets, as in
``test_launch[real]`` or ``test_launch[standin19-vacuum]``.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from xml.etree import ElementTree as ET

LONGEST = 10
"""How many folders and files are named with their seconds."""
SERVERS = {"real", "embedded", "standin20", "standin19", "standin14", "standin15", "standin16", "standin17"}


def server_of(name: str) -> str:
    """Return the server that a test's id names, or "no server named"."""
    parameters = re.search(r"\[(.*)\]$", name)
    for word in re.split(r"[-, ]", parameters[1] if parameters else ""):
        if word in SERVERS:
            return word
    return "no server named"


def cases_of(path: str) -> Iterator[ET.Element]:
    """Return the test cases of a report."""
    try:
        # The file was written by the pytest that ran a moment ago.
        return ET.parse(path).iter("testcase")  # noqa: S314
    except (OSError, ET.ParseError):
        sys.exit(f"{path} is no report: pytest ended before it ran a test")


def file_of(case: ET.Element) -> str:
    """Return the file of a test, from the class name that pytest writes: ``tests.unit.test_pace.TestPace``."""
    parts = case.get("classname", "").split(".")
    return "/".join(parts[: next((n for n, part in enumerate(parts, 1) if part.startswith("test_")), len(parts))])


def longest(seconds: Mapping[str, float]) -> str:
    """Return the names with the most seconds, most first."""
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {number:.0f}" for name, number in ordered[:LONGEST])


def main(paths: Sequence[str]) -> None:
    """Read the reports and print them by server, then the seconds by folder and file, then the skips by reason."""
    counts: Counter[tuple[str, str]] = Counter()
    skips: Counter[str] = Counter()
    folders: defaultdict[str, float] = defaultdict(float)
    files: defaultdict[str, float] = defaultdict(float)
    for case in chain.from_iterable(map(cases_of, paths)):
        ended = next((child for child in case if child.tag in {"skipped", "failure", "error"}), None)
        kind = "passed" if ended is None else {"skipped": "skipped"}.get(ended.tag, "failed")
        counts[server_of(case.get("name", "")), kind] += 1
        file, took = file_of(case), float(case.get("time", "0"))
        folders[file.rpartition("/")[0]] += took
        files[file] += took
        if ended is not None and kind == "skipped":
            skips[(ended.get("message") or "no reason given").splitlines()[0]] += 1
    for server in sorted({server for server, _ in counts}):
        numbers = ", ".join(f"{counts[server, kind]} {kind}" for kind in ("passed", "failed", "skipped"))
        sys.stdout.write(f"{server:<24} {numbers}\n")
    sys.stdout.write(f"seconds of tests, several at a time: {longest(folders)}\n")
    sys.stdout.write(f"the longest files: {longest(files)}\n")
    for reason, count in skips.most_common():
        sys.stdout.write(f"skipped {count:>4}: {reason}\n")
    if not skips:
        sys.stdout.write("nothing was skipped\n")


if __name__ == "__main__":
    main(sys.argv[1:])
