"""SQL text as statements: splitting it, classifying them, and refusing what cannot run in a worker."""

from .assignments import applied
from .known import CACHED_CHARACTERS, CACHED_TEXTS, split_again
from .lexer import UnterminatedSql
from .refuse import EmptySql, RefusedStatement, best_alone, check, outside_transaction, takes_slot
from .split import SEPARATOR, Statement, join, split

__all__ = [
    "CACHED_CHARACTERS",
    "CACHED_TEXTS",
    "SEPARATOR",
    "EmptySql",
    "RefusedStatement",
    "Statement",
    "UnterminatedSql",
    "applied",
    "best_alone",
    "check",
    "join",
    "outside_transaction",
    "split",
    "split_again",
    "takes_slot",
]
