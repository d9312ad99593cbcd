"""A launching process whose verdict is broken on purpose: "completed and no error" is a success to it."""

from __future__ import annotations

import runpy

from pgbg_orchestration.verdict import Evidence, Receipt, Report, Step, judge
from pgbg_orchestration.walk import run


def hopeful(evidence: Evidence) -> Step:
    done = evidence.report is Report.ENDED and evidence.receipt is Receipt.NONE
    return Step.COMMITTED if done else judge(evidence)


if __name__ == "__main__":
    run.judge = hopeful  # type: ignore[attr-defined]
    runpy.run_module("tests.core.child", run_name="__main__")
