"""``SET`` in a job's own text: what a worker cannot honour there is applied at its launch, or refused before it.

A worker reads its whole text, and starts its clock, before the first statement runs, and all of it is one transaction.
So these settings are too late in the text, and were seen to do nothing there (docs/python.md has the table):

- ``statement_timeout`` and ``pg_background.worker_timeout``: the worker's clock, for all of the job;
- ``standard_conforming_strings`` and ``backslash_quote``: how the text is read; ``client_encoding``: in which bytes;
- ``default_transaction_…`` and SESSION CHARACTERISTICS: for transactions that come later, of which there are none.

``set_config`` with constants is a SET in other words. What a function sets cannot be told from the text.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .lexer import Token, TokenKind, tokens
from .split import Statement

__all__ = ["Assignment", "Unhonoured", "applied", "assignment", "unhonoured"]

TIMEOUT = "statement_timeout"
READ_ONLY = "default_transaction_read_only"

_ZERO = re.compile(r"\+?0+(\.0*)?\s*(us|ms|s|min|h|d)?")
_ON = frozenset({"on", "true", "yes", "1", "t", "tr", "tru", "y", "ye"})
_OFF = frozenset({"off", "of", "false", "no", "0", "f", "fa", "fal", "fals", "n"})
_SET_CONFIG = re.compile("set_config", re.IGNORECASE)
_UTF8 = frozenset({"utf8", "unicode"})

_INSTEAD = {
    TIMEOUT: "it bounds the whole job there, from its launch on, and each statement for itself in psql only: "
    "give the job a timeout, or statement_timeout as one of its settings",
    "pg_background.worker_timeout": "it is read at the launch: give the job a timeout",
    "standard_conforming_strings": "the text is read before it runs: write strings with backslashes as E'…'",
    "backslash_quote": "the text is read before it runs: give it as one of the job's settings",
    "client_encoding": "the text has left its file already: save the file as UTF-8",
    READ_ONLY: "it is for later transactions, and the job is a single one: use SET TRANSACTION READ ONLY",
    "default_transaction_isolation": "it is for later transactions, and the job is a single one: give it an isolation",
    "default_transaction_deferrable": "it is for later transactions, and the job is a single one, which writes",
}


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one statement sets: the setting's name in lower case, ``*`` for all, and the value.

    ``value`` is None for DEFAULT and RESET; ``is_known`` is False for one that the text does not tell.
    """

    name: str
    value: str | None
    is_known: bool = True


@dataclass(frozen=True, slots=True)
class Unhonoured:
    """A statement, counted from 1, that sets what a worker does not heed there, and what to do instead."""

    number: int
    reason: str


def assignment(statement: Statement) -> Assignment | None:
    """Read a SET, a RESET, or a SELECT of nothing but ``set_config`` with constants; None for any other statement."""
    match statement.keywords[:1]:
        case ("SET",):
            return _of_set(statement, [*tokens(statement.text)])
        case ("RESET",):
            words = [*tokens(statement.text)][1:]
            name = _name(words)
            return Assignment("*" if name == "all" else name, None)
        case ("SELECT",) if _may_call(statement):
            given = [*tokens(statement.text)][1:]
            found = _calls(statement, given)
            # Nothing but the call: its closing parenthesis ends the statement.
            whole = given[-1:] and given[-1].text == ")" and _opens(given) in (1, 3) and _depth_is_one(given)
            return found[0] if len(found) == 1 and whole else None
        case _:
            return None


def applied(statements: Sequence[Statement]) -> dict[str, str]:
    """Return what the statements set that has to be set at the launch instead, by name.

    Parameters
    ----------
    statements:
        Those of one job, of which `unhonoured` refuses nothing.
    """
    found = {}
    for name in (TIMEOUT, READ_ONLY):
        match [*set(_in_force(statements, name))]:
            case [Assignment(value=str(value), is_known=True)]:
                found[name] = value
    return found


def unhonoured(statements: Sequence[Statement]) -> Unhonoured | None:
    """Return the first statement that sets what a worker does not heed, and that cannot be applied at its launch.

    Parameters
    ----------
    statements:
        Those of one job, with parameters in or still to come.
    """
    for number, statement in enumerate(statements, 1):
        alone = assignment(statement)
        for each in [alone] if alone else _inside(statement):
            instead = _INSTEAD.get(each.name)
            if instead is None or not each.is_known or _is_harmless(each):
                continue
            if each.name != TIMEOUT or alone is None or not _bounds_rightly(statements, each):
                return Unhonoured(number, f"sets {each.name}, which has no effect in the text of a worker: {instead}")
    return None


def _bounds_rightly(statements: Sequence[Statement], given: Assignment) -> bool:
    """Tell whether a timeout for the whole job is what this SET says."""
    in_force = [*_in_force(statements, TIMEOUT)]
    if given not in in_force:
        return True  # nothing runs under it
    return in_force == [given] or (set(in_force) == {given} and _is_zero(given.value))


def _in_force(statements: Sequence[Statement], name: str) -> Iterator[Assignment | None]:
    """Yield for each statement that is no assignment what was last assigned to the setting before it."""
    last: Assignment | None = None
    for statement in statements:
        found = assignment(statement)
        if found is None:
            yield last
        elif found.name in (name, "*"):
            last = None if found.value is None else found


def _is_harmless(given: Assignment) -> bool:
    """Tell whether the worker has what is set anyway, or has it applied at its launch."""
    if given.value is None:
        return True
    value = given.value.strip().lower()
    match given.name:
        case "standard_conforming_strings":
            return value in _ON
        case "client_encoding":
            return re.sub(r"[^a-z0-9]", "", value) in _UTF8
        case "default_transaction_read_only" | "default_transaction_deferrable":
            return value in _OFF
        case _:
            return False


def _is_zero(value: str | None) -> bool:
    return value is not None and _ZERO.fullmatch(value.strip()) is not None


# Reading -----------------------------------------------------------------------------------------------------------


def _of_set(statement: Statement, found: list[Token]) -> Assignment:
    words = found[1:]
    if [word.text for word in words[:2]] == ["SESSION", "CHARACTERISTICS"]:
        return _of_characteristics({word.text for word in words})
    # SESSION is a setting's name in no spelling of SET, but for SESSION AUTHORIZATION.
    if words[:1] and words[0].kind is TokenKind.WORD and words[0].text in {"SESSION", "LOCAL"}:
        words = words[1:]
    if words[:1] and words[0].text == "NAMES" and words[0].kind is TokenKind.WORD:
        return _assign("client_encoding", statement, words[1:])
    at = next((i for i, word in enumerate(words) if word.text in {"TO", "="} and word.kind is not TokenKind.NAME), None)
    if at is None:
        return Assignment(_name(words), None, is_known=False)  # TIME ZONE, ROLE, SCHEMA, CONSTRAINTS, …
    return _assign(_name(words[:at]), statement, words[at + 1 :])


def _of_characteristics(words: set[str]) -> Assignment:
    if {"READ", "ONLY"} <= words:
        return Assignment(READ_ONLY, "on")
    if "ISOLATION" in words:
        return Assignment("default_transaction_isolation", "as it says")
    if "DEFERRABLE" in words:
        return Assignment("default_transaction_deferrable", "off" if "NOT" in words else "on")
    return Assignment(READ_ONLY, "off")


def _assign(name: str, statement: Statement, value: list[Token]) -> Assignment:
    if not value or (len(value) == 1 and value[0].kind is TokenKind.WORD and value[0].text == "DEFAULT"):
        return Assignment(name, None)
    if any(token.text == "%" for token in value):
        return Assignment(name, "", is_known=False)  # a placeholder: asked again when it is bound
    raw = statement.text[value[0].start : value[-1].end]
    return Assignment(name, _constant(raw) if len(value) == 1 else raw)


def _constant(raw: str) -> str:
    if raw.startswith("'"):
        return raw[1:-1].replace("''", "'")
    if raw[:2] in {"E'", "e'"} and "\\" not in raw:
        return raw[2:-1].replace("''", "'")
    if raw.startswith("$"):
        tag = raw[: raw.index("$", 1) + 1]
        return raw.removeprefix(tag).removesuffix(tag)
    return raw


def _name(words: list[Token]) -> str:
    return "".join(_unquoted(word) for word in words).lower()


def _unquoted(word: Token) -> str:
    return word.text[1:-1].replace('""', '"') if word.kind is TokenKind.NAME else word.text


def _inside(statement: Statement) -> list[Assignment]:
    """Return the calls of ``set_config`` with constants in a query."""
    if statement.keywords[:1] not in (("SELECT",), ("WITH",)) or not _may_call(statement):
        return []
    return _calls(statement, [*tokens(statement.text)])


def _may_call(statement: Statement) -> bool:
    """Tell whether a look at the statement's words is worth its time: for a long one that is seconds."""
    return _SET_CONFIG.search(statement.text) is not None


def _calls(statement: Statement, found: list[Token]) -> list[Assignment]:
    calls = []
    for at, token in enumerate(found):
        name, comma, value = found[at + 2 : at + 3], found[at + 3 : at + 4], found[at + 4 : at + 5]
        if token.kind is not TokenKind.WORD or token.text != "SET_CONFIG" or not value:
            continue
        if name[0].kind is TokenKind.STRING and comma[0].text == "," and value[0].kind is TokenKind.STRING:
            setting = _constant(statement.text[name[0].start : name[0].end]).lower()
            calls.append(Assignment(setting, _constant(statement.text[value[0].start : value[0].end])))
    return calls


def _opens(found: list[Token]) -> int:
    """Return the place of the first parenthesis: behind ``set_config``, or ``pg_catalog.set_config``."""
    return next((at for at, token in enumerate(found) if token.text == "("), 0)


def _depth_is_one(found: list[Token]) -> bool:
    texts = [token.text for token in found if token.kind is TokenKind.SYMBOL]
    return texts.count("(") == texts.count(")") == 1
