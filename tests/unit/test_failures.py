"""What an error advises is what is known, and no more."""

from __future__ import annotations

import pytest

from pgbg_orchestration.walk.failures import what_ended


@pytest.mark.parametrize(
    ("ran_for", "limits", "said"),
    [
        (30.02, {"statement_timeout": 30.0}, "its statement_timeout is 30 s"),
        (29.9, {"statement_timeout": 30.0}, "its statement_timeout is 30 s"),
        (12.0, {"statement_timeout": 30.0}, "no timeout in force was as short"),
        (
            31.0,
            {"statement_timeout": 30.0, "pg_background.worker_timeout": 10.0},
            "pg_background.worker_timeout is 10 s",
        ),
        (3.0, {}, "somebody's pg_cancel_backend"),
        (None, {"statement_timeout": 30.0}, "Nobody asked this job to end"),
    ],
)
def test_which_of_the_causes_of_57014_it_was(ran_for: float | None, limits: dict[str, float], said: str) -> None:
    assert said in what_ended(ran_for, limits)
