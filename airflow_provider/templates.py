"""Parameters and settings of a task that begins in the triggerer: what is rendered there, and what may not be touched.

Airflow renders every text in a template field of the trigger, in the triggerer. What is no text travels beside it: each
value as the SQL literal that psycopg makes of it when the DAG file is parsed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from .arguments import settings_of

_IN_CONTAINERS: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    type(None): (lambda value: value, lambda form: form),
    bool: (lambda value: value, lambda form: form),
    int: (str, int),
    float: (float.hex, float.fromhex),
    Decimal: (str, Decimal),
    UUID: (str, UUID),
    bytes: (lambda value: base64.b64encode(value).decode(), base64.b64decode),
    date: (date.isoformat, date.fromisoformat),
    datetime: (datetime.isoformat, datetime.fromisoformat),
    time: (time.isoformat, time.fromisoformat),
    timedelta: (
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda form: timedelta(days=form[0], seconds=form[1], microseconds=form[2]),
    ),
}
"""How a value beside a text, in one list or dict with it, travels: they become a literal together, after rendering.

A zone becomes its offset, which is all that a literal has of it.
"""
_BY_NAME = {kind.__name__: kind for kind in _IN_CONTAINERS}


def take_apart(parameters: Any, settings: Any) -> tuple[str, list[str], list[str]]:
    """Return what may not be rendered, as one text, and the texts to be rendered of parameters and of settings.

    Raises
    ------
    ValueError, TypeError
        A value cannot travel: it says which.
    """
    templates: list[str] = []
    shape: Any = None
    if isinstance(parameters, Mapping):
        shape = {
            "named": [[name, _node(f"parameter {name!r}", value, templates)] for name, value in parameters.items()]
        }
    elif isinstance(parameters, Sequence) and not isinstance(parameters, str | bytes):
        shape = {"listed": [_node(f"parameter {at}", value, templates) for at, value in enumerate(parameters, 1)]}
    elif parameters is not None:
        raise TypeError(f"parameters must be a sequence or a mapping, not a {type(parameters).__name__}.")
    texts = settings_of(settings) or {}
    if not isinstance(texts, Mapping):
        raise TypeError(f"settings must be a mapping of names to values, not a {type(texts).__name__}.")
    for name, value in texts.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"the setting {name!r} is a {type(value).__name__}, and must be text or a number.")
    fixed = json.dumps({"parameters": shape, "settings": list(texts)})
    return fixed, templates, [str.__str__(value) for value in texts.values()]


def filled(fixed: str, rendered: Any, settings: Any) -> tuple[Any, dict[str, Any] | None]:
    """Return parameters and settings, put together again from :func:`take_apart` and what was rendered since."""
    form = json.loads(fixed)
    shape = form["parameters"]
    parameters: Any = None
    if shape is not None and "named" in shape:
        parameters = {name: _value(node, rendered) for name, node in shape["named"]}
    elif shape is not None:
        parameters = [_value(node, rendered) for node in shape["listed"]]
    return parameters, dict(zip(form["settings"], settings, strict=True)) or None


def _has_text(value: object) -> bool:
    """Tell whether Airflow would render something in a value: it looks into these types alone."""
    if isinstance(value, dict):
        return any(map(_has_text, value.values()))
    return isinstance(value, str) or (isinstance(value, list | tuple | set) and any(map(_has_text, value)))


def _node(name: str, value: Any, templates: list[str], *, inside: bool = False) -> dict[str, Any]:
    if isinstance(value, str):
        # Every text: what a template is depends on the DAG's Jinja. A subclass's is plain text once it is rendered.
        templates.append(str.__str__(value))
        return {"template": len(templates) - 1}
    if isinstance(value, list | tuple | dict) and (inside or _has_text(value)):
        return _container(name, value, templates)
    kind = next((kind for kind in type(value).__mro__ if kind in _IN_CONTAINERS), None)
    if inside and kind is None:
        raise ValueError(f"{name}: a {type(value).__name__} cannot stand beside a text in a list or dict.")
    if inside or type(value) in (int, bool, type(None)):
        assert kind is not None
        return {"kind": kind.__name__, "is": _IN_CONTAINERS[kind][0](value)}
    return {"literal": _literal(name, value)}


def _container(name: str, value: Any, templates: list[str]) -> dict[str, Any]:
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": [[key, _node(name, item, templates, inside=True)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_node(name, item, templates, inside=True) for item in value]}
    raise ValueError(f"{name}: a {type(value).__name__} with a text in it cannot be rendered in a triggerer.")


def _literal(name: str, value: Any) -> str:
    from pgbg_orchestration.errors import InvalidJob
    from pgbg_orchestration.postgres.literals import literals_of

    try:
        (text,) = literals_of([value])
    except InvalidJob as error:
        raise ValueError(f"{name}: {error.message}.") from error
    return text


def _value(node: Mapping[str, Any], rendered: Sequence[Any]) -> Any:
    from pgbg_orchestration.postgres.literals import Literal

    ((how, form),) = ((key, item) for key, item in node.items() if key != "is")
    match how:
        case "template":
            return rendered[form]
        case "literal":
            return Literal(form)
        case "dict":
            return {key: _value(item, rendered) for key, item in form}
        case "list":
            return [_value(item, rendered) for item in form]
        case "tuple":
            return tuple(_value(item, rendered) for item in form)
        case _:
            return _IN_CONTAINERS[_BY_NAME[form]][1](node["is"])
