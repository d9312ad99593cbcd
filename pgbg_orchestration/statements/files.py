"""SQL as it lies in files: bytes to text, in one way for every surface (``pgbg run -f``, Airflow, Dagster, Python)."""

import codecs
from pathlib import Path

__all__ = ["UnreadableSql", "decode", "read", "without_mark"]

BYTE_ORDER_MARK = "\ufeff"
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class UnreadableSql(ValueError):
    """The bytes are no SQL text in UTF-8."""


def read(path: Path) -> str:
    """Return the SQL of a file, without the byte-order mark that some editors begin it with.

    Parameters
    ----------
    path:
        A file in UTF-8, whatever the locale says.

    Raises
    ------
    UnreadableSql
        It is in another encoding.
    OSError
        It cannot be read.
    """
    try:
        return decode(path.read_bytes())
    except UnreadableSql as error:
        raise UnreadableSql(f"{path}: {error}") from error


def decode(data: bytes) -> str:
    """Return SQL that came as bytes, from a file or from standard input.

    Raises
    ------
    UnreadableSql
        They are no UTF-8.
    """
    for mark, name in _OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise UnreadableSql(f"the SQL is {name}, as its byte-order mark says: save it as UTF-8")
    try:
        return without_mark(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UnreadableSql(f"the SQL is not UTF-8: byte {error.start}") from error


def without_mark(text: str) -> str:
    """Return ``text`` without a byte-order mark at its start, which psql drops as well.

    To the server it would be a letter of the first word, and 42601.
    """
    return text.removeprefix(BYTE_ORDER_MARK)
