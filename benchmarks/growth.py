"""How what waiting costs grows with the jobs that wait: workers are simulated, since no machine has so many.

Our side is the real code, and so is all that it asks the server, but for the extension: its functions are replaced by
some that note a worker in a table. One "ends" when the table says so, and its receipt is written as a worker does it.
"""

from __future__ import annotations

import asyncio
import os
import time

import psycopg

from pgbg_orchestration import Job, Launcher

from .bench import OURS, Bench, cpu_of, percentile, until
from .rows import Point, Row

ENDS = 20  # jobs that end, one after the other, while the others wait
SIMULATION = """
create unlogged table simulated (
    session int, pid int generated always as identity (start with 10000000), cookie bigint default 1, label text,
    work text, state text default 'running', primary key (pid)
);
create index on simulated (session);
create or replace function {schema}.pg_background_launch(sql text, queue_size integer, label text)
    returns {schema}.pg_background_handle language sql as $$
    insert into public.simulated (session, label, work)
    values (pg_catalog.pg_backend_pid(), label, pg_catalog.current_setting('pgbg.work', true))
    returning row(pid, cookie)::{schema}.pg_background_handle
$$;
create or replace function {schema}.pg_background_result_info(pid integer, cookie bigint)
    returns {schema}.pg_background_result_info language sql as $$
    select row(0, 'DO', w.state = 'stopped', false, now(), now())::{schema}.pg_background_result_info
    from public.simulated as w where w.pid = $1
$$;
create or replace function {schema}.pg_background_detach(pid integer, cookie bigint) returns void language sql as $$
    delete from public.simulated as w where w.pid = $1
$$;
"""
VIEW = """
select pg_catalog.format('create or replace view %%s as select %%s from public.simulated as w'
    ' where w.session = pg_catalog.pg_backend_pid()', a.attrelid::regclass,
    pg_catalog.string_agg(case when a.attname in ('pid', 'cookie', 'state', 'label') then 'w.' || a.attname
        else pg_catalog.format('null::%%s as %%I', pg_catalog.format_type(a.atttypid, a.atttypmod), a.attname) end, ', '
        order by a.attnum))
from pg_catalog.pg_attribute as a
where a.attrelid = %s::regclass and a.attnum > 0 and not a.attisdropped
group by a.attrelid
"""
END = """
select pg_catalog.set_config('pgbg.work', w.work, true), pgbg.begin_job()
from simulated as w where w.label = %s
"""


async def waiting(bench: Bench) -> list[Row]:
    """Return what it costs to wait, for each number of jobs."""
    conn = await bench.connect()
    async with conn:
        await conn.execute(SIMULATION.format(schema=bench.extension.schema).encode())
        made = await (await conn.execute(VIEW, (f"{bench.extension.schema}.pg_background_list",))).fetchone()
        assert made is not None
        await conn.execute(str(made[0]).encode())
        return [row for number in bench.size.growth for row in await _waiting(bench, conn, number)]


async def _waiting(bench: Bench, conn: psycopg.AsyncConnection, number: int) -> list[Row]:
    ends = min(ENDS, number)
    names = [f"{number}/{n}/{os.urandom(4).hex()}" for n in range(number)]
    told: dict[str, float] = {}
    async with Launcher(bench.conninfo) as launcher:

        async def one(name: str) -> None:
            await launcher.run(Job("do $$begin end$$", id=name, label=name), on_cancel="leave")
            told[name] = time.perf_counter()

        began, cpu = time.perf_counter(), time.process_time()
        tasks = [asyncio.create_task(one(name)) for name in names]
        await until(conn, "select count(*) from simulated", number)
        launched, cpu = time.perf_counter() - began, time.process_time() - cpu
        await asyncio.sleep(bench.size.age)
        ours = f"select pid from pg_stat_activity where {OURS} and datname = current_database()"
        pids = [pid for (pid,) in await (await conn.execute(ours.encode())).fetchall()]
        own, theirs = time.process_time(), cpu_of(pids)
        await asyncio.sleep(bench.size.seconds * 2)
        own, theirs = time.process_time() - own, cpu_of(pids) - theirs
        late = []
        for name in names[:: number // ends][:ends]:
            async with conn.transaction():
                await conn.execute(END, (name,))
                await conn.execute("update simulated set state = 'stopped' where label = %s", (name,))
            committed = time.perf_counter()
            await asyncio.wait({tasks[names.index(name)]})
            late.append(told[name] - committed)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await conn.execute("truncate simulated")
    seconds = bench.size.seconds * 2
    what = f"{number} jobs waiting, workers simulated"

    def row(name: str, value: str, y: float, unit: str) -> Row:
        return Row(f"{what}: {name}", value, points=(Point(f"Waiting: {name} ({unit})", number, y),))

    return [
        row("launched at once", f"{launched:.1f} s", launched, "s"),
        row("own CPU for that", f"{cpu:.2f} s", cpu, "s"),
        row("connections", str(len(pids)), len(pids), "number"),
        row("own CPU", f"{own / seconds:.1%} of a core", own / seconds * 100, "% of a core"),
        row("CPU of our sessions", f"{theirs / seconds:.1%} of a core", theirs / seconds * 100, "% of a core"),
        row("commit to outcome, p95", f"{percentile(late, 95) * 1000:.0f} ms", percentile(late, 95) * 1000, "ms"),
    ]
