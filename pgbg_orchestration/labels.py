r"""Labels: how the server shows them, how they are compared with what it shows, and how a long one is shortened.

A worker's label is seen in ``pg_stat_activity.application_name``. From 1.10 on pg_background writes
``pg_background:<label>:<pid>`` there, and PostgreSQL keeps 63 bytes of that, in which every byte that is no printable
ASCII stands as ``\xNN`` (``pg_clean_ascii``; as ``?`` before PostgreSQL 16). So a label is never compared as it was
given, and what tells labels apart has to stand in the first ``VISIBLE`` characters of its shown form.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import InvalidJob

LABEL_BYTES = 64
"""Bytes of a label at most: pg_background raises 22001 for a longer one."""

PREFIX = "pg_background:"
"""What the name of a labelled worker begins with."""

NAME_BYTES = 63
"""Bytes that PostgreSQL keeps of an ``application_name`` (``NAMEDATALEN - 1``)."""

VISIBLE = NAME_BYTES - len(PREFIX)
"""Characters of a label's shown form that are kept whatever the process id is."""

ESCAPES_SINCE = 160000  # server_version_num
_DIGEST = 6  # hexadecimal digits of the text that was shortened: 1 in 16 million
_TAIL_SHARE = 0.65  # of what is kept of a shortened text; its end tells more than its beginning


def shown(label: str | bytes, *, server_version: int = ESCAPES_SINCE) -> str:
    """Return how the server shows a text in ``application_name``, before it cuts the end off.

    Parameters
    ----------
    label:
        The text; as bytes where the database's encoding is not UTF-8.
    server_version:
        The server's version as a number, such as 180006.
    """
    raw = label.encode() if isinstance(label, str) else label
    return "".join(
        chr(byte) if 32 <= byte <= 126 else f"\\x{byte:02x}" if server_version >= ESCAPES_SINCE else "?" for byte in raw
    )


def worker_name(label: str | bytes, pid: int, *, server_version: int = ESCAPES_SINCE) -> str:
    """Return the ``application_name`` of the worker with this label and process id, as ``pg_stat_activity`` has it."""
    return f"{PREFIX}{shown(label, server_version=server_version)}:{pid}"[:NAME_BYTES]


def shorten_label(text: str, limit: int = VISIBLE) -> str:
    """Return ``text`` where the server shows all of it, else its beginning, a digest and its end.

    Two different texts stay different, in the server as well: ``sales_daily_loa~3fa9c1~transform_orders[12]``.

    Parameters
    ----------
    text:
        What the label is to say; control characters become blanks.
    limit:
        Characters of the shown form at most.
    """
    if len(text) <= limit and text.isascii() and text.isprintable():
        return text  # as it is shown
    text = re.sub(r"[\x00-\x1f\x7f]", " ", text)
    if len(shown(text)) <= limit:
        return text
    mark = f"~{hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]}~"
    tail = _fitting(reversed(text), int((limit - len(mark)) * _TAIL_SHARE))[::-1]
    head = _fitting(text, limit - len(mark) - len(shown(tail)))
    return f"{head}{mark}{tail}"


def make_label(*parts: object, separator: str = "/") -> str:
    """Return a label of several parts, such as ``billing/prod/req-4711``: feature, environment, request id.

    Where it is too long for the server to show, it is shortened by :func:`shorten_label`, which keeps its end.

    Parameters
    ----------
    parts:
        What the label is to say, the most general first; each is written as text.
    separator:
        What stands between them.

    Raises
    ------
    InvalidJob
        There is no part, or one is empty, or has the separator or a control character in it: a reader could not take
        the label apart again.
    """
    texts = [str(part) for part in parts]
    if not texts:
        raise InvalidJob("a label needs at least one part")
    for number, text in enumerate(texts, 1):
        if not text.strip() or separator in text or re.search(r"[\x00-\x1f\x7f]", text):
            raise InvalidJob(
                f"part {number} of the label, {text!r}, cannot be used",
                todo=f"A part is not empty, and has neither {separator!r} nor a control character in it.",
            )
    return shorten_label(separator.join(texts))


def _fitting(characters: Iterable[str], room: int) -> str:
    kept = ""
    for character in characters:
        room -= len(shown(character))
        if room < 0:
            break
        kept += character
    return kept


# Finding workers by label ---------------------------------------------------------------------------------------------

_ESCAPES = re.compile(r"(?:\\x[0-9a-f]{2})+")
_LONGEST_CHARACTER = 4  # bytes


@dataclass(frozen=True, slots=True)
class LabelPattern:
    """A label with wildcards, to be compared with the names of workers: ``*`` stands for any characters, ``?`` for one.

    Attributes
    ----------
    label:
        The label with its wildcards.
    encoded:
        Its :meth:`texts` in the bytes of the database's encoding; None where that is UTF-8.
    server_version:
        The server's version as a number.
    """

    label: str
    encoded: Sequence[bytes] | None = None
    server_version: int = ESCAPES_SINCE

    def texts(self) -> list[str]:
        """Return what stands before, between and behind the wildcards, empty texts included."""
        return re.split(r"[*?]", self.label)

    def fits(self, name: str, pid: int) -> bool:
        """Say whether the worker with this ``application_name`` and process id has a label that fits.

        Of a name that was cut off all is said to fit that begins like one that does: a worker that is at work is never
        taken for one that is gone.
        """
        if not name.startswith(PREFIX):
            return False
        seen, end = name[len(PREFIX) :], f":{pid}"
        # A name that was set (``set application_name``) lacks a character as a whole that would have been cut in two.
        fewest = NAME_BYTES if name.endswith(end) else NAME_BYTES - _LONGEST_CHARACTER + 1
        cut_off = len(name) >= fewest
        places = {0}  # up to which the name may have been read
        for token in [*self._tokens(), end]:
            after: set[int] = set()
            for place in places:
                left = seen[place:]
                if token is _ANY:
                    after.update(range(place, len(seen) + 1))
                elif token is _ONE:
                    after.update(place + size for size in self._sizes(left))
                    if cut_off and len(left) < 4 * _LONGEST_CHARACTER and (not left or left[0] in "\\?"):
                        return True
                elif left.startswith(token):
                    after.add(place + len(token))
                elif cut_off and token.startswith(left):
                    return True
            places = after
        return len(seen) in places

    def _tokens(self) -> list[str]:
        texts = [shown(text, server_version=self.server_version) for text in self.encoded or self.texts()]
        wildcards = [_ANY if found == "*" else _ONE for found in re.findall(r"[*?]", self.label)]
        return [token for pair in zip(texts, [*wildcards, ""], strict=True) for token in pair if token]

    def _sizes(self, left: str) -> Iterable[int]:
        """Return how many characters of a name the first character of a label may take."""
        if left:
            yield 1
        if self.server_version < ESCAPES_SINCE:
            marks = len(left) - len(left.lstrip("?"))
            yield from range(2, min(marks, _LONGEST_CHARACTER) + 1)
        elif escapes := _ESCAPES.match(left):
            there = (escapes.end()) // 4
            first = int(left[2:4], 16)
            in_utf8 = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
            sizes = [in_utf8] if self.encoded is None else range(1, _LONGEST_CHARACTER + 1)
            yield from (4 * size for size in sizes if size <= there)


_ANY, _ONE = "any characters", "one character"  # compared by identity: a label may hold these words
