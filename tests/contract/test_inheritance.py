"""What a worker inherits of its launching session, and who may do what with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
from psycopg import errors

from tests.contract.background import Background, Handle

OpenSession = Callable[..., Background]
WHO = "select current_user::text, session_user::text, current_setting('role')"
WHO_COLUMNS = "a text, b text, c text"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("statement_timeout", "12345ms"),
        ("search_path", "pg_catalog, public"),
        ("work_mem", "5MB"),
        ("default_transaction_isolation", "serializable"),
        ("client_min_messages", "warning"),
        ("lock_timeout", "4s"),
        ("timezone", "Asia/Tokyo"),
        ("pgbg.custom", "mine"),
        ("pg_background.max_workers", "17"),
    ],
)
@pytest.mark.parametrize("local", [False, True], ids=["set", "set local"])
def test_a_worker_has_the_settings_of_its_launching_session(
    session: Background, name: str, value: str, local: bool
) -> None:
    with session.connection.transaction():
        session.execute("select set_config(%s, %s, %s)", (name, value, local))
        handle = session.launch(f"select current_setting('{name}')")
    assert session.result(handle, "v text") == [(value,)]


def test_any_custom_setting_is_inherited(session: Background, unlike: Callable[[str], None]) -> None:
    unlike("custom_settings")
    session.execute("set another.name = 'mine'")
    assert session.fetch("select current_setting('another.name')", "v text") == [("mine",)]


def test_settings_that_were_reset_are_not_inherited(session: Background) -> None:
    with session.connection.transaction():
        session.execute("set local work_mem = '5MB'")
    assert session.fetch("select current_setting('work_mem')", "v text") == [("4MB",)]


def test_an_explicit_application_name_wins(session: Background) -> None:
    session.execute("set application_name = 'mine'")
    assert session.fetch("select current_setting('application_name')", "v text") == [("mine",)]


@pytest.mark.since(extension="1.10")
def test_a_worker_is_named_by_label_and_pid(open_session: OpenSession) -> None:
    session = open_session(application_name="from the connection string")
    handle = session.launch("select current_setting('application_name') from pg_sleep(0.3)", label="a label")
    assert session.result(handle, "v text") == [(f"pg_background:a label:{handle.pid}",)]
    handle = session.launch("select current_setting('application_name') from pg_sleep(0.3)", label=None)
    assert session.result(handle, "v text") == [(f"pg_background:{handle.pid}",)]


def test_statement_timeout_ends_a_worker_with_57014(session: Background) -> None:
    session.execute("set statement_timeout = '2s'")  # the launch call itself has to end within it
    handle = session.launch("select pg_sleep(60)")
    session.execute("reset statement_timeout")
    session.ended(handle)
    error = session.error(handle)
    assert (error["sqlstate"], error["message"]) == ("57014", "canceling statement due to statement timeout")


def test_worker_timeout_ends_a_worker_with_57014(session: Background) -> None:
    session.execute("set pg_background.worker_timeout = '200ms'")
    handle = session.launch("select pg_sleep(60)")
    session.ended(handle)
    assert session.error(handle)["sqlstate"] == "57014"


@pytest.fixture
def roles(session: Background) -> Iterator[Background]:
    """A login that may launch, and a role that it is a member of."""
    session.execute("create role contract_etl")
    session.execute("create role contract_login login")
    session.execute("grant contract_etl to contract_login")
    session.execute("grant pgbackground_role to contract_login")
    session.execute("grant usage, create on schema public to contract_login, contract_etl")
    yield session
    session.execute("select pg_terminate_backend(pid, 10000) from pg_stat_activity where usename = 'contract_login'")
    session.execute("drop owned by contract_etl, contract_login")
    session.execute("drop role contract_etl, contract_login")


def launch_as_etl(login: Background, text: str) -> Handle:
    with login.connection.transaction():
        login.execute("set local role contract_etl")
        return login.launch(text)


def test_a_worker_runs_as_the_login_that_launched_it(roles: Background, open_session: OpenSession) -> None:
    login = open_session("contract_login")
    assert login.fetch(WHO, WHO_COLUMNS) == [("contract_login", "contract_login", "none")]


def test_a_worker_takes_the_role_that_was_set_and_keeps_the_login_as_session_user(
    roles: Background, open_session: OpenSession
) -> None:
    roles.execute("grant pgbackground_role to contract_etl")
    login = open_session("contract_login")
    handle = launch_as_etl(login, WHO)
    assert login.result(handle, WHO_COLUMNS) == [("contract_etl", "contract_login", "contract_etl")]


def test_the_role_that_is_current_at_launch_needs_the_privilege(roles: Background, open_session: OpenSession) -> None:
    with pytest.raises(errors.InsufficientPrivilege, match="permission denied for function"):
        launch_as_etl(open_session("contract_login"), WHO)


def test_a_role_without_the_privilege_cannot_launch(roles: Background, open_session: OpenSession) -> None:
    roles.execute("revoke pgbackground_role from contract_login")
    with pytest.raises(errors.InsufficientPrivilege):
        open_session("contract_login").launch("select 1")


def test_the_grant_function_gives_the_privilege(roles: Background, open_session: OpenSession) -> None:
    roles.execute("revoke pgbackground_role from contract_login")
    roles.call("grant_privileges", "contract_login", False)
    assert open_session("contract_login").run("select 1")["command_tag"] == "SELECT"


@pytest.mark.since(postgres=16)
@pytest.mark.parametrize("function", ["result_info", "error_info", "detach", "cancel", "result"])
def test_without_inheritance_the_login_can_neither_read_nor_detach_a_worker_of_the_role(
    roles: Background, open_session: OpenSession, function: str
) -> None:
    roles.execute("grant pgbackground_role to contract_etl")
    roles.execute("grant contract_etl to contract_login with inherit false")
    login = open_session("contract_login")
    handle = launch_as_etl(login, "select pg_sleep(60)")
    ask = partial(login.result, handle) if function == "result" else partial(login.call, function, *handle)
    with pytest.raises(errors.InsufficientPrivilege, match="permission denied for background worker"):
        ask()
    assert login.list() == []
    assert list(login.call("detach_all")[0].values()) == [0]


def test_pg_cancel_backend_by_the_login_reaches_a_worker_in_another_role(
    roles: Background, open_session: OpenSession
) -> None:
    roles.execute("grant pgbackground_role to contract_etl")
    login = open_session("contract_login")
    handle = launch_as_etl(login, "select pg_sleep(60)")
    login.seen_at_work(handle)
    assert open_session("contract_login").value("select pg_cancel_backend(%s)", (handle.pid,))
    login.ended(handle)
    assert login.error(handle)["sqlstate"] == "57014"
