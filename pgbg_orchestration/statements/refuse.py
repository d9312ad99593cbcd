"""Tells, before anything is launched, which statements a worker cannot run, and which only alone.

Each rule was tried on PostgreSQL 18 with pg_background 2.0, alone and beside other statements, and those of WAIT FOR
and REPACK on 19. What cannot be told from
the text (whether a procedure commits, whether a table is partitioned) is left to the server, which then fails with
25001 or 2D000 and rolls everything back.
"""

from collections.abc import Sequence
from itertools import pairwise

from .assignments import assignment, unhonoured
from .lexer import Token, TokenKind, tokens
from .split import Statement

__all__ = ["EmptySql", "RefusedStatement", "best_alone", "check", "outside_transaction"]

_EXCERPT = 60

_TRANSACTION_CONTROL = frozenset(
    {"BEGIN", "START", "COMMIT", "END", "ROLLBACK", "ABORT", "SAVEPOINT", "RELEASE", "PREPARE TRANSACTION"}
)
_CONTROL_REASON = "is transaction control, which a worker refuses (0A000): the statements of a job are one transaction"
_FIRST_REASON = (
    "sets what cannot change after a transaction's first query (25001), and the job's receipt is written first: "
    "give the isolation level as the job's isolation"
)
_COPY_REASON = (
    "copies from or to the client, and a worker has none: use a file, a program, or a query whose rows are read"
)
_LISTEN_REASON = "listens, which a background process cannot (0A000)"
_ALONE_REASON = "cannot run in a transaction, so it cannot share one: give it a job of its own"
_RECEIPT_REASON = "cannot run in a transaction, so it cannot leave a receipt in it: choose another kind of job"


class EmptySql(ValueError):
    """The SQL holds no statement: it is empty, or only comments and semicolons."""

    def __init__(self) -> None:
        super().__init__("the SQL holds no statement: it is empty, or only comments and semicolons")


class RefusedStatement(ValueError):
    """A statement cannot run in a worker, or not beside the others; nothing was launched.

    Attributes
    ----------
    number:
        Which statement of the job, counted from 1.
    line:
        The line that it starts in, in its text, counted from 1.
    excerpt:
        Its beginning, without comments and with string constants masked, since they may be secrets.
    reason:
        Why it is refused and what to do instead.
    """

    def __init__(self, number: int, line: int, excerpt: str, reason: str) -> None:
        super().__init__(f"statement {number} (line {line}) {reason}. The statement: {excerpt}")
        self.number = number
        self.line = line
        self.excerpt = excerpt
        self.reason = reason

    def __reduce__(self) -> tuple[type["RefusedStatement"], tuple[int, int, str, str]]:
        """Make it travel between processes: by default an exception is rebuilt from its message alone."""
        return type(self), (self.number, self.line, self.excerpt, self.reason)


def check(statements: Sequence[Statement], one_transaction: bool) -> None:
    """Refuse what no worker can run.

    Parameters
    ----------
    statements:
        The statements of one job.
    one_transaction:
        Whether the job runs them in one transaction with something else, such as its receipt. With
        False a single statement may be one that cannot run in a transaction.

    Raises
    ------
    EmptySql
        There is no statement.
    RefusedStatement
        A statement cannot run in a worker, or not beside the others.
    """
    if not statements:
        raise EmptySql
    shared = one_transaction or len(statements) > 1
    for number, statement in enumerate(statements, 1):
        reason = _refusal(statement, one_transaction=one_transaction)
        if reason is None and shared and outside_transaction(statement):
            reason = _ALONE_REASON if len(statements) > 1 else _RECEIPT_REASON
            if len(statements) > 1 and all(s is statement or assignment(s) for s in statements):
                reason += ", with what is set here as its settings"
        if reason is not None:
            raise RefusedStatement(number, statement.line, _excerpt(statement.text), reason)
    if found := unhonoured(statements):
        statement = statements[found.number - 1]
        raise RefusedStatement(found.number, statement.line, _excerpt(statement.text), found.reason)


def outside_transaction(statement: Statement) -> bool:
    """Tell whether the statement certainly fails in a transaction that holds anything else (25001).

    Source: each command's page in the manual ("cannot be executed inside a transaction block"). Not told, since the
    text does not: CALL and DO of code that commits, REINDEX and CLUSTER of a partitioned table or index, DROP
    SUBSCRIPTION of one with a replication slot.

    Parameters
    ----------
    statement:
        A statement from `split`.

    Returns
    -------
    True if it can only run alone, as the single statement of a launch.
    """
    match statement.keywords:
        case ("VACUUM", *_) | ("DISCARD", "ALL", *_) | ("ALTER", "SYSTEM", *_):
            return True
        case ("WAIT", "FOR", *_):
            return True  # PostgreSQL 19; it says 0A000 there
        case ("CREATE" | "DROP", "DATABASE" | "TABLESPACE", *_):
            return True
        case ("CREATE" | "DROP", "INDEX", "CONCURRENTLY", *_) | ("CREATE", "UNIQUE", "INDEX", "CONCURRENTLY", *_):
            return True
        case ("REINDEX", *_):
            return _reindex_outside(statement)
        case ("CLUSTER" | "REPACK", *_):
            return _cluster_outside(statement)
        case ("ALTER", "DATABASE", *_):
            return _has(statement, "SET", "TABLESPACE")
        case ("ALTER", "TABLE", *_):
            # CONCURRENTLY is reserved: unquoted it is never a name.
            return _has(statement, "DETACH", "PARTITION") and _words(statement)[-1:] == ["CONCURRENTLY"]
        case ("CREATE", "SUBSCRIPTION", *_):
            return not ({"CONNECT", "CREATE_SLOT"} & _switched_off(statement))
        case ("ALTER", "SUBSCRIPTION", *_):
            return _alter_subscription_outside(statement)
        case _:
            return False


def best_alone(statement: Statement) -> bool:
    """Tell whether the statement, alone in its job, is better off without a receipt in its transaction.

    Besides those that certainly fail there: CALL, whose procedure may commit, and DROP SUBSCRIPTION, which has a
    replication slot to drop unless it was made without one. DO may commit as well, and seldom does.

    Parameters
    ----------
    statement:
        A statement from `split`.
    """
    return (
        outside_transaction(statement)
        or statement.keywords[:2] == ("DROP", "SUBSCRIPTION")
        or (statement.keywords[:1] == ("CALL",))
    )


def takes_slot(statement: Statement) -> bool:
    """Say whether the server starts a worker of its own for a statement, and fails it with 53400 where it has no slot.

    Source: REPACK (CONCURRENTLY) of PostgreSQL 19 (tests/core/test_statements_on_19.py). Workers of a parallel plan are
    no such: without a slot it has fewer.
    """
    return statement.keywords[:1] == ("REPACK",) and "CONCURRENTLY" in _switched_on(statement)


def _refusal(statement: Statement, *, one_transaction: bool) -> str | None:
    """Return why no worker can run the statement, or None."""
    keywords = statement.keywords
    first = keywords[0] if keywords else ""
    if first in _TRANSACTION_CONTROL or (first == "PREPARE" and _prepares_transaction(statement)):
        return _CONTROL_REASON
    if first == "COPY" and _copies_with_client(statement):
        return _COPY_REASON
    if first == "LISTEN":
        return _LISTEN_REASON
    if one_transaction and first == "SET" and _must_come_first(statement):
        return _FIRST_REASON
    return None


def _prepares_transaction(statement: Statement) -> bool:
    """Tell PREPARE TRANSACTION 'id' from PREPARE transaction AS …, which prepares a statement of that name."""
    first = _first_tokens(statement, 3)
    return [token.text for token in first[:2]] == ["PREPARE", "TRANSACTION"] and first[-1].kind is TokenKind.STRING


def _must_come_first(statement: Statement) -> bool:
    """Tell what fails behind a query: to change the isolation level, to import a snapshot, to set DEFERRABLE.

    SET SESSION CHARACTERISTICS is for later transactions; READ ONLY and READ WRITE work at any time.
    """
    words = _words(statement)
    while words[1:2] in (["LOCAL"], ["SESSION"]):
        del words[1]
    if words[1:2] == ["TRANSACTION"]:
        # READ COMMITTED is what most transactions have already, and to set that changes nothing.
        return not {"SERIALIZABLE", "REPEATABLE", "UNCOMMITTED", "SNAPSHOT", "DEFERRABLE"}.isdisjoint(words)
    return words[1:2] in (["TRANSACTION_ISOLATION"], ["TRANSACTION_DEFERRABLE"])


def _copies_with_client(statement: Statement) -> bool:
    # STDIN and STDOUT mean the client in either direction (`copy_file_name` in gram.y).
    return any(
        left.kind is right.kind is TokenKind.WORD and left.text in {"FROM", "TO"} and right.text in {"STDIN", "STDOUT"}
        for left, right in pairwise(_outer(statement))
    )


def _reindex_outside(statement: Statement) -> bool:
    if "CONCURRENTLY" in _switched_on(statement):
        return True
    words = [token.text for token in _outer(statement) if token.kind is TokenKind.WORD]
    return words[1:2] in (["SCHEMA"], ["DATABASE"], ["SYSTEM"]) or words[2:3] == ["CONCURRENTLY"]


def _cluster_outside(statement: Statement) -> bool:
    """Tell whether CLUSTER (REPACK from 19 on) is for all tables, concurrent, or analyzes too."""
    named = [token for token in _outer(statement)[1:] if token.text not in {"(", ")", "VERBOSE"}]
    of_all = not named or (named[0].kind is TokenKind.WORD and named[0].text == "USING")
    return of_all or not {"CONCURRENTLY", "ANALYZE"}.isdisjoint(_switched_on(statement))


def _alter_subscription_outside(statement: Statement) -> bool:
    if _has(statement, "REFRESH", "PUBLICATION"):
        return True
    if any(_has(statement, verb, "PUBLICATION") for verb in ("SET", "ADD", "DROP")):
        return "REFRESH" not in _switched_off(statement)
    # Both change the replication slot; two_phase only when it is switched off.
    return _has(statement, "SET") and ("FAILOVER" in _switches(statement) or "TWO_PHASE" in _switched_off(statement))


def _switched_on(statement: Statement) -> set[str]:
    return {name for name, on in _switches(statement).items() if on}


def _switched_off(statement: Statement) -> set[str]:
    return {name for name, on in _switches(statement).items() if not on}


def _switches(statement: Statement) -> dict[str, bool]:
    """Return the options in parentheses; one without a value is on (`defGetBoolean`), the last of a name counts."""
    switches: dict[str, bool] = {}
    option: list[str] = []
    depth = 0
    for token in tokens(statement.text):
        depth += {"(": 1, ")": -1}.get(token.text, 0)
        if token.text in {"(", ",", ")"}:
            if option:
                switches[option[0]] = "".join(option[1:]).strip("='\"").upper() not in {"FALSE", "OFF", "0"}
            option = []
        elif depth:
            quoted = token.kind is TokenKind.NAME and not option
            option.append(token.text.strip('"').upper() if quoted else token.text)
    return switches


def _outer(statement: Statement) -> list[Token]:
    """Return the tokens that are in no parentheses, the outermost parentheses themselves included."""
    outer: list[Token] = []
    depth = 0
    for token in tokens(statement.text):
        depth -= token.text == ")"
        if depth == 0:
            outer.append(token)
        depth += token.text == "("
    return outer


def _words(statement: Statement) -> list[str]:
    """Return the unquoted words that are in no parentheses."""
    return [token.text for token in _outer(statement) if token.kind is TokenKind.WORD]


def _has(statement: Statement, *words: str) -> bool:
    """Tell whether these unquoted words follow one another directly, in no parentheses."""
    found = [token.text if token.kind is TokenKind.WORD else "" for token in _outer(statement)]
    return any(tuple(found[i : i + len(words)]) == words for i in range(len(found)))


def _first_tokens(statement: Statement, count: int) -> list[Token]:
    return [token for token, _ in zip(tokens(statement.text), range(count), strict=False)]


def _excerpt(text: str) -> str:
    """Return the beginning of a statement on one line, without comments and with its string constants masked."""
    excerpt = ""
    end = 0
    for token in tokens(text):
        blank = " " if excerpt and token.start > end else ""
        excerpt += blank + ("'…'" if token.kind is TokenKind.STRING else text[token.start : token.end])
        end = token.end
        if len(excerpt) > _EXCERPT:
            return excerpt[: _EXCERPT - 1] + "…"
    return excerpt
