"""How a job's state looks in a terminal: its sign and its style, the same in every command."""

SIGNS = {
    "running": "▶",
    "waiting": "…",
    "committed": "✓",
    "cancelled": "⊘",
    "failed": "✗",
    "lost": "✗",
    "unknown": "?",
    "by hand": "☞",
    "not visible": "◌",
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
    "by hand": "bold white",
    "not visible": "dim",
}
"""A style of rich for each state."""
