"""How a state looks: its sign everywhere, and its style in a terminal (on the page: ``web/pgbg.css``)."""

from __future__ import annotations

from pgbg_orchestration.ledger.history import STATES

BY_HAND = "by hand"
"""The state of a worker that no job is known of: somebody launched it without this package."""
NOT_VISIBLE = "not visible"
"""The state of another login's worker: whether it was launched by hand, or runs a job of that login's, is not seen."""
ALL_STATES = (*STATES, BY_HAND, NOT_VISIBLE)

SIGNS = {
    "running": "▶",
    "waiting": "…",
    "committed": "✓",
    "cancelled": "⊘",
    "failed": "✗",
    "lost": "✗",
    "unknown": "?",
    BY_HAND: "☞",
    NOT_VISIBLE: "◌",
}
"""A sign for each state, so that colour is never all that tells them apart."""

STYLES = {
    "running": "bold dodger_blue1",
    "waiting": "cyan",
    "committed": "green",
    "cancelled": "yellow",
    "failed": "bold red",
    "lost": "bold red",
    "unknown": "bold magenta",
    BY_HAND: "bold white",
    NOT_VISIBLE: "dim",
}
"""A style of rich for each state."""
