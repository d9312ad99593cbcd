"""The operators: what a DAG file names. Each is imported when it is first used, so that the file pays for no other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import PgBackgroundBatchOperator
    from .job import PgBackgroundOperator

__all__ = ["PgBackgroundBatchOperator", "PgBackgroundOperator"]

_LATER = {"PgBackgroundBatchOperator": "batch", "PgBackgroundOperator": "job"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LATER[name]}", __name__), name)
