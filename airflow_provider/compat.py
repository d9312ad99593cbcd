"""Which Airflow this is, and what follows from it: the only module that knows one version of Airflow from another."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

OLDEST = (3, 3)
"""The oldest Airflow that this provider works with."""


def airflow_version() -> tuple[int, int] | None:
    """Return the major and minor version of the Airflow that is installed, or None where there is none.

    A worker may have the task SDK only, whose versions are one major behind: 1.3 is Airflow 3.3's.
    """
    for distribution, ahead in (("apache-airflow-core", 0), ("apache-airflow-task-sdk", 2), ("apache-airflow", 0)):
        try:
            major, minor = version(distribution).split(".")[:2]
        except PackageNotFoundError:
            continue
        return int(major) + ahead, int(minor)
    return None


def refuse_what_cannot_work() -> None:
    """Say which Airflow is needed, where there is none or an older one.

    Raises
    ------
    ImportError
        In one sentence: an Airflow of another version would otherwise show up as a name that cannot be imported.
    """
    needed = ".".join(map(str, OLDEST))
    found = airflow_version()
    if found is None:
        raise ImportError(
            "airflow_provider needs Apache Airflow, which is not installed here: "
            "pip install 'pg-background-orchestration[airflow]'"
        )
    if found < OLDEST:
        raise ImportError(
            f"airflow_provider of pg-background-orchestration needs Apache Airflow {needed} or newer, "
            f"and this is {'.'.join(map(str, found))}"
        )
