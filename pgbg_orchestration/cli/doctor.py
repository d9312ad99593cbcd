"""``pgbg doctor``."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import groupby

from rich.table import Table
from rich.text import Text

from pgbg_orchestration.doctor.examination import Finding, Status, examine, worst

from .codes import ExitCode
from .screen import Stop, ending, out, plain, print_json, print_todo
from .shared_options import Dsn, Json, Schema

NAME_WIDTH = 20
_SIGNS = {
    Status.OK: ("✓", "green"),
    Status.WARNING: ("!", "bold yellow"),
    Status.FAILS: ("✗", "bold red"),
    Status.HIDDEN: ("?", "dim"),
}
_CODES = {
    Status.OK: ExitCode.OK,
    Status.WARNING: ExitCode.DOCTOR_WARNS,
    Status.FAILS: ExitCode.DOCTOR_FAILS,
}


def doctor(dsn: Dsn = None, schema: Schema = "pgbg", json: Json = False) -> None:
    """Look a server over: can jobs run there, and what is to be done. Changes nothing.

    Ends with 0 when all is well, 13 when something fails, 14 when there are warnings only.
    """
    with ending(json):
        findings = asyncio.run(examine(dsn or "", schema=schema))
        if json:
            print_json({"status": worst(findings), "findings": findings})
        else:
            _show(findings)
        raise Stop(_CODES[worst(findings)])


def _show(findings: list[Finding]) -> None:
    width = min(max(len(finding.name) for finding in findings), NAME_WIDTH)
    for group, members in groupby(findings, key=lambda finding: finding.group):
        out.print(Text(f"\n{group}", "bold"))
        for finding in members:
            sign, style = _SIGNS[finding.status]
            line = Table.grid(padding=(0, 1), expand=True)
            line.add_column(width=2, justify="right")
            line.add_column(width=width, overflow="fold")
            line.add_column(ratio=1)
            text = plain(finding.text)
            shown = "" if finding.status is Status.OK else style
            line.add_row(Text(sign, style), Text(finding.name, shown), Text(text, "dim" if shown == "dim" else ""))
            out.print(line)
            if finding.todo:
                print_todo(out, finding.todo, indent=width + 4)
    counts = Counter(finding.status for finding in findings)
    words = {Status.FAILS: "failing", Status.WARNING: "to watch", Status.HIDDEN: "not visible", Status.OK: "ok"}
    parts = [
        Text(f"{_SIGNS[status][0]} {counts[status]} {word}", _SIGNS[status][1])
        for status, word in words.items()
        if counts[status]
    ]
    out.print()
    out.print(Text("   ").join(parts))
