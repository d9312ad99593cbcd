"""Which servers a test runs on: a few of them at every push, all of them in the long form (``make long``).

The servers that a test is meant for follow from its marks. Of these a push needs

* one with the real extension: ``real``, or ``embedded`` where there is no chroot. Both are PostgreSQL 18 with the same
  library, so a test runs on both only where it is about the embedded server itself (``embedded_differs``);
* one surface of the stand-in: 1.9's, since the real extension offers 2.0's, or 2.0's for a test not meant for 1.9's;
  none for a test of what is the same on any surface (``any_surface``), when the real extension runs it: how networks,
  processes and servers break, what SQL may do, what users give and see. Where surfaces differ, in the calls of the
  extension and what it tells of a worker, the other tests are;
* of the older majors, for a test marked ``majors``, the one that continuous integration installs;
* no PostgreSQL that comes (``standin_pg19``, ``real19``) and no older release of the real extension (``real15``): what
  they are made from may be out of reach.

No test is left out at a push for its servers: what it is meant for, it runs on at least once.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

LONG = os.environ.get("PGBG_LONG") == "1"
"""True in the long form: every server, full repetitions, and the tests that take minutes."""
IN_THE_LONG_FORM = "run by `make long`"
"""How the reason starts for which a push skips a test."""

REAL = ("real", "embedded")
"""Kinds with the real extension; one of them is enough at a push, the first that can be had."""
STANDIN = ("standin19", "standin20")
"""Kinds with the stand-in, on the same PostgreSQL as ``embedded``; one is enough at a push."""
MAJOR = ("standin15", "standin14", "standin16", "standin17")
"""Kinds with an older PostgreSQL; one is enough at a push, the first that can be had."""
COMING = ("standin_pg19", "real19")
"""Kinds with a PostgreSQL that is not out yet: the long form's only."""
PAST = ("real15",)
"""Kinds with an older release of the real extension: the long form's only."""
BUILT = (*COMING, *PAST)
"""Kinds that are built from what may be out of reach."""


def asked_for(folder: str, named: Collection[str], *, majors: bool, long: bool = LONG) -> set[str]:
    """Tell which kinds a test runs on that not every test does.

    Parameters
    ----------
    folder
        The folder of ``tests`` that the test is in.
    named
        What its mark ``servers`` names.
    majors
        True for a test marked ``majors``.
    long
        True in the long form, in which the contract suite and the core's run on what is built from afar, too.
    """
    wanted = {*MAJOR} if majors else set()
    wanted |= {*BUILT} & {*named}
    if long and folder in {"contract", "core"}:
        wanted |= {*BUILT}
    return wanted


def at_a_push(
    meant: Sequence[str],
    why_not: Mapping[str, str | None],
    *,
    embedded_differs: bool = False,
    any_surface: bool = False,
) -> list[str]:
    """Choose the servers that a test runs on at a push.

    Parameters
    ----------
    meant
        The kinds of server that the test is meant for.
    why_not
        For each kind why it cannot be had here, or None when it can.
    embedded_differs
        True for a test that is about the embedded server itself.
    any_surface
        True for a test of what is the same whichever surface the extension offers.

    Returns
    -------
    list of str
        One of each group in ``meant``, in the order of ``meant``. Where none of a group can be had, its first: the
        test is then skipped with the reason, and does not vanish.
    """
    chosen = {first_to_be_had(group, meant, why_not) for group in (REAL, STANDIN, MAJOR)}
    if embedded_differs:
        chosen.add("embedded")
    if any_surface and any(why_not[kind] is None for kind in REAL if kind in chosen):
        chosen -= {*STANDIN}
    if set(meant) <= {*BUILT}:
        return list(meant)  # such a test is of the long form, and is skipped with that reason
    return [kind for kind in meant if kind in chosen]


def first_to_be_had(group: Collection[str], meant: Collection[str], why_not: Mapping[str, str | None]) -> str | None:
    """Return the first of a group that a test is meant for and that can be had here, else the first it is meant for."""
    candidates = [kind for kind in group if kind in meant]
    there = [kind for kind in candidates if why_not[kind] is None]
    return next(iter(there or candidates), None)
