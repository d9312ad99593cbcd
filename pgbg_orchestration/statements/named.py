"""Named queries: the package's own SQL, in ``.sql`` files beside the modules that ask it.

A line ``-- name: NAME`` begins a query, which ends at the next one. Other comments explain it there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import LiteralString

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)
_COMMENT = re.compile(r"^ *--.*\n", re.MULTILINE)


@cache
def queries(package: str, *path: str) -> Mapping[str, LiteralString]:
    """Return every query of a file by its name; comments stay there, and do not travel to the server with each call.

    Parameters
    ----------
    package:
        The package that the file belongs to, such as ``__package__``.
    path:
        The file's path in it.
    """
    text = resources.files(package).joinpath(*path).read_text(encoding="utf-8")
    _, *parts = _NAME.split(text)
    bodies: list[LiteralString] = [_COMMENT.sub("", body).strip() for body in parts[1::2]]  # files of the package's own
    return dict(zip(parts[::2], bodies, strict=True))
