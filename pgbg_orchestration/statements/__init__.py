"""SQL text as statements: splitting it, classifying them, and refusing what cannot run in a worker."""

from .lexer import UnterminatedSql
from .refuse import EmptySql, RefusedStatement, check, may_commit, outside_transaction
from .split import SEPARATOR, Statement, join, split

__all__ = [
    "SEPARATOR",
    "EmptySql",
    "RefusedStatement",
    "Statement",
    "UnterminatedSql",
    "check",
    "join",
    "may_commit",
    "outside_transaction",
    "split",
]
