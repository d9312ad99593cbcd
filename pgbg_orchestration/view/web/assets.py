"""The page's own files, and the charting library's, which plotly ships in its package."""

from __future__ import annotations

from functools import cache
from importlib import resources

from starlette.exceptions import HTTPException
from starlette.responses import Response

from pgbg_orchestration.view.states import SIGNS

_TYPES = {"pgbg.css": "text/css", "pgbg.js": "text/javascript", "plotly.min.js": "text/javascript"}


def asset(name: str) -> Response:
    """Return one of the page's files.

    Raises
    ------
    HTTPException
        There is none of that name.
    """
    if name not in _TYPES:
        raise HTTPException(404, "no such file")
    headers = {"cache-control": "private, max-age=3600"} if name == "plotly.min.js" else None
    return Response(text_of(name), media_type=_TYPES[name], headers=headers)


@cache
def text_of(name: str) -> str:
    """Return the text of a file of the page: ``page.html`` or one of its scripts and styles."""
    if name == "plotly.min.js":
        return resources.files("plotly").joinpath("package_data", name).read_text(encoding="utf-8")
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return text.replace("<!-- states -->", _options()) if name == "page.html" else text


def _options() -> str:
    """Return the states to choose from, each with the sign that the page's script shows."""
    return "".join(f'<option value="{state}" data-sign="{sign}">{state}</option>' for state, sign in SIGNS.items())
