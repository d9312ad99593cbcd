"""A launching process of a test's own: reads orders from stdin, one JSON object a line, and answers on stdout.

Orders: ``{"tag", "op": "run", "job": {...}, "options": {...}}``, ``{"tag", "op": "cancel", "job_id"}``,
``{"tag", "op": "cancel_task", "of": tag}``. Answers: ``{"tag", "outcome": {...}}`` or ``{"tag", "error": class name,
"sqlstate", "message", "data_state"}``. Orders run side by side; stdin's end ends the process once all are answered.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from typing import Any

from pgbg_orchestration import Job, Launcher
from pgbg_orchestration.errors import PgbgError


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer, default=str) + "\n")
    sys.stdout.flush()


async def _obey(launcher: Launcher, order: dict[str, Any], tasks: dict[str, asyncio.Task[None]]) -> None:
    tag = order["tag"]
    try:
        if order["op"] == "run":
            outcome = await launcher.run(Job(**order["job"]), **order.get("options", {}))
            _say({"tag": tag, "outcome": asdict(outcome)})
        elif order["op"] == "cancel":
            _say({"tag": tag, "outcome": await launcher.cancel(order["job_id"])})
        elif order["op"] == "cancel_task":
            tasks[order["of"]].cancel()
            await asyncio.wait([tasks[order["of"]]])
            _say({"tag": tag, "outcome": "ended"})
    except asyncio.CancelledError:
        _say({"tag": tag, "error": "CancelledError", "sqlstate": None, "message": "", "data_state": ""})
    except PgbgError as error:
        told = {"sqlstate": error.sqlstate, "message": str(error), "data_state": error.data_state}
        _say({"tag": tag, "error": type(error).__name__, **told})


async def _main(conninfo: str) -> None:
    reader = asyncio.StreamReader(limit=2**26)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks: dict[str, asyncio.Task[None]] = {}
    async with Launcher(conninfo) as launcher:
        _say({"tag": "ready"})
        while line := await reader.readline():
            order = json.loads(line)
            tasks[order["tag"]] = asyncio.create_task(_obey(launcher, order, tasks))
        if tasks:
            await asyncio.wait(tasks.values())


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
