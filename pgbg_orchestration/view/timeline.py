"""The page as one file that needs no network: everything is in it, and it asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence

from pgbg_orchestration.ledger.board import Board
from pgbg_orchestration.ledger.history import JobEntry

from .web import data
from .web.assets import text_of


def file_of(board: Board, jobs: Sequence[JobEntry], *, more: bool) -> str:
    """Return the page with its data in it.

    Parameters
    ----------
    board:
        What runs now.
    jobs:
        The bars of the timeline.
    more:
        Older jobs were left out.
    """
    shown = {"board": data.of_board(board, {}), "jobs": data.of_history(jobs), "more": more}
    # Inside of a script element only "</" and "<!--" could end or change it.
    held = json.dumps(shown, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    scripts = [f"window.PGBG_FILE = {held};", text_of("plotly.min.js"), text_of("pgbg.js")]
    sources = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{text_of("pgbg.css")}</style>'
    page = text_of("page.html")
    lines = [line for line in page.splitlines() if "static/" not in line]
    body = "\n".join(lines).replace('<link rel="icon" href="data:,">', head)
    # Behind the body, where the page's own elements are there already.
    return body.replace("</body>", "\n".join(f"<script>{script}</script>" for script in scripts) + "\n</body>")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
