"""A database for the views: the core's own, in which jobs and workers can be left behind at will."""

from __future__ import annotations

from tests.core.conftest import db  # noqa: F401
