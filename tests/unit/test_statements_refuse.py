"""Which statements are refused before launch, and which may only run alone."""

import pickle

import pytest

from pgbg_orchestration import Job, Kind, statements
from pgbg_orchestration.statements import EmptySql, RefusedStatement, UnterminatedSql

# Tried on PostgreSQL 18.6 with pg_background 2.0.3: alone it works, beside another statement it fails with 25001.
ALONE = """
vacuum
vacuum (analyze) t
VACUUM FULL t
create index concurrently i on t(b)
create unique index concurrently on t(a)
create index concurrently if not exists i on t(b)
drop index concurrently if exists i
reindex table concurrently t
reindex (concurrently) table t
reindex (verbose, concurrently on) index i
reindex (concurrently 'on') index i
reindex schema public
reindex (verbose) database
reindex system
cluster
cluster verbose
cluster (verbose)
wait for lsn '0/306EE20'
wait for lsn '0/306EE20' with (timeout '1s')
repack
repack (verbose)
repack (analyze) t
repack (verbose, analyze) t
repack using index
repack (concurrently) t
repack ("concurrently") t using index i
reindex ("concurrently") table t
discard all
alter system set work_mem = '4MB'
create database d
drop database if exists d
alter database d set tablespace pg_default
create tablespace s location '/x'
drop tablespace s
alter table p detach partition p2 concurrently
alter table if exists only "s"."p" detach partition "p 2" concurrently -- later
create subscription s connection 'dbname=x' publication p
create subscription s connection 'dbname=x' publication p with (copy_data = false)
alter subscription s refresh publication
alter subscription s set publication q
alter subscription s add publication q with (copy_data = off)
alter subscription s set (failover = true)
alter subscription s set (failover = false)
alter subscription s set (streaming = off, two_phase = off)
""".strip().splitlines()

# Tried there too: these run beside others.
BESIDE = """
analyze t
create index i on t(b)
create index "concurrently" on t(b)
drop index i
reindex table t
reindex (concurrently off, verbose) table t
reindex (concurrently false) index i
reindex (concurrently 0) index i
reindex (concurrently true, concurrently false) index i
reindex index "concurrently"
cluster t using i
cluster verbose t
repack t
repack (verbose) t using index i
repack (concurrently off, analyze off) t
repack "using"
cluster "verbose"
refresh materialized view concurrently m
discard plans
discard temp
alter database d set work_mem = '4MB'
alter database d rename to tablespace
alter tablespace pg_default set (random_page_cost = 4)
alter table p detach partition p2
alter table p detach partition "concurrently"
alter table t add column concurrently_at int
alter type e add value 'b'
create subscription s connection 'dbname=x' publication p with (connect = false)
create subscription s connection 'dbname=x' publication p with (create_slot = off, enabled = false)
alter subscription s set publication q with (refresh = false)
alter subscription s disable
alter subscription s refresh sequences
alter subscription s set (two_phase = true)
alter subscription s set (two_phase)
alter subscription s set (binary = true)
checkpoint
lock table t
call p()
do 'begin end'
unlisten *
notify x
set constraints all deferred
set local work_mem = '4MB'
set transaction read only
set transaction isolation level read committed
set local transaction_read_only = on
set session characteristics as transaction read write
prepare transaction as select 1
prepare transaction(text) as select $1
copy t to '/tmp/x'
copy t from program 'stdin'
copy "from" (stdin) from '/tmp/stdin'
copy stdin to '/tmp/x'
select 'vacuum'
"vacuum"
select vacuum
explain select 1
""".strip().splitlines()

# Fail alone and beside others (0A000; COPY FROM 08003), or hang and lose their rows (COPY TO STDOUT).
NEVER = """
begin
BEGIN isolation level serializable
start transaction
commit
commit and chain
commit prepared 'x'
end
rollback
rollback to savepoint a
rollback prepared 'x'
abort
savepoint a
release a
prepare transaction 'x'
PREPARE /* ; */ TRANSACTION $$x$$
copy t from stdin
copy t (a, b) from stdin with (format csv)
copy t from stdout
COPY (select 'to' from t) TO STDOUT
copy binary t to stdout
listen x
""".strip().splitlines()


@pytest.mark.parametrize("sql", ALONE)
def test_alone(sql: str) -> None:
    (statement,) = statements.split(sql)
    assert statements.outside_transaction(statement)
    statements.check([statement], one_transaction=False)
    with pytest.raises(RefusedStatement, match="receipt"):
        statements.check([statement], one_transaction=True)
    for one_transaction in (True, False):
        with pytest.raises(RefusedStatement, match="a job of its own") as caught:
            statements.check(statements.split(f"select 1;\n{sql}"), one_transaction)
        assert (caught.value.number, caught.value.line) == (2, 2)


@pytest.mark.parametrize("sql", BESIDE)
def test_beside_others(sql: str) -> None:
    (statement,) = statements.split(sql)
    assert not statements.outside_transaction(statement)
    statements.check([statement, statement], one_transaction=True)


@pytest.mark.parametrize("sql", NEVER)
def test_never(sql: str) -> None:
    (statement,) = statements.split(sql)
    for one_transaction in (True, False):
        with pytest.raises(RefusedStatement):
            statements.check([statement], one_transaction)


@pytest.mark.parametrize(
    "sql",
    [
        "set transaction isolation level serializable",
        "set local transaction isolation level serializable",
        "set transaction read only, isolation level serializable",
        "set transaction_isolation to 'serializable'",
        "set local transaction_isolation = 'serializable'",
        "set transaction snapshot '00000003-0000001B-1'",
        "set session transaction not deferrable",
        "set transaction_deferrable = on",
    ],
)
def test_what_must_come_before_the_receipt(sql: str) -> None:
    statements.check(statements.split(sql), one_transaction=False)
    with pytest.raises(RefusedStatement, match="isolation"):
        statements.check(statements.split(sql), one_transaction=True)


@pytest.mark.parametrize("sql", [*ALONE, "call p()", "drop subscription if exists s"])
def test_what_is_supervised_unasked(sql: str) -> None:
    assert Job(sql).kind is Kind.SUPERVISED
    assert Job(f"/* at night */ {sql};").kind is Kind.SUPERVISED


@pytest.mark.parametrize("sql", [sql for sql in BESIDE if sql != "call p()"])
def test_what_carries_a_receipt_unasked(sql: str) -> None:
    assert Job(sql).kind is Kind.RECEIPT


def test_empty_is_refused() -> None:
    with pytest.raises(EmptySql, match="only comments"):
        statements.check(statements.split("-- later;\n;"), one_transaction=True)


def test_refusal_names_the_statement_and_masks_strings() -> None:
    sql = "select 1;\n/* x */\ncreate  subscription s -- y\n connection 'password=secret' publication " + "p" * 60
    with pytest.raises(RefusedStatement) as caught:
        statements.check(statements.split(sql), one_transaction=False)
    error = caught.value
    assert (error.number, error.line) == (2, 3)
    assert error.excerpt.startswith("create subscription s connection '…' publication pp")
    assert len(error.excerpt) == 60
    assert "secret" not in str(error)
    assert "statement 2 (line 3) cannot run in a transaction" in str(error)


@pytest.mark.parametrize("error", [UnterminatedSql("string", 2, 30), RefusedStatement(2, 3, "vacuum", "cannot")])
def test_errors_travel_between_processes(error: ValueError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))
